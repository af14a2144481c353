// The scheduler: runs the blocks of a launch one after another, and in a block one thread at a time,
// until the thread has to wait for another.
#pragma once

#include <algorithm>
#include <mutex>
#include <random>
#include <string>

#include "copies.h"
#include "mbarrier.h"
#include "named_barrier.h"
#include "registers.h"
#include "shared_memory.h"
#include "threads.h"
#include "warp.h"
#include "warpgroup.h"

namespace cuda_on_cpu {

// The order in which threads run, and in which (asynchronous) copies and products complete:
// 0  thread 0 first; when no thread can run, one copy completes, the oldest, or else products
// 1  the last thread first; when no thread can run, products complete, or else the newest copy
// n  at random, with this seed; some warps lag behind, copies and products complete early or late
inline int order = 0;

// A kernel and its parameters, whatever their types.
struct Kernel {
  void (*run)(const void* function, const void* parameters);
  const void *function, *parameters;
};

class Launch {
 public:
  Launch(const Kernel& kernel, int blocks, int thread_count, int shared_bytes)
      : kernel_(kernel), shared_bytes_(shared_bytes), random_(order) {
    if (blocks < 1) throw std::runtime_error("launch: expected at least 1 block");
    if (thread_count < 1 || thread_count > MAX_THREADS) {
      throw std::runtime_error("launch: expected 1 to 1024 threads, got " +
                               std::to_string(thread_count));
    }
    if (shared_bytes < 0 || shared_bytes > SharedMemory::MAX_BYTES) {
      throw std::runtime_error("launch: expected at most 232448 bytes of shared memory, got " +
                               std::to_string(shared_bytes));
    }
    gridDim = dim3(blocks);
    blockDim = dim3(thread_count);
    threads.count = thread_count;
  }

  void run() {
    for (unsigned block = 0; block < gridDim.x; ++block) {
      blockIdx = {block, 0, 0};
      begin_block();
      while (threads.alive > 0) run_some();
      end_block();
    }
  }

 private:
  void begin_block() {
    shared_memory.reset(shared_bytes_);
    mbarriers.reset();
    named_barriers.reset();
    warps.reset();
    for (int i = 0; i < MAX_THREADS / WARPGROUP; ++i) warpgroups[i].reset(i);
    copy_engine.reset();
    cp_asyncs.reset();
    registers.reset();
    static Stacks stacks;
    threads.alive = threads.count;
    threads.current = -1;
    threads.error = nullptr;
    for (int thread = 0; thread < threads.count; ++thread) {
      threads.all[thread] = {stacks.prepare(thread, thread_begins), true, false, {}};
    }
    running = &kernel_;
  }

  // Errors that a GPU would not report, but that could cause wrong results later.
  void end_block() {
    shared_memory.check_margin();
    cp_asyncs.check_all_performed();
    if (copy_engine.pending()) {
      fail("the block has ended while %d tma_loads are in flight", copy_engine.pending());
    }
    for (const Warpgroup& warpgroup : warpgroups) {
      if (warpgroup.pending()) {
        fail("the block has ended without wgmma_wait for %d products", warpgroup.pending());
      }
    }
    mbarriers.check_all_bytes_came();
    named_barriers.check_nobody_arrived_in_vain();
    registers.check();
  }

  // Runs every ready thread until it waits or returns; if none is ready, an asynchronous operation.
  void run_some() {
    if (order >= 2 && random_() % 2) complete_something();
    choose();
    if (chosen_count_ == 0 && !complete_something()) report_deadlock();
    for (int i = 0; i < chosen_count_; ++i) {
      threads.current = chosen_[i];
      threadIdx = {static_cast<unsigned>(chosen_[i]), 0, 0};
      switch_stack(&threads.scheduler, threads.all[chosen_[i]].stack_pointer);
      threads.current = -1;
      if (threads.error) std::rethrow_exception(threads.error);
    }
  }

  void choose() {
    chosen_count_ = 0;
    const bool some_warps_only = order >= 2 && random_() % 2;
    const uint32_t lagging = some_warps_only ? random_() : 0;  // a bit for each warp
    for (int i = 0; i < threads.count; ++i) {
      const int thread = order == 1 ? threads.count - 1 - i : i;
      if (threads.all[thread].ready && !(lagging >> thread / 32 & 1)) {
        chosen_[chosen_count_++] = thread;
      }
    }
    if (order >= 2) std::shuffle(chosen_, chosen_ + chosen_count_, random_);
    if (chosen_count_ == 0 && lagging) choose();
  }

  // Runs one copy, or the products that a warpgroup waits for; false if there are neither.
  bool complete_something() {
    const bool copies_first = order == 0 || (order >= 2 && random_() % 2);
    return copies_first ? complete_a_copy() || complete_products()
                        : complete_products() || complete_a_copy();
  }

  bool complete_a_copy() {
    const int pending = copy_engine.pending();
    if (pending == 0) return false;
    copy_engine.perform(order == 0 ? 0 : order == 1 ? pending - 1 : random_() % pending);
    return true;
  }

  bool complete_products() {
    constexpr int COUNT = MAX_THREADS / WARPGROUP;
    const int start = order >= 2 ? random_() % COUNT : 0;
    for (int i = 0; i < COUNT; ++i) {
      const int number = order == 1 ? COUNT - 1 - i : (start + i) % COUNT;
      if (!warpgroups[number].due()) continue;
      warpgroups[number].complete();
      return true;
    }
    return false;
  }

  // The first function on every fiber's stack. An exception can't propagate to the scheduler's stack, so
  // it is passed on explicitly.
  static void thread_begins() {
    try {
      running->run(running->function, running->parameters);
    } catch (...) {
      threads.error = std::current_exception();
    }
    Thread& self = threads.all[threads.current];
    self.ready = false;
    self.exited = true;
    --threads.alive;
    named_barriers.thread_exited();
    switch_stack(&self.stack_pointer, threads.scheduler);
    __builtin_unreachable();
  }

  [[noreturn]] static void report_deadlock() {
    std::string report = "deadlock: " + std::to_string(threads.alive) + " of " +
                         std::to_string(threads.count) + " threads wait, no copy is in flight";
    bool told[MAX_THREADS] = {};
    for (int first = 0; first < threads.count; ++first) {
      if (threads.all[first].exited || told[first]) continue;
      const Wait wait = threads.all[first].wait;
      int alike = 0;
      for (int thread = first; thread < threads.count; ++thread) {
        const Wait& other = threads.all[thread].wait;
        if (threads.all[thread].exited || other.event != wait.event || other.object != wait.object ||
            other.detail != wait.detail) {
          continue;
        }
        told[thread] = true;
        ++alike;
      }
      report += "; " + std::to_string(alike) + " (first: thread " + std::to_string(first) + ") for " +
                describe(wait);
    }
    throw std::runtime_error("block " + std::to_string(blockIdx.x) + ": " + report);
  }

  static std::string describe(const Wait& wait) {
    char text[200];
    if (wait.event == Event::mbarrier) {
      const Mbarrier& barrier = mbarriers.find_for_report(wait.object);
      snprintf(text, sizeof text, "mbarrier at 0x%x parity %u (%d of %d arrivals and %d bytes pending)",
               wait.object, wait.detail, barrier.pending_arrivals, barrier.arrivals,
               barrier.pending_bytes);
    } else if (wait.event == Event::named_barrier) {
      const NamedBarrier& barrier = named_barriers.find_for_report(static_cast<int>(wait.object));
      snprintf(text, sizeof text, "named barrier %u (%d of %u threads have arrived)", wait.object,
               barrier.arrived, wait.detail);
    } else if (wait.event == Event::lanes) {
      snprintf(text, sizeof text, "lanes of warp %u with mask 0x%08x", wait.detail, wait.object);
    } else {
      snprintf(text, sizeof text, "wgmma_wait in all threads of warpgroup %u", wait.object);
    }
    return text;
  }

  const Kernel kernel_;
  const int shared_bytes_;
  std::mt19937 random_;
  int chosen_[MAX_THREADS], chosen_count_ = 0;
  static inline const Kernel* running = nullptr;
};

// Can be called from any host thread; launches run one at a time.
inline void launch(const Kernel& kernel, int blocks, int thread_count, int shared_bytes) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Launch(kernel, blocks, thread_count, shared_bytes).run();
}

}  // namespace cuda_on_cpu
