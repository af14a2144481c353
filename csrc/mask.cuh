// A thread's query rows, and the mask on their scores.
#pragma once

#include "softmax.cuh"
#include "tiles.cuh"

// A thread's two of the 64 rows of its consumer, and the positions of their queries.
struct Rows {
  int first_position;  // of all 64 rows
  int position[2];

  VOCO_DEVICE Rows(int first_position, Packing packing, int warp, int lane)
      : first_position(first_position) {
    for (int h = 0; h < 2; ++h) position[h] = first_position + (row(h, warp, lane) >> packing.log2);
  }
  VOCO_DEVICE static int row(int h, int warp, int lane) { return 16 * warp + lane / 4 + 8 * h; }
};

// Whether the query of value i sees its key, in an accumulator [64 queries, keys from `start` on].
VOCO_DEVICE bool sees(const Rows& rows, int i, int start, int first_key, int lane) {
  const int key = start + i / 4 * 8 + lane % 4 * 2 + i % 2;
  return key >= first_key && key <= rows.position[i / 2 % 2];
}

// Whether any key of a block is masked for any of the queries.
VOCO_DEVICE bool is_cut(const Rows& rows, int start, int first_key) {
  return start < first_key || start + BLOCK_ROWS - 1 > rows.first_position;
}

template <int COUNT>
VOCO_DEVICE void hide(float (&scores)[COUNT], const Rows& rows, int start, int first_key, int lane) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (!sees(rows, i, start, first_key, lane)) scores[i] = -INFINITY_F;
  }
}

// Most blocks are seen by all queries, and the mask then costs one comparison.
template <int COUNT>
VOCO_DEVICE void hide_if_cut(float (&scores)[COUNT], const Rows& rows, int start, int first_key,
                             int lane) {
  if (is_cut(rows, start, first_key)) hide(scores, rows, start, first_key, lane);
}
