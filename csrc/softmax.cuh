// Online softmax in base 2 (Milakov and Gimelshein, arXiv 1805.02867), on wgmma accumulators.
//
// A thread has parts of two rows of a block of scores, h = 0 and 1: elements 4 * j + 2 * h + e. Four
// adjacent lanes share a row.
#pragma once

#include "ptx.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr float INFINITY_F = __builtin_huge_valf();

VOCO_DEVICE float row_maximum(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

VOCO_DEVICE float row_total(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

struct OnlineSoftmax {
  float maximum[2];  // of scale_log2 * score, over all blocks so far
  float sum[2];      // of this thread's columns only

  VOCO_DEVICE void reset() {
    for (int h = 0; h < 2; ++h) {
      maximum[h] = -INFINITY_F;
      sum[h] = 0.f;
    }
  }

  // Turns scores into probabilities (up to division by the final sum), and sets `rescale` to the factor
  // for earlier ones.
  template <int COUNT>
  VOCO_DEVICE void update(float (&scores)[COUNT], float scale_log2, float (&rescale)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float highest = scores[2 * h];
#pragma unroll
      for (int j = 0; j < COUNT / 4; ++j) {
        highest = fmaxf(highest, fmaxf(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
      }
      // Every query that is stored sees a key in its first block, so this is finite.
      const float next = fmaxf(maximum[h], row_maximum(highest) * scale_log2);
      rescale[h] = ptx::exp2(maximum[h] - next);
      maximum[h] = next;
      float total = 0.f;
#pragma unroll
      for (int j = 0; j < COUNT / 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[4 * j + 2 * h + e];
          score = ptx::exp2(fmaf(score, scale_log2, -next));
          total += score;
        }
      }
      sum[h] = fmaf(sum[h], rescale[h], total);
    }
  }
};

template <int COUNT>
VOCO_DEVICE void multiply_rows(float (&values)[COUNT], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] *= factor[i / 2 % 2];
}
