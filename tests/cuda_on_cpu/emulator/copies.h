// Asynchronous copies. TMA copies are performed by a copy engine, which the scheduler runs only after
// the issuing thread has continued; cp.async copies are performed when their thread waits for them.
// Until then the destination holds poison.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "mbarrier.h"
#include "shared_memory.h"

namespace cuda_on_cpu {

// A tensor of 16-bit elements and the box in which it is copied; as large as a CUtensorMap.
struct alignas(64) TensorMap {
  const unsigned char* data;
  uint64_t sizes[5], strides[5];  // strides in bytes, including the innermost dimension's
  uint32_t box[5];
};
static_assert(sizeof(TensorMap) == 128, "expected the size of a CUtensorMap");

struct Copy {
  TensorMap map;  // by value: the thread's own parameters may be gone before the engine runs
  uint32_t destination, barrier;
  int64_t corner[5];

  int bytes() const { return 2 * map.box[0] * map.box[1] * map.box[2] * map.box[3] * map.box[4]; }
};

class CopyEngine {
 public:
  void reset() { pending_.clear(); }

  void issue(uint32_t destination, const TensorMap* map, uint32_t barrier, const int (&corner)[5]) {
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("tma_load: expected a map at 64 bytes");
    if (destination % 1024 != 0) {
      fail("tma_load to 0x%x: the swizzle needs a multiple of 1024", destination);
    }
    mbarriers.check_usable_by_copies(barrier);
    Copy copy{*map, destination, barrier, {}};
    for (int dimension = 0; dimension < 5; ++dimension) copy.corner[dimension] = corner[dimension];
    for (int byte = 0; byte < copy.bytes(); byte += 16) {
      shared_memory.asynchronous_at(destination + byte, "tma_load");
    }
    shared_memory.poison(destination, copy.bytes());
    pending_.push_back(copy);
  }

  int pending() const { return static_cast<int>(pending_.size()); }

  void perform(int number) {
    const Copy copy = pending_[number];
    pending_.erase(pending_.begin() + number);
    const uint32_t (&box)[5] = copy.map.box;
    uint32_t row = copy.destination;
    for (uint32_t i4 = 0; i4 < box[4]; ++i4) {
      for (uint32_t i3 = 0; i3 < box[3]; ++i3) {
        for (uint32_t i2 = 0; i2 < box[2]; ++i2) {
          for (uint32_t i1 = 0; i1 < box[1]; ++i1, row += 2 * box[0]) {
            copy_row(copy, row,
                     {copy.corner[0], copy.corner[1] + i1, copy.corner[2] + i2, copy.corner[3] + i3,
                      copy.corner[4] + i4});
          }
        }
      }
    }
    mbarriers.copied(copy.barrier, copy.bytes());
  }

 private:
  struct Position {
    int64_t x[5];
  };

  static void copy_row(const Copy& copy, uint32_t row, const Position& start) {
    const TensorMap& map = copy.map;
    bool inside = true;
    const unsigned char* source = map.data;
    for (int dimension = 1; dimension < 5; ++dimension) {
      const int64_t x = start.x[dimension];
      inside = inside && x >= 0 && x < static_cast<int64_t>(map.sizes[dimension]);
      source += x * static_cast<int64_t>(map.strides[dimension]);
    }
    for (uint32_t i = 0; i < map.box[0]; i += 8) {
      unsigned char* piece = shared_memory.to_write(swizzle_128(row + 2 * i), 16);
      const int64_t first = start.x[0] + i, size = static_cast<int64_t>(map.sizes[0]);
      const int64_t begin = std::clamp<int64_t>(first, 0, size);
      const int64_t end = std::clamp<int64_t>(first + 8, 0, size);
      std::memset(piece, 0, 16);
      if (inside) std::memcpy(piece + 2 * (begin - first), source + 2 * begin, 2 * (end - begin));
    }
  }

  std::deque<Copy> pending_;
};
inline CopyEngine copy_engine;

struct CpAsync {
  uint32_t destination;
  const void* source;  // null: zeros
};

class CpAsyncs {
 public:
  void reset() {
    for (auto& copies : pending_) copies.clear();
  }

  void issue(uint32_t destination, const void* source) {
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0) {
      fail("cp_async_16 from %p: expected a multiple of 16", source);
    }
    shared_memory.poison(destination, 16);
    pending_[current_thread()].push_back({destination, source});
  }

  // These are ordinary stores, which the asynchronous proxy doesn't see without a fence.
  void perform_all() {
    const int thread = current_thread();
    for (const CpAsync& copy : pending_[thread]) {
      unsigned char* destination = shared_memory.to_write(copy.destination, 16);
      if (copy.source) {
        std::memcpy(destination, copy.source, 16);
      } else {
        std::memset(destination, 0, 16);
      }
      shared_memory.wrote(thread, copy.destination, 16);
    }
    pending_[thread].clear();
  }

  void check_all_performed() const {
    for (int thread = 0; thread < MAX_THREADS; ++thread) {
      if (!pending_[thread].empty()) {
        fail("thread %d returned without cp_async_wait_all: %zu copies are pending", thread,
             pending_[thread].size());
      }
    }
  }

 private:
  std::vector<CpAsync> pending_[MAX_THREADS];
};
inline CpAsyncs cp_asyncs;

}  // namespace cuda_on_cpu
