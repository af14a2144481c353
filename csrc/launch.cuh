// Helpers for launching kernels: tensor maps, and the choice of a kernel by dtype and head_dim.
#pragma once

#include "attention.h"
#include "blocks.cuh"
#include "runtime.cuh"
#include "tiles.cuh"

// Bytes of shared memory: the limit per block on sm_90, and the part reserved for barriers and queues.
constexpr int SHARED_LIMIT = 232448;
constexpr int SHARED_RESERVE = 2048;

// A tensor map with boxes of one panel: 64 rows, `heads` for each position.
inline ptx::TensorMap panel_map(const Tensor4& tensor, const AttentionParams& params, int all_heads,
                                int heads) {
  const uint64_t sizes[5] = {uint64_t(params.head_dim), uint64_t(heads), uint64_t(params.length),
                             uint64_t(all_heads / heads), uint64_t(params.batch)};
  const uint64_t strides[4] = {uint64_t(tensor.head_stride) * 2, uint64_t(tensor.token_stride) * 2,
                               uint64_t(tensor.head_stride) * heads * 2,
                               uint64_t(tensor.batch_stride) * 2};
  const uint32_t box[5] = {PANEL_COLUMNS, uint32_t(heads), uint32_t(BLOCK_ROWS / heads), 1, 1};
  return runtime::tensor_map(tensor.data, params.bf16, sizes, strides, box);
}

// Calls f with types for the call's dtype and for its head_dim, rounded up to a width that has a kernel.
// In shared memory, columns from head_dim on are zeros.
template <int D>
struct HeadDim {
  static constexpr int value = D;
};

template <typename F>
void by_type(const AttentionParams& params, F f) {
  auto with_type = [&](auto type) {
    if (params.head_dim <= 64) {
      f(type, HeadDim<64>());
    } else if (params.head_dim <= 128) {
      f(type, HeadDim<128>());
    } else {
      f(type, HeadDim<256>());
    }
  };
  if (params.bf16) {
    with_type(BF16());
  } else {
    with_type(FP16());
  }
}
