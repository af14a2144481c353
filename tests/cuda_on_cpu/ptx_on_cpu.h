// csrc/ptx.cuh for the CPU: the same functions, implemented with the emulation in emulator/.
#pragma once

#include <type_traits>

#include "emulator/copies.h"
#include "emulator/cuda_language.h"
#include "emulator/half.h"
#include "emulator/mbarrier.h"
#include "emulator/named_barrier.h"
#include "emulator/registers.h"
#include "emulator/shared_memory.h"
#include "emulator/warp.h"
#include "emulator/warpgroup.h"

#define VOCO_DEVICE inline

struct BF16 {};
struct FP16 {};

namespace ptx {

using cuda_on_cpu::TensorMap;

// ---- Shared memory.

VOCO_DEVICE unsigned char* dynamic_shared() { return cuda_on_cpu::shared_memory.begin(); }

VOCO_DEVICE uint32_t shared_address(const void* pointer) {
  return cuda_on_cpu::shared_memory.address(pointer);
}

VOCO_DEVICE void store_shared(uint32_t address, uint32_t value) {
  std::memcpy(cuda_on_cpu::shared_memory.to_write(address, 4), &value, 4);
  cuda_on_cpu::shared_memory.wrote(cuda_on_cpu::current_thread(), address, 4);
}

VOCO_DEVICE void ldmatrix_x4(uint32_t (&registers)[4], uint32_t row_address) {
  cuda_on_cpu::warps.load_matrices(registers, row_address);
}

// ---- mbarrier.

VOCO_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  cuda_on_cpu::mbarriers.init(barrier, arrivals);
}

VOCO_DEVICE void barrier_init_fence() {
  cuda_on_cpu::mbarriers.make_visible(cuda_on_cpu::current_thread());
}

VOCO_DEVICE void barrier_arrive(uint32_t barrier) { cuda_on_cpu::mbarriers.arrive(barrier); }

VOCO_DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) {
  cuda_on_cpu::mbarriers.arrive_expect(barrier, bytes);
}

VOCO_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  cuda_on_cpu::mbarriers.wait(barrier, parity);
}

// ---- Named barriers.

VOCO_DEVICE void named_barrier_sync(int id, int threads) {
  cuda_on_cpu::named_barriers.sync(id, threads);
}

VOCO_DEVICE void named_barrier_arrive(int id, int threads) {
  cuda_on_cpu::named_barriers.arrive(id, threads);
}

// ---- Copies.

VOCO_DEVICE void fence_async_proxy() { cuda_on_cpu::shared_memory.fence(cuda_on_cpu::current_thread()); }

VOCO_DEVICE void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, int x0, int x1,
                          int x2, int x3, int x4) {
  cuda_on_cpu::copy_engine.issue(destination, map, barrier, {x0, x1, x2, x3, x4});
}

VOCO_DEVICE void cp_async_16(uint32_t destination, const void* source, bool valid) {
  cuda_on_cpu::cp_asyncs.issue(destination, valid ? source : nullptr);
}

VOCO_DEVICE void cp_async_wait_all() { cuda_on_cpu::cp_asyncs.perform_all(); }

VOCO_DEVICE void add_global(float* address, float first, float second) {
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0) {
    cuda_on_cpu::fail("add_global to %p: expected a multiple of 8", static_cast<void*>(address));
  }
  address[0] += first;
  address[1] += second;
}

// ---- Streams.

namespace detail {

VOCO_DEVICE void expect_multiple(const char* what, const void* address, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    cuda_on_cpu::fail("%s of %p: expected a multiple of %u", what, address, bytes);
  }
}

}  // namespace detail

VOCO_DEVICE uint4 load_16(const void* address) {
  detail::expect_multiple("load_16", address, 16);
  return *static_cast<const uint4*>(address);
}

VOCO_DEVICE uint2 load_8(const void* address) {
  detail::expect_multiple("load_8", address, 8);
  return *static_cast<const uint2*>(address);
}

VOCO_DEVICE void store_16(void* address, const uint4& data) {
  detail::expect_multiple("store_16", address, 16);
  *static_cast<uint4*>(address) = data;
}

// ---- Registers.

template <int COUNT>
VOCO_DEVICE void give_registers() {
  static_assert(COUNT >= 24 && COUNT <= 256 && COUNT % 8 == 0, "expected 24, 32, ..., 256");
  cuda_on_cpu::registers.set(COUNT);
}

template <int COUNT>
VOCO_DEVICE void take_registers() {
  give_registers<COUNT>();
}

// ---- wgmma.

VOCO_DEVICE void wgmma_fence() { cuda_on_cpu::current_warpgroup().fence(); }

VOCO_DEVICE void wgmma_commit() { cuda_on_cpu::current_warpgroup().commit(); }

template <int PENDING, int PLACE = 0>
VOCO_DEVICE void wgmma_wait() {
  cuda_on_cpu::current_warpgroup().wait(PENDING);
}

// Does nothing: the compiler sees that the accumulators' addresses are passed to the emulation.
template <int COUNT>
VOCO_DEVICE void pin(float (&)[COUNT]) {}

template <typename T>
constexpr bool is_bf16 = std::is_same_v<T, BF16>;

template <typename T, int N, bool MN_MAJOR_A, bool MN_MAJOR_B>
VOCO_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 16 || N == 64 || N == 128, "expected N of 16, 64 or 128");
  cuda_on_cpu::current_warpgroup().issue(
      {is_bf16<T>, false, MN_MAJOR_A, MN_MAJOR_B, accumulate, N, a, b}, d, nullptr);
}

template <typename T, int N, bool MN_MAJOR_B>
VOCO_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N == 16 || N == 64 || N == 128, "expected N of 16, 64 or 128");
  cuda_on_cpu::current_warpgroup().issue({is_bf16<T>, true, false, MN_MAJOR_B, accumulate, N, 0, b}, d,
                                         a);
}

// ---- Arithmetic. The GPU's approximations treat subnormal inputs and results as zeros.

VOCO_DEVICE float flush_subnormal(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

VOCO_DEVICE float exp2(float x) { return flush_subnormal(::exp2f(flush_subnormal(x))); }

VOCO_DEVICE float log2(float x) { return ::log2f(flush_subnormal(x)); }

template <typename T>
VOCO_DEVICE uint32_t pack(float first, float second) {
  const auto round = is_bf16<T> ? cuda_on_cpu::bf16_from_float : cuda_on_cpu::fp16_from_float;
  return round(first) | uint32_t{round(second)} << 16;
}

template <typename T>
VOCO_DEVICE float2 unpack(uint32_t pair) {
  const auto widen = is_bf16<T> ? cuda_on_cpu::float_from_bf16 : cuda_on_cpu::float_from_fp16;
  return {widen(pair & 0xffff), widen(pair >> 16)};
}

VOCO_DEVICE float2 unpack_e4m3(uint16_t pair) {
  return {cuda_on_cpu::float_from_e4m3(pair & 0xff), cuda_on_cpu::float_from_e4m3(pair >> 8)};
}

inline uint32_t uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

}  // namespace ptx
