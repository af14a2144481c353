// Stores of accumulators to rows of a 16-bit tensor in global memory.
#pragma once

#include "params.h"
#include "products.cuh"

// Four lanes share a row. Each lane holds two columns of each of four chunks of 8 columns; they exchange
// words so that lane q has the whole of chunk q.
VOCO_DEVICE uint4 gather_chunk(uint32_t (&words)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
  const uint32_t first = __shfl_xor_sync(0xffffffffu, odd ? words[0] : words[1], 1);
  const uint32_t second = __shfl_xor_sync(0xffffffffu, odd ? words[2] : words[3], 1);
  const uint2 low = odd ? uint2{first, words[1]} : uint2{words[0], first};
  const uint2 high = odd ? uint2{second, words[3]} : uint2{words[2], second};
  const uint32_t x = __shfl_xor_sync(0xffffffffu, upper ? low.x : high.x, 2);
  const uint32_t y = __shfl_xor_sync(0xffffffffu, upper ? low.y : high.y, 2);
  return upper ? uint4{x, y, high.x, high.y} : uint4{low.x, low.y, x, y};
}

// Stores this thread's row `h`, times `factor`, to `row` if valid. All lanes of a warp must call it.
// `first_column` is the column of the accumulator's first value; columns from head_dim on are dropped.
template <typename T, int COUNT>
VOCO_DEVICE void store_row(uint16_t* row, bool valid, const float (&values)[COUNT], int h, float factor,
                           int first_column, int head_dim, int lane) {
#pragma unroll
  for (int j = 0; j < COUNT / 4; j += 4) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] =
          ptx::pack<T>(values[4 * (j + i) + 2 * h] * factor, values[4 * (j + i) + 2 * h + 1] * factor);
    }
    const uint4 chunk = gather_chunk(words, lane);
    const int column = first_column + CHUNK * (j + lane % 4);
    if (valid && column < head_dim) *reinterpret_cast<uint4*>(row + column) = chunk;
  }
}

template <typename T, int D>
VOCO_DEVICE void store_row(uint16_t* row, bool valid, const RowsByHeadDim<D>& rows, int h, float factor,
                           int first_column, int head_dim, int lane) {
#pragma unroll
  for (int span = 0; span < SPANS<D>; ++span) {
    store_row<T>(row, valid, rows.values[span], h, factor, first_column + span * SPAN<D>, head_dim,
                 lane);
  }
}
