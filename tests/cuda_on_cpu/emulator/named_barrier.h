// The sixteen barriers of a block: barrier 0 for __syncthreads, and the named barriers.
#pragma once

#include <bitset>
#include <vector>

#include "threads.h"

namespace cuda_on_cpu {

struct NamedBarrier {
  int expected = 0;  // threads, set by the first to arrive; 0 before that
  int arrived = 0;
  std::bitset<MAX_THREADS> who;
  std::vector<int> waiting;
};

class NamedBarriers {
 public:
  void reset() {
    for (NamedBarrier& barrier : all_) barrier = {};
  }

  void sync(int id, int expected) {
    if (!arrive(named(id), id, expected)) {
      all_[id].waiting.push_back(current_thread());
      wait_for(Event::named_barrier, id, expected);
    }
  }

  void arrive(int id, int expected) { arrive(named(id), id, expected); }

  // __syncthreads, which doesn't wait for threads that have returned.
  void sync_block() {
    all_[0].expected = threads.count;
    ++all_[0].arrived;
    all_[0].waiting.push_back(current_thread());
    if (all_[0].arrived == threads.alive) {
      release(all_[0]);
    } else {
      wait_for(Event::named_barrier, 0, threads.count);
    }
  }

  void thread_exited() {
    if (all_[0].arrived > 0 && all_[0].arrived == threads.alive) release(all_[0]);
  }

  const NamedBarrier& find_for_report(int id) const { return all_[id]; }

  void check_nobody_arrived_in_vain() const {
    for (int id = 1; id < 16; ++id) {
      if (all_[id].arrived > 0) {
        fail("named barrier %d: at the end of the block, %d of %d threads have arrived", id,
             all_[id].arrived, all_[id].expected);
      }
    }
  }

 private:
  NamedBarrier& named(int id) {
    if (id < 1 || id > 15) fail("named barrier %d: expected 1 to 15", id);
    return all_[id];
  }

  // Returns whether that completes the barrier.
  bool arrive(NamedBarrier& barrier, int id, int expected) {
    if (expected < 32 || expected % 32 != 0 || expected > threads.count) {
      fail("named barrier %d: expected a multiple of 32 and at most the block's %d threads, got %d", id,
           threads.count, expected);
    }
    if (barrier.arrived > 0 && barrier.expected != expected) {
      fail("named barrier %d: for %d threads here, for %d where others have arrived", id, expected,
           barrier.expected);
    }
    if (barrier.who[current_thread()]) {
      fail("named barrier %d: arrived twice before the %d threads had met", id, expected);
    }
    barrier.expected = expected;
    barrier.who.set(current_thread());
    if (++barrier.arrived < expected) return false;
    release(barrier);
    return true;
  }

  static void release(NamedBarrier& barrier) {
    for (int thread : barrier.waiting) {
      if (thread != current_thread()) wake(thread);
    }
    barrier.waiting.clear();
    barrier.who.reset();
    barrier.arrived = barrier.expected = 0;
  }

  NamedBarrier all_[16];
};
inline NamedBarriers named_barriers;

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::named_barriers.sync_block(); }
