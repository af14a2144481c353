// wgmma: asynchronous products. They run as late as the program allows: once the warpgroup has reached
// the wgmma_wait that covers them and the scheduler has nothing else to run. Only then are operands read
// from shared memory and results written to registers; until then the accumulators hold NaN, and the
// operands must not change.
#pragma once

#include <cinttypes>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "operand.h"
#include "threads.h"

namespace cuda_on_cpu {

constexpr int WARPGROUP = 128;

// The parts of an instruction that must be the same for all threads of a warpgroup.
struct Instruction {
  bool bf16, a_in_registers, mn_major_a, mn_major_b, accumulate;
  int columns;    // N
  uint64_t a, b;  // descriptors

  bool operator==(const Instruction& other) const {
    return bf16 == other.bf16 && a_in_registers == other.a_in_registers &&
           mn_major_a == other.mn_major_a && mn_major_b == other.mn_major_b &&
           accumulate == other.accumulate && columns == other.columns && a == other.a && b == other.b;
  }
};

struct Product {
  Instruction instruction;
  uint32_t issued;  // by the first thread
  int accumulator;
  uint32_t a[WARPGROUP][4];  // as the registers were when the thread issued it

  Operand a_operand() const { return {instruction.a, instruction.mn_major_a, instruction.bf16, issued}; }
  Operand b_operand() const { return {instruction.b, instruction.mn_major_b, instruction.bf16, issued}; }
};

// An accumulator D and the products in flight on it. Row r of D is in threads of warp r / 16 (see
// ptx.cuh).
struct Accumulator {
  int columns = 0;
  int products = 0;  // in flight; 0: free
  float* registers[WARPGROUP] = {};
  alignas(32) float values[64 * 128];

  // Calls visit(register, value) for each register of D that a thread holds.
  template <typename Visit>
  void each(int thread, Visit visit) {
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (int i = 0; i < columns / 2; ++i) {
      const int r = row + i / 2 % 2 * 8, c = column + i / 4 * 8 + i % 2;
      visit(registers[thread][i], values[r * columns + c]);
    }
  }

  void take(int thread, float* from) {
    registers[thread] = from;
    each(thread, [](float& held, float& value) {
      value = held;
      held = in_flight();
    });
  }

  // Returns whether the registers still held what take left in them.
  bool give_back(int thread) {
    bool touched = false;
    each(thread, [&touched](float& held, float& value) {
      touched |= __float_as_uint(held) != __float_as_uint(in_flight());
      held = value;
    });
    registers[thread] = nullptr;
    return !touched;
  }

  // A NaN that no arithmetic produces.
  static float in_flight() { return __uint_as_float(0x7fc0f119u); }
};

using Vector = float __attribute__((vector_size(32)));

// values[64, columns] += a[64, K] b[K, columns], `columns` a multiple of 16.
__attribute__((target_clones("avx2", "default"))) inline void multiply_add(float* values, const float* a,
                                                                           const float* b, int columns) {
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < columns; column += 16) {
      Vector* d = reinterpret_cast<Vector*>(values + row * columns + column);
      Vector sum0 = d[0], sum1 = d[1];
      for (int k = 0; k < K; ++k) {
        const Vector* other = reinterpret_cast<const Vector*>(b + k * columns + column);
        sum0 += a[row * K + k] * other[0];
        sum1 += a[row * K + k] * other[1];
      }
      d[0] = sum0;
      d[1] = sum1;
    }
  }
}

class Warpgroup {
 public:
  void reset(int number) {
    first_thread_ = number * WARPGROUP;
    products_.clear();
    group_ends_.clear();
    accumulators_.clear();
    completed_products_ = completed_groups_ = waiting_ = 0;
    for (Progress& progress : progress_) progress = {};
  }

  void fence() { mine().fenced = true; }

  void issue(const Instruction& instruction, float* d, const uint32_t* a) {
    const int thread = current_thread() - first_thread_;
    if (first_thread_ + WARPGROUP > threads.count) {
      fail("wgmma: the block's %d threads end within this warpgroup", threads.count);
    }
    if (!mine().fenced) fail("wgmma without wgmma_fence since the last wgmma_wait");
    const size_t place = mine().issued++ - completed_products_;
    if (place == products_.size()) {  // the first thread of the warpgroup to get here
      Product& product = products_.emplace_back();
      product.instruction = instruction;
      product.issued = shared_memory.product_issued();
      product.accumulator = accumulator_for(thread, d, instruction.columns);
      if (!a) product.a_operand().check();
      product.b_operand().check();
    }
    Product& product = products_[place];
    if (!(product.instruction == instruction)) {
      fail(
          "wgmma: not the instruction that other threads of the warpgroup have issued here "
          "(descriptors 0x%" PRIx64 " and 0x%" PRIx64 ", theirs 0x%" PRIx64 " and 0x%" PRIx64 ")",
          instruction.a, instruction.b, product.instruction.a, product.instruction.b);
    }
    if (a) std::memcpy(product.a[thread], a, sizeof product.a[thread]);
    Accumulator& accumulator = accumulators_[product.accumulator];
    if (!accumulator.registers[thread]) accumulator.take(thread, d);
    if (accumulator.registers[thread] != d) {
      fail("wgmma: not the accumulators that other threads of the warpgroup use here");
    }
  }

  void commit() {
    const size_t place = mine().committed++ - completed_groups_;
    if (place == group_ends_.size()) group_ends_.push_back(mine().issued);
    if (group_ends_[place] != mine().issued) {
      fail("wgmma_commit after %d products, after %d in other threads of the warpgroup", mine().issued,
           group_ends_[place]);
    }
  }

  void wait(int pending_groups) {
    mine().fenced = false;
    const int groups = mine().committed - pending_groups;
    if (groups <= completed_groups_) return;
    if (waiting_ > 0 && groups != wanted_groups_) {
      fail("wgmma_wait for %d groups, where other threads of the warpgroup wait for %d", groups,
           wanted_groups_);
    }
    wanted_groups_ = groups;
    ++waiting_;
    wait_for(Event::products, first_thread_ / WARPGROUP, groups);
  }

  // Whether all threads wait.
  bool due() const { return waiting_ == WARPGROUP; }

  // Runs the products that they wait for; called by the scheduler.
  void complete() {
    const Progress& one = progress_[0];
    for (const Progress& other : progress_) {
      if (other.issued != one.issued || other.committed != one.committed) {
        fail(
            "wgmma_wait in warpgroup %d: after %d products in %d groups in some threads, after "
            "%d in %d in others",
            first_thread_ / WARPGROUP, one.issued, one.committed, other.issued, other.committed);
      }
    }
    for (; completed_groups_ < wanted_groups_; ++completed_groups_, group_ends_.pop_front()) {
      for (; completed_products_ < group_ends_.front(); ++completed_products_) {
        compute(products_.front());
        products_.pop_front();
      }
    }
    waiting_ = 0;
    for (int thread = 0; thread < WARPGROUP; ++thread) wake(first_thread_ + thread);
  }

  int pending() const { return static_cast<int>(products_.size()); }

 private:
  struct Progress {
    int issued = 0, committed = 0;  // since the block began
    bool fenced = false;            // since the last wait
  };

  Progress& mine() { return progress_[current_thread() - first_thread_]; }

  // The accumulator with products in flight on the same registers, or a free one.
  int accumulator_for(int thread, float* d, int columns) {
    size_t free = accumulators_.size();
    for (size_t i = 0; i < accumulators_.size(); ++i) {
      Accumulator& accumulator = accumulators_[i];
      if (accumulator.products == 0) {
        free = i;
      } else if (accumulator.registers[thread] == d) {
        if (accumulator.columns != columns) {
          fail("wgmma of %d columns on accumulators on which one of %d is in flight", columns,
               accumulator.columns);
        }
        ++accumulator.products;
        return static_cast<int>(i);
      }
    }
    if (free == accumulators_.size()) accumulators_.emplace_back();
    accumulators_[free].columns = columns;
    accumulators_[free].products = 1;
    return static_cast<int>(free);
  }

  void compute(const Product& product) {
    const Instruction& instruction = product.instruction;
    const int columns = instruction.columns;
    alignas(32) static float a[64 * K], b[K * 128];
    if (instruction.a_in_registers) {
      for (int thread = 0; thread < WARPGROUP; ++thread) {
        const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
        for (int i = 0; i < 8; ++i) {
          const int r = row + i / 2 % 2 * 8, c = column + i / 4 * 8 + i % 2;
          const uint16_t bits = product.a[thread][i / 2] >> i % 2 * 16;
          a[r * K + c] = instruction.bf16 ? float_from_bf16(bits) : float_from_fp16(bits);
        }
      }
    } else {
      product.a_operand().decode(64, [](int m, int k) -> float& { return a[m * K + k]; });
    }
    product.b_operand().decode(columns,
                               [columns](int n, int k) -> float& { return b[k * columns + n]; });

    Accumulator& accumulator = accumulators_[product.accumulator];
    if (!instruction.accumulate) std::memset(accumulator.values, 0, 64 * columns * sizeof(float));
    multiply_add(accumulator.values, a, b, columns);
    if (--accumulator.products > 0) return;
    for (int thread = 0; thread < WARPGROUP; ++thread) {
      if (!accumulator.give_back(thread)) {
        fail("wgmma: thread %d wrote to its accumulators while a product was in flight on them",
             first_thread_ + thread);
      }
    }
  }

  int first_thread_ = 0;
  std::deque<Product> products_;  // issued by some thread, not completed
  std::deque<int> group_ends_;    // of the groups not completed, as a number of products
  std::deque<Accumulator> accumulators_;
  int completed_products_ = 0, completed_groups_ = 0;
  int waiting_ = 0, wanted_groups_ = 0;
  Progress progress_[WARPGROUP];
};
inline Warpgroup warpgroups[MAX_THREADS / WARPGROUP];

inline Warpgroup& current_warpgroup() { return warpgroups[current_thread() / WARPGROUP]; }

}  // namespace cuda_on_cpu
