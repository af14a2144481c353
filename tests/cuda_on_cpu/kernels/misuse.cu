// A test kernel that makes one mistake per launch. A GPU would hang, continue with wrong numbers, or
// happen to be right; the emulation must report the mistake.
#include <cstring>

#include "descriptor.cuh"
#include "exported.h"
#include "ptx.cuh"
#include "runtime.cuh"

enum Mistake {
  TOO_MANY_ARRIVALS,
  MISALIGNED_BARRIER,
  BARRIER_NOT_INITIALISED,
  BARRIER_OVERWRITTEN,
  BARRIER_INITIALISED_TWICE,
  BARRIER_NOT_VISIBLE_TO_COPIES,
  WAIT_FOR_NOBODY,
  WAIT_FOR_NO_BYTES,
  TOO_FEW_AT_NAMED_BARRIER,
  NAMED_BARRIER_COUNTS_DIFFER,
  NAMED_BARRIER_TWICE,
  NAMED_BARRIER_ODD_COUNT,
  NAMED_BARRIER_IN_VAIN,
  LANE_MISSING,
  LANES_DIFFER,
  LANE_OUTSIDE_MASK,
  OUTSIDE_OF_SHARED_MEMORY,
  POINTER_BEHIND_SHARED_MEMORY,
  COPY_MISALIGNED,
  COPY_IN_FLIGHT_AT_THE_END,
  COPY_OVER_UNFENCED_STORE,
  CP_ASYNC_MISALIGNED,
  CP_ASYNC_WITHOUT_WAIT,
  WGMMA_WITHOUT_FENCE,
  WGMMA_WITHOUT_COMMIT,
  WGMMA_DESCRIPTORS_DIFFER,
  WGMMA_WITHOUT_SWIZZLE,
  WGMMA_BETWEEN_PATTERNS,
  WGMMA_OF_PART_OF_A_WARPGROUP,
  WGMMA_ACCUMULATORS_WRITTEN,
  ADD_MISALIGNED,
  TOO_MANY_REGISTERS,
};

struct Misuse {
  ptx::TensorMap map;  // of boxes of 8 rows of 128 bytes
  float* global;       // [64]
  Mistake mistake;
};

constexpr int SHARED = 4 * 64 * ROW;
constexpr unsigned ALL = 0xffffffffu;

__global__ void __launch_bounds__(256, 1) misuse_kernel(const __grid_constant__ Misuse misuse) {
  const Mistake mistake = misuse.mistake;
  const int thread = threadIdx.x;
  const uint32_t tile = ptx::shared_address(ptx::dynamic_shared()), barrier = tile + SHARED - 64;
  unsigned char* memory = ptx::dynamic_shared();
  if (thread == 0 && mistake != BARRIER_NOT_INITIALISED) {
    ptx::barrier_init(barrier, 1);
    if (mistake != BARRIER_NOT_VISIBLE_TO_COPIES) ptx::barrier_init_fence();
  }
  __syncthreads();
  if (thread == 0) {
    if (mistake == TOO_MANY_ARRIVALS) {
      ptx::barrier_arrive_expect(barrier, 16);
      ptx::barrier_arrive(barrier);
    }
    if (mistake == MISALIGNED_BARRIER) ptx::barrier_arrive(barrier + 4);
    if (mistake == BARRIER_NOT_INITIALISED) ptx::barrier_arrive(barrier);
    if (mistake == BARRIER_OVERWRITTEN) {
      ptx::store_shared(barrier, 1);
      ptx::barrier_arrive(barrier);
    }
    if (mistake == BARRIER_INITIALISED_TWICE) ptx::barrier_init(barrier, 1);
    if (mistake == BARRIER_NOT_VISIBLE_TO_COPIES || mistake == COPY_IN_FLIGHT_AT_THE_END) {
      ptx::barrier_arrive_expect(barrier, PATTERN);
      ptx::tma_load(tile, &misuse.map, barrier, 0, 0, 0, 0, 0);
    }
    if (mistake == WAIT_FOR_NO_BYTES) {
      ptx::barrier_arrive_expect(barrier, PATTERN + 16);
      ptx::tma_load(tile, &misuse.map, barrier, 0, 0, 0, 0, 0);
    }
    if (mistake == OUTSIDE_OF_SHARED_MEMORY) ptx::store_shared(tile + SHARED, 0);
    if (mistake == POINTER_BEHIND_SHARED_MEMORY) memory[SHARED + 3] = 0;
    if (mistake == COPY_MISALIGNED) {
      ptx::tma_load(tile + 128, &misuse.map, barrier, 0, 0, 0, 0, 0);
    }
    if (mistake == COPY_OVER_UNFENCED_STORE) {
      ptx::store_shared(tile + 64, 0);
      ptx::barrier_arrive_expect(barrier, PATTERN);
      ptx::tma_load(tile, &misuse.map, barrier, 0, 0, 0, 0, 0);
    }
    if (mistake == CP_ASYNC_MISALIGNED) ptx::cp_async_16(tile, misuse.global + 1, true);
    if (mistake == CP_ASYNC_WITHOUT_WAIT) ptx::cp_async_16(tile, misuse.global, true);
    if (mistake == ADD_MISALIGNED) ptx::add_global(misuse.global + 1, 1, 1);
  }
  if (mistake == WAIT_FOR_NOBODY && thread >= 128) ptx::barrier_wait(barrier, 0);
  if (mistake == WAIT_FOR_NO_BYTES) ptx::barrier_wait(barrier, 0);
  if (mistake == TOO_FEW_AT_NAMED_BARRIER && thread < 128) ptx::named_barrier_sync(3, 256);
  if (mistake == NAMED_BARRIER_COUNTS_DIFFER) ptx::named_barrier_sync(1, thread < 128 ? 256 : 128);
  if (mistake == NAMED_BARRIER_TWICE && thread < 32) {
    ptx::named_barrier_arrive(1, 64);
    ptx::named_barrier_arrive(1, 64);
  }
  if (mistake == NAMED_BARRIER_ODD_COUNT) ptx::named_barrier_arrive(1, 100);
  if (mistake == NAMED_BARRIER_IN_VAIN && thread < 32) ptx::named_barrier_arrive(2, 64);
  if (mistake == LANE_MISSING && thread != 40) __syncwarp();
  if (mistake == LANES_DIFFER) {
    if (thread % 2) {
      __syncwarp();
    } else {
      __shfl_xor_sync(ALL, thread, 1);
    }
  }
  if (mistake == LANE_OUTSIDE_MASK && thread < 16) __shfl_sync(0xffffu, thread, 20);
  if (mistake == TOO_MANY_REGISTERS) ptx::take_registers<256>();

  if (mistake >= WGMMA_WITHOUT_FENCE && mistake <= WGMMA_ACCUMULATORS_WRITTEN && thread < 128) {
    if (mistake == WGMMA_OF_PART_OF_A_WARPGROUP && thread >= 96) return;
    uint32_t operand = tile;
    if (mistake == WGMMA_DESCRIPTORS_DIFFER && thread == 77) operand += 32;
    if (mistake == WGMMA_BETWEEN_PATTERNS) operand += 2 * ROW;
    uint64_t a = descriptor(operand, 16, PATTERN);
    if (mistake == WGMMA_WITHOUT_SWIZZLE) a &= ~(uint64_t{3} << 62);
    float d[8] = {};
    if (mistake != WGMMA_WITHOUT_FENCE) ptx::wgmma_fence();
    ptx::wgmma<BF16, 16, false, false>(d, a, descriptor(tile, 16, PATTERN), false);
    if (mistake != WGMMA_WITHOUT_COMMIT) ptx::wgmma_commit();
    if (mistake == WGMMA_ACCUMULATORS_WRITTEN) d[3] = 1;
    ptx::wgmma_wait<0>();
    misuse.global[thread % 64] = d[0] + d[3];
  }
}

EXPORTED misuse(int mistake, const void* tensor, float* global) {
  return message_of([=] {
    Misuse parameters;
    parameters.map =
        runtime::tensor_map(tensor, true, {64, 8, 1, 1, 1}, {128, 1024, 1024, 1024}, {64, 8, 1, 1, 1});
    parameters.global = global;
    parameters.mistake = static_cast<Mistake>(mistake);
    runtime::launch(misuse_kernel, 1, 256, SHARED, runtime::Stream{}, parameters);
  });
}

EXPORTED map_of(const void* tensor, const uint64_t (*sizes)[5], const uint64_t (*strides)[4],
                const uint32_t (*box)[5]) {
  return message_of([=] { runtime::tensor_map(tensor, true, *sizes, *strides, *box); });
}

EXPORTED launch_of(int threads, int shared_bytes) {
  return message_of([=] {
    Misuse parameters;
    std::memset(static_cast<void*>(&parameters), 0, sizeof parameters);
    parameters.mistake = static_cast<Mistake>(-1);
    runtime::launch(misuse_kernel, 1, threads, shared_bytes, runtime::Stream{}, parameters);
  });
}
