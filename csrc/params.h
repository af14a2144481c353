// What crosses from Python to the kernels: one plain struct a call. All pointers are to device memory.
#pragma once

#include <cstdint>

// A 16-bit tensor [batch, heads, length, head_dim]; the last dimension is contiguous. Address and
// strides are multiples of 16 bytes.
struct Tensor4 {
  void* data;
  int64_t batch_stride, head_stride, token_stride;  // elements
};

struct AttentionParams {
  // ---- Shapes. heads is a multiple of kv_heads (grouped queries), head_dim of 8, at most 256.
  int batch, heads, kv_heads, length, head_dim;
  bool bf16;    // or fp16
  float scale;  // of the scores
  int device;   // all pointers are on it

  // ---- Operands. q, out, dout and dq are [batch, heads, ...], k, v, dk and dv [batch, kv_heads, ...].
  Tensor4 q, k, v, out;
  Tensor4 dout, dq, dk, dv;  // of the backward pass
  float* lse;                // [batch, heads, length], natural logarithm; -inf in padding
  const float* dlse;         // [batch, heads, length], or null
  float* delta;              // [batch, heads, length]: rowsum(out * dout) - dlse
  float* dq_sum;             // [batch, heads, length, head_dim], work space, or null

  // ---- The layout (voco_kernels/schedule.py says what the columns and lists are).
  const int* visible_from;  // [batch, length]
  const int* query_tiles;   // [batch * length, 8]
  const int* key_tiles;     // [batch * length, 8]
  const int* counts;        // [2]: query tiles, key tiles
  const int* kept;          // [batch, length]
  const int* readers;       // [batch, length]

  int* next_item;  // [2], work space: which query tile, and which key tile, is the next to be taken
};
