// Synchronization between the warps of a CTA: a ring of slots, a queue of work items, and turns.
#pragma once

#include "ptx.cuh"

constexpr int WARPGROUP = 128;
constexpr int CONSUMERS = 2;  // warpgroups that compute; one more warpgroup copies
constexpr int THREADS = (CONSUMERS + 1) * WARPGROUP;
constexpr int GATHER_WARPS = 3;  // in the copying warpgroup, whose first warp issues TMA loads

// Registers per thread: 168 at launch, most of which the copying warpgroup gives up.
constexpr int COPY_REGISTERS = 40;
constexpr int COMPUTE_REGISTERS = 232;

// Named barriers: one for each consumer's turn, then one for each consumer's warps. 0 is __syncthreads.
constexpr int FIRST_BARRIER = 1;

// The indices of a computing thread.
struct ConsumerThread {
  const int warpgroup = threadIdx.x / WARPGROUP - 1;  // 0 or 1
  const int warp = threadIdx.x % WARPGROUP / 32;
  const int lane = threadIdx.x % 32;
  const bool elected = threadIdx.x % WARPGROUP == 0;  // arrives for its whole warpgroup

  VOCO_DEVICE int own_barrier() const { return FIRST_BARRIER + CONSUMERS + warpgroup; }
};

// A ring of slots in shared memory that are read in the order in which they are filled. All threads
// number the loads from the kernel's start, which gives each load's slot and phase. For each slot there
// are READERS arrivals once it has been read: from one thread of each consumer, or of each warp.
template <int SLOTS, int SLOT_BYTES, int READERS = CONSUMERS>
struct Ring {
  static constexpr int BYTES = SLOTS * SLOT_BYTES;
  static constexpr int BARRIER_BYTES = 2 * SLOTS * 8;

  uint32_t slots, barriers;

  VOCO_DEVICE void init() const {
    for (int i = 0; i < SLOTS; ++i) {
      ptx::barrier_init(full(i), 1);
      ptx::barrier_init(empty(i), READERS);
    }
  }
  VOCO_DEVICE uint32_t slot(int load) const { return slots + load % SLOTS * SLOT_BYTES; }
  VOCO_DEVICE uint32_t full(int load) const { return barriers + load % SLOTS * 8; }
  VOCO_DEVICE uint32_t empty(int load) const { return barriers + (SLOTS + load % SLOTS) * 8; }

  VOCO_DEVICE void wait_empty(int load) const { ptx::barrier_wait(empty(load), (load / SLOTS & 1) ^ 1); }
  VOCO_DEVICE void wait_full(int load) const { ptx::barrier_wait(full(load), load / SLOTS & 1); }
  // Called once all threads for which the elected thread arrives have read the slot.
  VOCO_DEVICE void release(int load, bool elected) const {
    if (elected) ptx::barrier_arrive(empty(load));
  }
  // Skips two loads. A consumer that doesn't use them must still wait for them, since its arrival counts
  // for their phase. Its warps synchronize before it arrives, as they do in a product; otherwise a slow
  // warp could find the barrier a phase ahead.
  VOCO_DEVICE void skip(int first, int second, const ConsumerThread& me) const {
    wait_full(first);
    wait_full(second);
    ptx::named_barrier_sync(me.own_barrier(), WARPGROUP);
    release(first, me.elected);
    release(second, me.elected);
  }
};

// One or two buffers for operands that are loaded once per item and released by each warp on its own.
// `fill` is the number of an item among those that have such operands.
template <int PLACES = 1>
struct Resident {
  static constexpr int BARRIER_BYTES = 16 * PLACES;

  uint32_t barriers;

  VOCO_DEVICE void init(int arrivals = 1) const {
    for (int i = 0; i < PLACES; ++i) {
      ptx::barrier_init(full(i), arrivals);
      ptx::barrier_init(empty(i), CONSUMERS * 4);
    }
  }
  VOCO_DEVICE uint32_t full(int fill) const { return barriers + fill % PLACES * 8; }
  VOCO_DEVICE uint32_t empty(int fill) const { return barriers + (PLACES + fill % PLACES) * 8; }
  VOCO_DEVICE void wait_empty(int fill) const {
    ptx::barrier_wait(empty(fill), (fill / PLACES & 1) ^ 1);
  }
  VOCO_DEVICE void wait_full(int fill) const { ptx::barrier_wait(full(fill), fill / PLACES & 1); }
  // Called by every warp of the consumers.
  VOCO_DEVICE void release(int fill, int lane) const {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(empty(fill));
  }
};

// The work items of this CTA, decoded. One thread draws them from a counter in global memory, so that
// CTAs with short items take more of them. All warps read them here, which saves registers.
template <typename Entry>
struct WorkQueue {
  static constexpr int DEPTH = 4;
  static constexpr int READERS = CONSUMERS * 4;  // warps
  static constexpr int BARRIER_BYTES = DEPTH * 2 * 8;
  static constexpr int BYTES = BARRIER_BYTES + DEPTH * sizeof(Entry);

  uint32_t barriers;
  Entry* entries;  // [DEPTH], shared memory

  VOCO_DEVICE void init() const {
    for (int i = 0; i < DEPTH; ++i) {
      ptx::barrier_init(full(i), 1);
      ptx::barrier_init(empty(i), READERS);
    }
  }
  VOCO_DEVICE uint32_t full(int i) const { return barriers + i % DEPTH * 8; }
  VOCO_DEVICE uint32_t empty(int i) const { return barriers + (DEPTH + i % DEPTH) * 8; }

  // The number of this CTA's i-th item; if it is not below the number of items, there are no more.
  // It is drawn before the previous item is copied, to hide the latency of the counter.
  VOCO_DEVICE static int draw(int i, int* next_item) {
    return i == 0 ? blockIdx.x : gridDim.x + atomicAdd(next_item, 1);
  }
  // The publisher may read the returned entry until it has issued the last of the item's loads.
  VOCO_DEVICE const Entry& publish(int i, const Entry& entry) const {
    ptx::barrier_wait(empty(i), (i / DEPTH & 1) ^ 1);
    entries[i % DEPTH] = entry;
    ptx::barrier_arrive(full(i));
    return entries[i % DEPTH];
  }
  // The result is valid until all lanes of the warp call release.
  VOCO_DEVICE const Entry& read(int i) const {
    ptx::barrier_wait(full(i), i / DEPTH & 1);
    return entries[i % DEPTH];
  }
  VOCO_DEVICE void release(int i, int lane) const {
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(empty(i));
  }
};

// The two consumers take turns in issuing products: while one uses the tensor cores, the other computes
// its softmax. Both take the same number of turns per item, so that they always alternate.
struct Turns {
  int warpgroup;

  VOCO_DEVICE void open() const {
    if (warpgroup == 1) pass();
  }
  VOCO_DEVICE void take() const {
    ptx::named_barrier_sync(FIRST_BARRIER + warpgroup, CONSUMERS * WARPGROUP);
  }
  VOCO_DEVICE void pass() const {
    ptx::named_barrier_arrive(FIRST_BARRIER + 1 - warpgroup, CONSUMERS * WARPGROUP);
  }
  VOCO_DEVICE void forgo() const {
    take();
    pass();
  }
  // Takes the turn that the other consumer passed at the end.
  VOCO_DEVICE void close() const {
    if (warpgroup == 0) take();
  }
};
