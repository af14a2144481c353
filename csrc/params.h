// What crosses from Python to the kernels: one plain struct a call. All pointers are to device memory,
// or, where a kv_move's struct says so, to pinned host memory, which the device reads by itself.
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

  // ---- The layout (voco_kernels/layout/schedule.py says what the columns and lists are).
  const int* visible_from;  // [batch, length]
  const int* query_tiles;   // [batch * length, 8]
  const int* key_tiles;     // [batch * length, 8]
  const int* counts;        // [2]: query tiles, key tiles
  const int* kept;          // [batch, length]
  const int* readers;       // [batch, length]

  int* next_item;  // [2], work space: which query tile, and which key tile, is the next to be taken
};

enum class Element { bf16, fp16, fp32, int8, e4m3 };

// Keys and values of some tokens, of all layers, between compact entries and a cache: the fields of Move
// (voco_kernels/kv/move.py). The tables, entries and their scales are in device or pinned host memory.
// Addresses and strides of rows are multiples of 16 bytes, of 8 in entries of 8 bits; addresses of
// entries and tokens are multiples of 16 as well.
struct KvMoveParams {
  bool to_cache;  // or from it, which is a copy
  int device;

  // ---- Shapes. head_dim is a multiple of 8.
  int num_entries, num_layers, num_kv_heads, head_dim;
  int most_tokens;      // of an entry, to size the grid by
  int64_t head_stride;  // of the cache, elements

  // ---- Element types, of the cache 16 bits or more.
  Element entry_type, cache_type;

  // ---- Tables.
  const int64_t* entries;  // [num_entries, 4]: address, address of scales or 0, first token, tokens
  const int64_t* tokens;   // [all tokens, 2]: offset in the cache, in elements; shift of the key
  const int64_t* bases;    // [num_layers, 2]: addresses of a layer's keys and values

  // ---- Rotation of keys, or null: then element types that are equal mean a copy.
  const double* inv_freq;  // [rotary_dim / 2], radians a position
  int rotary_dim;          // even; a multiple of 16 unless interleaved
  bool interleaved;        // dimensions (2i, 2i + 1) turn together, or (i, i + rotary_dim / 2)

  // ---- The cache's count of tokens, or null.
  const int64_t* lengths;  // [num_layers]: addresses of an int64 each
  int64_t length;          // what is written there

  int blocks_per_entry;  // set by kv_move
};
