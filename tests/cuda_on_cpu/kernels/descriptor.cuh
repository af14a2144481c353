// Descriptors of wgmma operands with 128-byte swizzled rows, implemented independently of csrc, so that
// each can detect mistakes in the other.
#pragma once

#include <cstdint>

#include "ptx.cuh"

constexpr int ROW = 128, PATTERN = 8 * ROW;  // bytes

// Bytes between patterns: `leading` from 64 rows of an MN-major operand to the next 64, `stride`
// along the other direction.
VOCO_DEVICE uint64_t descriptor(uint32_t address, int leading, int stride) {
  return uint64_t{address >> 4} | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t{1} << 62;
}

VOCO_DEVICE uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
