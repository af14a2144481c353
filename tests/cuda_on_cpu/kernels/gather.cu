// A test kernel for turns and gathered rows: out = out / 2 + Q K_j^T for each tile K_j of 64 gathered
// rows, in order. One warpgroup gathers with cp.async; the two others take alternate tiles, multiply at
// the same time, and add in turns, controlled by named barriers. A wrong order gives a different result.
#include "descriptor.cuh"
#include "exported.h"
#include "ptx.cuh"
#include "runtime.cuh"

constexpr int TILE = 64 * ROW, STAGES = 2, THREADS = 384;

struct Gather {
  const unsigned char* q;     // [64, 64], bf16
  const unsigned char* keys;  // [any, 64], bf16
  const int* rows;            // [64 * tiles], of keys; -1 is a row of zeros
  float* out;                 // [64, 64]
  int tiles;
};

VOCO_DEVICE void copy_query(const Gather& gather, uint32_t query) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(gather.q);
  for (int word = threadIdx.x % 128; word < TILE / 4; word += 128) {
    ptx::store_shared(swizzled(query + 4 * word), words[word]);
  }
#ifndef FAULT_NO_FENCE_AFTER_STORE
  ptx::fence_async_proxy();
#endif
}

VOCO_DEVICE void copy_keys(const Gather& gather, uint32_t keys, uint32_t full, uint32_t empty) {
  for (int tile = 0; tile < gather.tiles; ++tile) {
    const int stage = tile % STAGES;
    ptx::barrier_wait(empty + 8 * stage, (tile / STAGES & 1) ^ 1);
    for (int piece = threadIdx.x; piece < TILE / 16; piece += 128) {
      const int row = gather.rows[64 * tile + piece / 8];
      const unsigned char* source = gather.keys + (row < 0 ? 0 : row) * ROW + piece % 8 * 16;
      ptx::cp_async_16(swizzled(keys + stage * TILE + 16 * piece), source, row >= 0);
    }
#ifndef FAULT_NO_COPY_WAIT
    ptx::cp_async_wait_all();
#endif
#ifndef FAULT_NO_FENCE_AFTER_COPY
    ptx::fence_async_proxy();
#endif
    ptx::barrier_arrive(full + 8 * stage);
  }
#ifdef FAULT_NO_COPY_WAIT
  ptx::cp_async_wait_all();
#endif
}

VOCO_DEVICE void multiply_in_turns(const Gather& gather, uint32_t query, uint32_t keys, uint32_t full,
                                   uint32_t empty) {
  const int consumer = threadIdx.x / 128 - 1, mine = 1 + consumer, other = 2 - consumer;
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  if (consumer == 1) ptx::named_barrier_arrive(other, 256);  // the first turn is the other's
  for (int tile = consumer; tile < gather.tiles; tile += 2) {
    const int stage = tile % STAGES;
    float d[32];
    ptx::barrier_wait(full + 8 * stage, tile / STAGES & 1);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
      ptx::wgmma<BF16, 64, false, false>(d, descriptor(query + 2 * k, 16, PATTERN),
                                         descriptor(keys + stage * TILE + 2 * k, 16, PATTERN), k > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin(d);
    ptx::barrier_arrive(empty + 8 * stage);
#ifndef FAULT_NO_TURNS
    ptx::named_barrier_sync(mine, 256);
#endif
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float* out = gather.out + 64 * row + column;
      *out = *out / 2 + d[i];
    }
    if (tile + 1 < gather.tiles) ptx::named_barrier_arrive(other, 256);
  }
}

__global__ void __launch_bounds__(THREADS, 1) gather_kernel(const __grid_constant__ Gather gather) {
  const uint32_t query = ptx::shared_address(ptx::dynamic_shared()), keys = query + TILE;
  const uint32_t full = keys + STAGES * TILE, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < STAGES; ++stage) {
      ptx::barrier_init(full + 8 * stage, 128);
      ptx::barrier_init(empty + 8 * stage, 128);
    }
    ptx::barrier_init_fence();
  }
  if (threadIdx.x >= 256) copy_query(gather, query);
  __syncthreads();
  if (threadIdx.x < 128) {
    copy_keys(gather, keys, full, empty);
  } else {
    multiply_in_turns(gather, query, keys, full, empty);
  }
}

EXPORTED gather(const void* q, const void* keys, const int* rows, float* out, int tiles) {
  return message_of([=] {
    const Gather parameters{static_cast<const unsigned char*>(q),
                            static_cast<const unsigned char*>(keys), rows, out, tiles};
    runtime::launch(gather_kernel, 1, THREADS, (1 + STAGES) * TILE + 16 * STAGES, runtime::Stream{},
                    parameters);
  });
}
