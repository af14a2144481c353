// A test kernel for exchanges between lanes, atomic additions and rounding. Each thread writes one word
// for each of ten answers.
#include "exported.h"
#include "ptx.cuh"
#include "runtime.cuh"

constexpr unsigned ALL = 0xffffffffu;
constexpr int THREADS = 96;

struct Lanes {
  int* answers;      // [10, THREADS]
  int* int_sum;      // of threadIdx.x over all threads
  unsigned* ticket;  // counts threads
  float* float_sum;  // [3], two of them added to as a pair
};

__global__ void lanes_kernel(const Lanes lanes) {
  const int thread = threadIdx.x, lane = thread % 32;
  int question = 0;
  const auto answer = [&](int value) { lanes.answers[question++ * THREADS + thread] = value; };
  answer(__shfl_sync(ALL, thread, 5));
  answer(__shfl_sync(ALL, thread, lane + 1, 8));
  answer(__shfl_xor_sync(ALL, thread, 3));
  answer(__shfl_up_sync(ALL, thread, 2, 16));
  answer(__shfl_down_sync(ALL, thread, 2, 16));
  answer(static_cast<int>(__shfl_xor_sync(ALL, 0.5f * thread, 16) * 2));
  answer(__ballot_sync(ALL, lane % 3 == 0));
  answer(__any_sync(ALL, thread == 40));
  answer(__all_sync(ALL, thread >= 32));
  // Halves of a warp, each on its own.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = lane;
  for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(half, sum, distance);
  __syncwarp(half);
  answer(sum);

  atomicAdd(lanes.int_sum, thread);
  atomicAdd(lanes.ticket, 1u);
  atomicAdd(lanes.float_sum + 2, 0.5f);
  ptx::add_global(lanes.float_sum, 1.0f, 2.0f);
}

EXPORTED lanes(int* answers, int* int_sum, unsigned* ticket, float* float_sum) {
  return message_of([=] {
    runtime::set_zero(float_sum, 3 * sizeof(float), runtime::Stream{});
    runtime::launch(lanes_kernel, 1, THREADS, 0, runtime::Stream{},
                    Lanes{answers, int_sum, ticket, float_sum});
  });
}

struct Numbers {
  const float2* pairs;  // [count]
  uint32_t* packed;     // [count]
  float2* unpacked;     // [count], of packed
  float2* powers;       // [count], exp2 and log2 of a pair
  int count;
  bool bf16;
};

__global__ void numbers_kernel(const Numbers numbers) {
  const int stride = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < numbers.count; i += stride) {
    const float2 pair = numbers.pairs[i];
    const uint32_t packed =
        numbers.bf16 ? ptx::pack<BF16>(pair.x, pair.y) : ptx::pack<FP16>(pair.x, pair.y);
    numbers.packed[i] = packed;
    numbers.unpacked[i] = numbers.bf16 ? ptx::unpack<BF16>(packed) : ptx::unpack<FP16>(packed);
    numbers.powers[i] = {ptx::exp2(pair.x), ptx::log2(pair.y)};
  }
}

EXPORTED numbers(bool bf16, const void* pairs, void* packed, void* unpacked, void* powers, int count) {
  return message_of([=] {
    runtime::launch(numbers_kernel, runtime::multiprocessors(), 256, 0, runtime::Stream{},
                    Numbers{static_cast<const float2*>(pairs), static_cast<uint32_t*>(packed),
                            static_cast<float2*>(unpacked), static_cast<float2*>(powers), count, bf16});
  });
}
