// setmaxnreg: registers aren't limited here, but a block's increases and decreases must balance.
#pragma once

#include "threads.h"

namespace cuda_on_cpu {

class Registers {
 public:
  void reset() {
    const int fair_share = FILE / threads.count / 8 * 8;
    at_launch_ = fair_share < 255 ? fair_share : 255;
    for (int thread = 0; thread < threads.count; ++thread) of_[thread] = at_launch_;
  }

  void set(int count) { of_[current_thread()] = count; }

  void check() const {
    int total = 0;
    for (int thread = 0; thread < threads.count; ++thread) {
      total += of_[thread];
      if (of_[thread] != of_[thread / 128 * 128]) {
        fail("setmaxnreg: thread %d has %d registers, others of its warpgroup have %d", thread,
             of_[thread], of_[thread / 128 * 128]);
      }
    }
    if (total > at_launch_ * threads.count) {
      fail("setmaxnreg: the threads hold %d registers in the end, the block has %d", total,
           at_launch_ * threads.count);
    }
  }

 private:
  static constexpr int FILE = 65536;
  int at_launch_ = 0;
  int of_[MAX_THREADS];
};
inline Registers registers;

}  // namespace cuda_on_cpu
