// The backward pass: delta, then dQ by query tiles, then dK and dV by key tiles (docs/hopper.md says why in
// two walks). Every gradient is written by one thread, once.
#include "attention.h"
#include "launch.cuh"
#include "pipeline.cuh"

namespace {

// A row of out and dout is read by 8 threads.
constexpr int THREADS_A_ROW = 8;
constexpr int DELTA_THREADS = 256;

// delta = rowsum(out * dout) - dlse, with which dS = P * (dP - delta).
template <typename T>
__global__ void __launch_bounds__(DELTA_THREADS) delta_kernel(const __grid_constant__ AttentionParams params) {
  const int64_t rows = static_cast<int64_t>(params.batch) * params.heads * params.length;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * DELTA_THREADS + threadIdx.x) / THREADS_A_ROW;
  const int part = threadIdx.x % THREADS_A_ROW;
  float sum = 0.f;
  if (row < rows) {
    const int token = row % params.length;
    const int head = row / params.length % params.heads;
    const int batch = row / params.length / params.heads;
    const uint16_t* out = row_address(params.out, batch, head, token);
    const uint16_t* dout = row_address(params.dout, batch, head, token);
    for (int column = part * CHUNK; column < params.head_dim; column += THREADS_A_ROW * CHUNK) {
      const uint4 x = *reinterpret_cast<const uint4*>(out + column);
      const uint4 y = *reinterpret_cast<const uint4*>(dout + column);
      const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = ptx::unpack<T>(xs[i]), b = ptx::unpack<T>(ys[i]);
        sum = fmaf(a.x, b.x, fmaf(a.y, b.y, sum));
      }
    }
  }
  for (int distance = THREADS_A_ROW / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (row < rows && part == 0) params.delta[row] = sum - (params.dlse ? params.dlse[row] : 0.f);
}

}  // namespace

void attention_delta(const AttentionParams& params, runtime::Stream stream) {
  const int64_t threads = static_cast<int64_t>(params.batch) * params.heads * params.length * THREADS_A_ROW;
  const int blocks = (threads + DELTA_THREADS - 1) / DELTA_THREADS;
  runtime::launch(params.bf16 ? delta_kernel<BF16> : delta_kernel<FP16>, blocks, DELTA_THREADS, 0, stream, params);
}

void attention_backward_sm90(const AttentionParams& params, runtime::Stream stream) {
  const runtime::DeviceGuard guard(params.device);
  attention_delta(params, stream);
  attention_dq_sm90(params, stream);
  attention_dkdv_sm90(params, stream);
}
