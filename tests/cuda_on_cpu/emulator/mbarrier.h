// mbarrier: a phase completes once all arrivals and all announced bytes have arrived.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "shared_memory.h"

namespace cuda_on_cpu {

struct Mbarrier {
  uint32_t address;
  int arrivals;          // of every phase
  int pending_arrivals;  // of this phase
  int pending_bytes;     // announced and not yet copied; negative if a copy completes first
  uint32_t parity;       // of this phase
  int initialiser;
  bool visible_to_copies;
  std::vector<int> waiting;
};

class Mbarriers {
 public:
  void reset() { all_.clear(); }

  void init(uint32_t address, int arrivals) {
    if (arrivals < 1 || arrivals > MAX_ARRIVALS) {
      fail("mbarrier at 0x%x: expected 1 to %d arrivals, got %d", address, MAX_ARRIVALS, arrivals);
    }
    unsigned char* memory = shared_memory.at(address, 8, 8);
    uint64_t word;
    std::memcpy(&word, memory, sizeof word);
    if (known(word, address)) fail("mbarrier at 0x%x: initialised twice", address);
    word = TAG | all_.size();
    std::memcpy(memory, &word, sizeof word);
    all_.push_back({address, arrivals, arrivals, 0, 0, current_thread(), false, {}});
  }

  void make_visible(int thread) {
    for (Mbarrier& barrier : all_) {
      if (barrier.initialiser == thread) barrier.visible_to_copies = true;
    }
  }

  void arrive(uint32_t address) { arrive(find(address)); }

  void arrive_expect(uint32_t address, int bytes) {
    Mbarrier& barrier = find(address);
    barrier.pending_bytes += bytes;
    if (bytes < 0 || barrier.pending_bytes > MAX_PENDING_BYTES) {
      fail("mbarrier at 0x%x: expected 0 to %d bytes a phase, got %d more", address, MAX_PENDING_BYTES,
           bytes);
    }
    arrive(barrier);
  }

  void check_usable_by_copies(uint32_t address) {
    if (!find(address).visible_to_copies) {
      fail(
          "mbarrier at 0x%x: a copy uses it, and thread %d, which initialised it, has not called "
          "barrier_init_fence",
          address, find(address).initialiser);
    }
  }

  void copied(uint32_t address, int bytes) {
    Mbarrier& barrier = find(address);
    barrier.pending_bytes -= bytes;
    complete_if_due(barrier);
  }

  // Checks again once awake: a thread that slept through the next phase too has missed its own.
  void wait(uint32_t address, uint32_t parity) {
    while (find(address).parity == parity) {
      find(address).waiting.push_back(current_thread());
      wait_for(Event::mbarrier, address, parity);
    }
  }

  const Mbarrier& find_for_report(uint32_t address) { return find(address); }

  void check_all_bytes_came() const {
    for (const Mbarrier& barrier : all_) {
      if (barrier.pending_bytes != 0) {
        fail("mbarrier at 0x%x: at the end of the block, %d bytes %s", barrier.address,
             abs(barrier.pending_bytes),
             barrier.pending_bytes > 0 ? "that it was to expect have not come"
                                       : "have come that it was not to expect");
      }
    }
  }

 private:
  static constexpr int MAX_ARRIVALS = (1 << 20) - 1, MAX_PENDING_BYTES = (1 << 20) - 1;
  // A barrier's eight bytes of shared memory hold a tag and then its number, to detect overwriting.
  static constexpr uint64_t TAG = uint64_t{0x6d6261727269} << 16;

  bool known(uint64_t word, uint32_t address) const {
    const uint64_t number = word & 0xFFFF;
    return (word ^ number) == TAG && number < all_.size() && all_[number].address == address;
  }

  Mbarrier& find(uint32_t address) {
    uint64_t word;
    std::memcpy(&word, shared_memory.at(address, 8, 8), sizeof word);
    if (!known(word, address)) {
      fail("mbarrier at 0x%x: not initialised, or overwritten since", address);
    }
    return all_[word & 0xFFFF];
  }

  void arrive(Mbarrier& barrier) {
    if (barrier.pending_arrivals == 0) {
      fail(
          "mbarrier at 0x%x: more than its %d arrivals in the phase of parity %u, of which %d "
          "bytes are still to come",
          barrier.address, barrier.arrivals, barrier.parity, barrier.pending_bytes);
    }
    --barrier.pending_arrivals;
    complete_if_due(barrier);
  }

  static void complete_if_due(Mbarrier& barrier) {
    if (barrier.pending_arrivals != 0 || barrier.pending_bytes != 0) return;
    barrier.parity ^= 1;
    barrier.pending_arrivals = barrier.arrivals;
    for (int thread : barrier.waiting) wake(thread);
    barrier.waiting.clear();
  }

  std::deque<Mbarrier> all_;
};
inline Mbarriers mbarriers;

}  // namespace cuda_on_cpu
