// Wrappers of the PTX instructions that the kernels use, one function per instruction. No other file has
// inline PTX.
//
// On the CPU, tests/cuda_on_cpu/ replaces this file with one that has the same functions, so that the
// kernels run there unchanged. Sections name the chapters of the PTX ISA that describe the instructions.
#pragma once

#ifdef VOCO_CUDA_ON_CPU
#include "ptx_on_cpu.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#define VOCO_DEVICE __device__ __forceinline__

// The 16-bit types of the tensor cores' operands. Tensors are passed as bytes; T is their element type.
struct BF16 {};
struct FP16 {};

namespace ptx {

using TensorMap = CUtensorMap;

// ---- Shared memory. Addresses are 32-bit, in the shared state space.

VOCO_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

VOCO_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

VOCO_DEVICE void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements, one register each. Lane i passes the address of row i % 8
// of matrix i / 8.
VOCO_DEVICE void ldmatrix_x4(uint32_t (&registers)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(row_address)
               : "memory");
}

// ---- mbarrier: a phase completes once its arrivals and the expected bytes are complete.

VOCO_DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to the copy engine; a block-wide barrier must follow.
VOCO_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

VOCO_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

VOCO_DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Returns once the phase with this parity is complete. On a new barrier, the phase with parity 1 counts
// as complete.
VOCO_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- Named barriers: `threads` threads of the block synchronize at barrier `id` (1 to 15); some may
// only arrive, without waiting.

VOCO_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

VOCO_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Copies. Ordinary stores to shared memory become visible to the copy engine and wgmma (the
// asynchronous proxy) only after this fence, executed by the thread that stored.

VOCO_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Copies a box of a 5-dimensional tensor to shared memory, in the map's swizzle. Elements outside the
// tensor are 0. The barrier counts the bytes of the whole box.
VOCO_DEVICE void tma_load(uint32_t destination, const TensorMap* map, uint32_t barrier, int x0, int x1,
                          int x2, int x3, int x4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4)
      : "memory");
}

// Copies 16 bytes from global to shared memory; if not valid, writes zeros and doesn't read the source.
VOCO_DEVICE void cp_async_16(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

VOCO_DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Adds to two adjacent floats in global memory, 8-byte aligned. Returns nothing, so it doesn't wait.
VOCO_DEVICE void add_global(float* address, float first, float second) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(first), "f"(second)
               : "memory");
}

// ---- Streaming loads, of data that is read once and should not displace other data in the caches. L1
// evicts such a line first, but holds it while adjacent threads read their parts. Not for data that the
// same launch writes.

VOCO_DEVICE uint4 load_16(const void* address) {
  uint4 data;
  asm volatile("ld.global.nc.L1::evict_first.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(data.x), "=r"(data.y), "=r"(data.z), "=r"(data.w)
               : "l"(address));
  return data;
}

VOCO_DEVICE uint2 load_8(const void* address) {
  uint2 data;
  asm volatile("ld.global.nc.L1::evict_first.v2.b32 {%0, %1}, [%2];"
               : "=r"(data.x), "=r"(data.y)
               : "l"(address));
  return data;
}

VOCO_DEVICE void store_16(void* address, const uint4& data) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(data.x), "r"(data.y),
               "r"(data.z), "r"(data.w)
               : "memory");
}

// ---- Registers are moved from copying to computing warps. Both need __launch_bounds__(n, 1).

template <int COUNT>
VOCO_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
VOCO_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- wgmma: D[64, N] (+)= A[64, 16] B[16, N] by the 128 threads of a warpgroup, asynchronously.
//
// Thread t holds D[16 * (t / 32) + (t % 32) / 4 + 8 * h, 8 * j + 2 * (t % 4) + e] in d[4 * j + 2 * h +
// e]. If A is in registers, with r = 16 * (t / 32) + (t % 32) / 4, it holds columns 2 * (t % 4) + {0, 1}
// of rows r and r + 8 in a[0] and a[1], and the columns 8 further on in a[2] and a[3]. A matrix in
// shared memory is given by a descriptor (blocks.cuh). K-major means that its extent in K (16) is
// contiguous, MN-major that its extent in M or N is.

// Orders earlier accesses to the warpgroup's registers before the products that follow.
VOCO_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

VOCO_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns once all but the last PENDING committed groups are complete. PLACE distinguishes two waits
// that the compiler must not merge.
template <int PENDING, int PLACE = 0>
VOCO_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;  // %1" ::"n"(PENDING), "n"(PLACE) : "memory");
}

// Tells the compiler, which can't see when products write their results, that it must not read them
// earlier than here.
template <int COUNT>
VOCO_DEVICE void pin(float (&values)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

#define VOCO_D0_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define VOCO_D8_15 "%8, %9, %10, %11, %12, %13, %14, %15"
#define VOCO_D16_23 "%16, %17, %18, %19, %20, %21, %22, %23"
#define VOCO_D24_31 "%24, %25, %26, %27, %28, %29, %30, %31"
#define VOCO_D32_39 "%32, %33, %34, %35, %36, %37, %38, %39"
#define VOCO_D40_47 "%40, %41, %42, %43, %44, %45, %46, %47"
#define VOCO_D48_55 "%48, %49, %50, %51, %52, %53, %54, %55"
#define VOCO_D56_63 "%56, %57, %58, %59, %60, %61, %62, %63"
#define VOCO_DREGS16 VOCO_D0_7
#define VOCO_DREGS64 VOCO_D0_7 ", " VOCO_D8_15 ", " VOCO_D16_23 ", " VOCO_D24_31
#define VOCO_DREGS128 VOCO_DREGS64 ", " VOCO_D32_39 ", " VOCO_D40_47 ", " VOCO_D48_55 ", " VOCO_D56_63
#define VOCO_OUT8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define VOCO_OUT16 VOCO_OUT8(0)
#define VOCO_OUT64 VOCO_OUT8(0), VOCO_OUT8(8), VOCO_OUT8(16), VOCO_OUT8(24)
#define VOCO_OUT128 VOCO_OUT64, VOCO_OUT8(32), VOCO_OUT8(40), VOCO_OUT8(48), VOCO_OUT8(56)

// A0 to FLAG are the numbers of the operands after the N / 2 registers of D.
#define VOCO_WGMMA_SS(N, TYPE, A, B, FLAG, TA, TB)                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #FLAG                                         \
               ", 0;\n"                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" VOCO_DREGS##N \
               "}, %" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}\n"                           \
               : VOCO_OUT##N                                                                      \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(MN_MAJOR_A), "n"(MN_MAJOR_B))
#define VOCO_WGMMA_RS(N, TYPE, A0, A1, A2, A3, B, FLAG, TB)                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #FLAG                                               \
               ", 0;\n"                                                                                 \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" VOCO_DREGS##N       \
               "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB ";\n}\n"          \
               : VOCO_OUT##N                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
                 "n"(MN_MAJOR_B))

template <typename T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<BF16> = true;

// With both operands in shared memory.
template <typename T, int N, bool MN_MAJOR_A, bool MN_MAJOR_B>
VOCO_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 16 || N == 64 || N == 128, "expected N of 16, 64 or 128");
  if constexpr (N == 16 && is_bf16<T>) VOCO_WGMMA_SS(16, "bf16", 8, 9, 10, 11, 12);
  if constexpr (N == 16 && !is_bf16<T>) VOCO_WGMMA_SS(16, "f16", 8, 9, 10, 11, 12);
  if constexpr (N == 64 && is_bf16<T>) VOCO_WGMMA_SS(64, "bf16", 32, 33, 34, 35, 36);
  if constexpr (N == 64 && !is_bf16<T>) VOCO_WGMMA_SS(64, "f16", 32, 33, 34, 35, 36);
  if constexpr (N == 128 && is_bf16<T>) VOCO_WGMMA_SS(128, "bf16", 64, 65, 66, 67, 68);
  if constexpr (N == 128 && !is_bf16<T>) VOCO_WGMMA_SS(128, "f16", 64, 65, 66, 67, 68);
}

// With A in registers.
template <typename T, int N, bool MN_MAJOR_B>
VOCO_DEVICE void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N == 16 || N == 64 || N == 128, "expected N of 16, 64 or 128");
  if constexpr (N == 16 && is_bf16<T>) VOCO_WGMMA_RS(16, "bf16", 8, 9, 10, 11, 12, 13, 14);
  if constexpr (N == 16 && !is_bf16<T>) VOCO_WGMMA_RS(16, "f16", 8, 9, 10, 11, 12, 13, 14);
  if constexpr (N == 64 && is_bf16<T>) VOCO_WGMMA_RS(64, "bf16", 32, 33, 34, 35, 36, 37, 38);
  if constexpr (N == 64 && !is_bf16<T>) VOCO_WGMMA_RS(64, "f16", 32, 33, 34, 35, 36, 37, 38);
  if constexpr (N == 128 && is_bf16<T>) VOCO_WGMMA_RS(128, "bf16", 64, 65, 66, 67, 68, 69, 70);
  if constexpr (N == 128 && !is_bf16<T>) VOCO_WGMMA_RS(128, "f16", 64, 65, 66, 67, 68, 69, 70);
}

// ---- Arithmetic.

VOCO_DEVICE float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

VOCO_DEVICE float log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Rounds two floats (to nearest even) and packs them in a register, the first in its lower half.
template <typename T>
VOCO_DEVICE uint32_t pack(float first, float second) {
  uint32_t result;
  if constexpr (is_bf16<T>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
  }
  return result;
}

template <typename T>
VOCO_DEVICE float2 unpack(uint32_t pair) {
  if constexpr (is_bf16<T>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    float2 result;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, "
        "high;\n}"
        : "=f"(result.x), "=f"(result.y)
        : "r"(pair));
    return result;
  }
}

// Converts two 8-bit numbers (float8_e4m3fn) exactly; the first is in the lower half.
VOCO_DEVICE float2 unpack_e4m3(uint16_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
  return unpack<FP16>(halves);
}

// Returns the first lane's value to the whole warp. The compiler then knows that it is the same in all
// lanes, and keeps what is computed from it in uniform registers, where wgmma needs its descriptors. It
// doesn't know that the next iteration of a loop gets the same value, so it keeps nothing across
// iterations.
VOCO_DEVICE uint32_t uniform(uint32_t value) { return __shfl_sync(0xffffffffu, value, 0); }

}  // namespace ptx

#endif
