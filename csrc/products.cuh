// The matrix products of attention, on blocks of 64 rows. They are asynchronous: each must be followed
// by a wgmma_commit and, before its result is used, a wgmma_wait and a pin.
#pragma once

#include "blocks.cuh"

// Columns of head_dim per product: wgmma allows 256, but registers suffice for 128.
template <int D>
constexpr int SPAN = D < 128 ? D : 128;
template <int D>
constexpr int SPANS = D / SPAN<D>;

// An accumulator [64, D].
template <int D>
struct RowsByHeadDim {
  float values[SPANS<D>][SPAN<D> / 2];

  VOCO_DEVICE void clear() {
#pragma unroll
    for (int span = 0; span < SPANS<D>; ++span) {
#pragma unroll
      for (int i = 0; i < SPAN<D> / 2; ++i) values[span][i] = 0.f;
    }
  }
  VOCO_DEVICE void pin() {
#pragma unroll
    for (int span = 0; span < SPANS<D>; ++span) ptx::pin(values[span]);
  }
};

// result [64, N] = a b^T, where a is a block's 64 rows, in registers, and b is N rows of a block.
template <typename T, int D, int N>
VOCO_DEVICE void rows_by_rows(float (&result)[N / 2], const uint32_t (&a)[D / 16][4], uint32_t b,
                              int b_row) {
  const RowsOperand columns(b, b_row);
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    ptx::wgmma<T, N, false>(result, a[step], columns.step(step), step > 0);
  }
}

// The same, with a in shared memory.
template <typename T, int D, int N>
VOCO_DEVICE void rows_by_rows(float (&result)[N / 2], uint32_t a, uint32_t b, int b_row) {
  const RowsOperand rows(a, 0), columns(b, b_row);
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    ptx::wgmma<T, N, false, false>(result, rows.step(step), columns.step(step), step > 0);
  }
}

// result [64, D] (+)= a b, where a [64, 16 * STEPS] is in registers and b is 16 * STEPS rows of a block,
// of which it takes D columns from a panel on.
template <typename T, int D, int STEPS>
VOCO_DEVICE void rows_by_block(RowsByHeadDim<D>& result, const uint32_t (&a)[STEPS][4], uint32_t b,
                               int b_row, bool accumulate, int b_panel = 0) {
#pragma unroll
  for (int span = 0; span < SPANS<D>; ++span) {
    const ColumnsOperand columns(b, b_panel + span * SPAN<D> / PANEL_COLUMNS, b_row);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      ptx::wgmma<T, SPAN<D>, true>(result.values[span], a[step], columns.step(step),
                                   accumulate || step > 0);
    }
  }
}
