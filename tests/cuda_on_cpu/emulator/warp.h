// Collective operations of a warp's lanes: shuffles, votes, __syncwarp and ldmatrix. The last lane to
// arrive computes every lane's result, so no lane can see what another posts for the next operation.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "shared_memory.h"

namespace cuda_on_cpu {

constexpr uint32_t ALL_LANES = 0xffffffffu;

struct Posted {
  uint64_t value = 0;
  int source = 0;  // of a shuffle
  uint32_t result[4] = {};
};

struct Meeting {
  const char* what;  // the instruction, the same for all lanes
  uint32_t mask, arrived;
};

class Warps {
 public:
  void reset() {
    for (auto& meetings : meetings_) meetings.clear();
  }

  Posted& posted(int thread) { return posted_[thread]; }

  // Waits for the other lanes of the mask; the last of them calls complete(number of lane 0's thread).
  template <typename Complete>
  void meet(const char* what, uint32_t mask, Complete complete) {
    const int warp = current_warp();
    if (!(mask >> current_lane() & 1)) fail("%s: not in its own mask 0x%08x", what, mask);
    std::vector<Meeting>& meetings = meetings_[warp];
    size_t place = 0;
    while (place < meetings.size() && !(meetings[place].mask & mask)) ++place;
    if (place == meetings.size()) meetings.push_back({what, mask, 0});
    Meeting& meeting = meetings[place];
    if (meeting.mask != mask || std::strcmp(meeting.what, what) != 0) {
      fail("%s with mask 0x%08x, where other lanes wait in %s with mask 0x%08x", what, mask,
           meeting.what, meeting.mask);
    }
    meeting.arrived |= 1u << current_lane();
    if (meeting.arrived != mask) {
      wait_for(Event::lanes, mask, warp);
      return;
    }
    meetings.erase(meetings.begin() + place);
    complete(32 * warp);
    for (int lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) && lane != current_lane()) wake(32 * warp + lane);
    }
  }

  template <typename T>
  T shuffle(const char* what, uint32_t mask, T value, int source) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "expected at most 8 bytes");
    Posted& mine = posted_[current_thread()];
    std::memcpy(&mine.value, &value, sizeof value);
    mine.source = source;
    meet(what, mask, [this, what, mask](int first) {
      for (int lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const int source = posted_[first + lane].source;
        if (!(mask >> source & 1)) fail("%s: from lane %d, which is not in the mask", what, source);
        std::memcpy(posted_[first + lane].result, &posted_[first + source].value, 8);
      }
    });
    std::memcpy(&value, mine.result, sizeof value);
    return value;
  }

  uint32_t ballot(const char* what, uint32_t mask, bool predicate) {
    Posted& mine = posted_[current_thread()];
    mine.value = predicate;
    meet(what, mask, [this, mask](int first) {
      uint32_t votes = 0;
      for (int lane = 0; lane < 32; ++lane) {
        if ((mask >> lane & 1) && posted_[first + lane].value) votes |= 1u << lane;
      }
      for (int lane = 0; lane < 32; ++lane) posted_[first + lane].result[0] = votes;
    });
    return mine.result[0];
  }

  // Lane i receives columns 2 * (i % 4) + {0, 1} of row i / 4 of each of the four matrices.
  void load_matrices(uint32_t (&registers)[4], uint32_t row_address) {
    Posted& mine = posted_[current_thread()];
    mine.value = row_address;
    meet("ldmatrix", ALL_LANES, [this](int first) {
      for (int row = 0; row < 32; ++row) {
        const auto address = static_cast<uint32_t>(posted_[first + row].value);
        const unsigned char* bytes = shared_memory.at(address, 16, 16);
        for (int pair = 0; pair < 4; ++pair) {
          std::memcpy(&posted_[first + row % 8 * 4 + pair].result[row / 8], bytes + 4 * pair, 4);
        }
      }
    });
    std::memcpy(registers, mine.result, sizeof mine.result);
  }

 private:
  std::vector<Meeting> meetings_[MAX_THREADS / 32];  // several if masks are disjoint
  Posted posted_[MAX_THREADS];
};
inline Warps warps;

}  // namespace cuda_on_cpu

inline void __syncwarp(unsigned mask = cuda_on_cpu::ALL_LANES) {
  cuda_on_cpu::warps.meet("__syncwarp", mask, [](int) {});
}

// Shuffles stay within groups of `width` lanes; a lane whose source is outside keeps its own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int group = cuda_on_cpu::current_lane() & ~(width - 1);
  return cuda_on_cpu::warps.shuffle("__shfl_sync", mask, value, group | (source & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = cuda_on_cpu::current_lane(), source = lane ^ lanes;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return cuda_on_cpu::warps.shuffle("__shfl_xor_sync", mask, value, inside ? source : lane);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = cuda_on_cpu::current_lane(), source = lane - static_cast<int>(distance);
  const bool inside = source >= (lane & ~(width - 1));
  return cuda_on_cpu::warps.shuffle("__shfl_up_sync", mask, value, inside ? source : lane);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = cuda_on_cpu::current_lane(), source = lane + static_cast<int>(distance);
  const bool inside = source < (lane & ~(width - 1)) + width;
  return cuda_on_cpu::warps.shuffle("__shfl_down_sync", mask, value, inside ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_on_cpu::warps.ballot("__ballot_sync", mask, predicate != 0);
}

inline int __any_sync(unsigned mask, int predicate) {
  return cuda_on_cpu::warps.ballot("__any_sync", mask, predicate != 0) != 0;
}

inline int __all_sync(unsigned mask, int predicate) {
  return cuda_on_cpu::warps.ballot("__all_sync", mask, predicate != 0) == mask;
}
