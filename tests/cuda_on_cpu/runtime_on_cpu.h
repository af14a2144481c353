// csrc/runtime.cuh for the CPU, and the emulation's two settings, which every library exports.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "emulator/launch.h"
#include "ptx_on_cpu.h"

namespace cuda_on_cpu {
inline int multiprocessor_count = 2;
}

#define EMULATION_SETTING extern "C" __attribute__((visibility("default"), used)) inline void

// Sets the order of threads and copies: see `order` in emulator/launch.h.
EMULATION_SETTING emulation_order(int order) { cuda_on_cpu::order = order; }

EMULATION_SETTING emulation_multiprocessors(int count) { cuda_on_cpu::multiprocessor_count = count; }

#undef EMULATION_SETTING

namespace runtime {

using Stream = void*;

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

inline int multiprocessors() { return cuda_on_cpu::multiprocessor_count; }

inline void set_zero(void* pointer, size_t bytes, Stream) { std::memset(pointer, 0, bytes); }

template <typename Params>
void launch(void (*kernel)(Params), int blocks, int threads, int shared_bytes, Stream,
            const Params& params) {
  const auto run = [](const void* function, const void* parameters) {
    (*static_cast<void (*const*)(Params)>(function))(*static_cast<const Params*>(parameters));
  };
  cuda_on_cpu::launch({run, &kernel, &params}, blocks, threads, shared_bytes);
}

// Rejects what the driver rejects.
inline ptx::TensorMap tensor_map(const void* pointer, bool /*bf16*/, const uint64_t (&sizes)[5],
                                 const uint64_t (&strides)[4], const uint32_t (&box)[5]) {
  const auto expect = [](bool condition, const std::string& expected, uint64_t got) {
    if (condition) return;
    throw std::runtime_error("tensor_map: expected " + expected + ", got " + std::to_string(got));
  };
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  expect(address != 0 && address % 16 == 0, "an address that is a multiple of 16", address);
  expect(2 * box[0] <= 128, "rows of a box of at most 128 bytes", 2 * box[0]);
  expect(2 * box[0] % 16 == 0, "rows of a box of a multiple of 16 bytes", 2 * box[0]);
  ptx::TensorMap map = {};
  map.data = static_cast<const unsigned char*>(pointer);
  for (int i = 0; i < 5; ++i) {
    const std::string dimension = " in dimension " + std::to_string(i);
    expect(sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32, "a size of 1 to 2^32" + dimension, sizes[i]);
    expect(box[i] >= 1 && box[i] <= 256, "a box of 1 to 256 elements" + dimension, box[i]);
    map.sizes[i] = sizes[i];
    map.box[i] = box[i];
    map.strides[i] = 2;
    if (i == 0) continue;
    map.strides[i] = strides[i - 1];
    expect(map.strides[i] % 16 == 0 && map.strides[i] < uint64_t{1} << 40,
           "a stride that is a multiple of 16 and below 2^40 bytes" + dimension, map.strides[i]);
  }
  return map;
}

}  // namespace runtime
