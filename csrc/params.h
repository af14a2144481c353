// The parameter structs that Python passes to the kernels, one per call. All pointers are to device
// memory or, where KvMoveParams says so, to pinned host memory, which the device can read directly.
#pragma once

#include <cstdint>

// A 16-bit tensor [batch, heads, length, head_dim] whose last dimension is contiguous. Its address and
// strides are multiples of 16 bytes.
struct Tensor4 {
  void* data;
  int64_t batch_stride, head_stride, token_stride;  // elements
};

struct AttentionParams {
  // ---- Shapes. heads is a multiple of kv_heads (grouped queries); head_dim of 8, up to 256.
  int batch, heads, kv_heads, length, head_dim;
  bool bf16;    // else fp16
  float scale;  // factor applied to the scores
  int device;   // of all pointers

  // ---- Operands. q, out, dout and dq are [batch, heads, ...], k, v, dk and dv [batch, kv_heads, ...].
  Tensor4 q, k, v, out;
  Tensor4 dout, dq, dk, dv;  // backward pass only
  float* lse;                // [batch, heads, length], natural logarithm; -inf for padding
  const float* dlse;         // [batch, heads, length], or null
  float* delta;              // [batch, heads, length]: rowsum(out * dout) - dlse
  float* dq_sum;             // [batch, heads, length, head_dim], workspace, or null

  // ---- The layout (voco_kernels/layout/schedule.py describes the columns and lists).
  const int* visible_from;  // [batch, length]
  const int* query_tiles;   // [batch * length, 8]
  const int* key_tiles;     // [batch * length, 8]
  const int* counts;        // [2]: query tiles, key tiles
  const int* kept;          // [batch, length]
  const int* readers;       // [batch, length]

  int* next_item;  // [2], workspace: counters for drawing work items of query tiles and of key tiles
};

enum class Element { bf16, fp16, fp32, int8, e4m3 };

// A transfer of some tokens' keys and values, for all layers, between compact entries and a cache: the
// fields of Move (voco_kernels/kv/move.py). The tables, entries and their scales are in device or pinned
// host memory. Addresses and strides of rows are multiples of 16 bytes (8 in entries of 8-bit elements).
// The addresses entries and tokens are multiples of 16 bytes as well.
struct KvMoveParams {
  bool to_cache;  // else from the cache, which is a plain copy
  int device;

  // ---- Shapes. head_dim is a multiple of 8.
  int num_entries, num_layers, num_kv_heads, head_dim;
  int most_tokens;      // maximum per entry, to size the grid
  int64_t head_stride;  // of the cache, elements

  // ---- Element types. The cache's has at least 16 bits.
  Element entry_type, cache_type;

  // ---- Tables.
  const int64_t* entries;  // [num_entries, 4]: address, address of scales or 0, first token, tokens
  const int64_t* tokens;   // [all tokens, 2]: offset in the cache, in elements; shift of the key
  const int64_t* bases;    // [num_layers, 2]: addresses of a layer's keys and values

  // ---- Rotation of keys, or null. If null and the element types are equal, the transfer is a copy.
  const double* inv_freq;  // [rotary_dim / 2], radians per position
  int rotary_dim;          // even; a multiple of 16 unless interleaved
  bool interleaved;        // rotates dimensions (2i, 2i + 1) together, else (i, i + rotary_dim / 2)

  // ---- The cache's token counters, or null.
  const int64_t* lengths;  // [num_layers]: the address of each layer's int64 counter
  int64_t length;          // the value to write there

  int blocks_per_entry;  // set by kv_move
};
