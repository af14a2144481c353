// CUDA's additions to C++, as far as the kernels use them: qualifiers, vector types, built-in variables
// and functions of a single thread. Functions of a warp are in warp.h, those of a block in
// named_barrier.h.
//
// There is no __shared__: static shared memory would escape the checks of shared_memory.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// Variables, which the scheduler sets for the thread that it is about to run.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }

// One thread runs at a time, so every access is atomic.
template <typename T>
T atomic_add(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

inline int atomicAdd(int* address, int value) { return atomic_add(address, value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return atomic_add(address, value); }
inline float atomicAdd(float* address, float value) { return atomic_add(address, value); }
