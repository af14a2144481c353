// The shared memory of a block. It holds NaN where nothing was written, checks bounds for every 32-bit
// address, and tracks which words the asynchronous proxy (TMA, wgmma) can't see yet, and since when it
// sees the others.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "threads.h"

namespace cuda_on_cpu {

class SharedMemory {
 public:
  static constexpr int MAX_BYTES = 232448;
  static constexpr int POISON = 0xFF;  // NaN in every format

  void reset(int bytes) {
    if (!memory_) memory_ = map();
    bytes_ = bytes;
    std::memset(memory_, POISON, bytes + MARGIN);
    std::memset(writer_, 0, sizeof writer_);
    std::memset(changed_, 0, sizeof changed_);
    clock_ = 0;
    for (auto& words : unfenced_) words.clear();
  }

  unsigned char* begin() { return memory_; }

  uint32_t address(const void* pointer) const {
    const auto* byte = static_cast<const unsigned char*>(pointer);
    if (byte < memory_ || byte > memory_ + bytes_) {
      fail("shared_address of %p, which is outside of the %d bytes of shared memory", pointer, bytes_);
    }
    return WINDOW + static_cast<uint32_t>(byte - memory_);
  }

  unsigned char* at(uint32_t address, uint32_t bytes, uint32_t alignment) {
    if (address % alignment != 0) {
      fail("shared memory at 0x%x: expected a multiple of %u", address, alignment);
    }
    if (address < WINDOW || address - WINDOW + uint64_t{bytes} > static_cast<uint64_t>(bytes_)) {
      fail("shared memory at 0x%x: %u bytes are outside of the launch's %d, 0x%x to 0x%x", address,
           bytes, bytes_, WINDOW, WINDOW + bytes_);
    }
    return memory_ + (address - WINDOW);
  }

  // The address for a store or a copy of at most 16 bytes, after checking bounds and alignment.
  unsigned char* to_write(uint32_t address, uint32_t bytes) {
    unsigned char* memory = at(address, bytes, bytes);
    changed_[(address - WINDOW) / 16] = clock_;
    return memory;
  }

  void poison(uint32_t address, uint32_t bytes) {
    for (uint32_t piece = 0; piece < bytes; piece += 16) {
      std::memset(to_write(address + piece, 16), POISON, 16);
    }
  }

  // An ordinary store, invisible to the asynchronous proxy until `thread` executes its fence.
  void wrote(int thread, uint32_t address, uint32_t bytes) {
    for (uint32_t word = (address - WINDOW) / 4; word < (address - WINDOW + bytes) / 4; ++word) {
      writer_[word] = static_cast<uint16_t>(thread + 1);
      unfenced_[thread].push_back(word);
    }
  }

  void fence(int thread) {
    for (uint32_t word : unfenced_[thread]) {
      if (writer_[word] != thread + 1) continue;
      writer_[word] = 0;
      changed_[word / 4] = clock_;
    }
    unfenced_[thread].clear();
  }

  // A piece of 16 bytes, the unit in which the asynchronous proxy accesses shared memory.
  unsigned char* asynchronous_at(uint32_t address, const char* who) {
    unsigned char* bytes = at(address, 16, 16);
    const uint16_t* writers = writer_ + (address - WINDOW) / 4;
    for (int word = 0; word < 4; ++word) {
      if (writers[word]) {
        fail("%s: shared memory at 0x%x was written by thread %d without fence_async_proxy", who,
             address + 4 * word, writers[word] - 1);
      }
    }
    return bytes;
  }

  // Products read their operands at any time between wgmma and wgmma_wait. Here they are read at the
  // end; checking that the bytes did not change in between makes that equivalent to any other time.
  uint32_t product_issued() { return ++clock_; }

  const unsigned char* operand_at(uint32_t address, uint32_t issued) {
    const unsigned char* bytes = asynchronous_at(address, "wgmma");
    if (changed_[(address - WINDOW) / 16] >= issued) {
      fail("wgmma: shared memory at 0x%x was written between wgmma and wgmma_wait", address);
    }
    return bytes;
  }

  // Ordinary stores through pointers aren't checked; those just past the end are detected afterwards.
  void check_margin() const {
    for (int byte = 0; byte < MARGIN; ++byte) {
      if (memory_[bytes_ + byte] != POISON) {
        fail("something was written %d bytes after the %d bytes of shared memory", byte, bytes_);
      }
    }
  }

 private:
  // The first address, as on the GPU, where the system reserves 1024 bytes: 0 is not a valid address.
  static constexpr uint32_t WINDOW = 1024;
  static constexpr int MARGIN = 256;

  static unsigned char* map() {  // mmap aligns to pages, and so to the swizzle's 1024 bytes
    void* memory =
        mmap(nullptr, MAX_BYTES + MARGIN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<unsigned char*>(memory);
  }

  unsigned char* memory_ = nullptr;
  int bytes_ = 0;
  uint16_t writer_[MAX_BYTES / 4];  // for each word: the thread that must still fence, plus one
  std::vector<uint32_t> unfenced_[MAX_THREADS];
  uint32_t clock_ = 0;                // counts products issued
  uint32_t changed_[MAX_BYTES / 16];  // for each piece: the clock when it was written or fenced
};
inline SharedMemory shared_memory;

// Rows of 128 bytes, eight of which form a pattern: piece c of row r is at index c ^ r.
inline uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

}  // namespace cuda_on_cpu
