// A matrix operand of wgmma in shared memory: its descriptor, and its elements as floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "half.h"
#include "shared_memory.h"

namespace cuda_on_cpu {

constexpr int K = 16;  // the depth of one product of 16-bit elements

struct Operand {
  uint64_t descriptor;
  bool mn_major, bf16;
  uint32_t issued;  // time of issue, by shared memory's clock

  uint32_t start() const { return (descriptor & 0x3fff) << 4; }
  uint32_t leading_offset() const { return (descriptor >> 16 & 0x3fff) << 4; }
  uint32_t stride_offset() const { return (descriptor >> 32 & 0x3fff) << 4; }

  void check() const {
    if (descriptor >> 62 != 1) {
      fail("wgmma: expected swizzle mode 1 (128 bytes) in the descriptor, got %d",
           static_cast<int>(descriptor >> 62));
    }
    // Rows are swizzled by their address alone, which is correct only if the pattern starts at a
    // multiple of 1024; the base offset (bits 49 to 51), for patterns that don't, is not supported.
    if ((descriptor >> 49 & 7) != 0 || start() >> 7 != start() >> 10 << 3) {
      fail("wgmma: operand at 0x%x: expected it to start in the first row of a swizzle pattern",
           start());
    }
  }

  // The eight contiguous elements at `address` before swizzling.
  void load(uint32_t address, float (&elements)[8]) const {
    uint16_t bits[8];
    std::memcpy(bits, shared_memory.operand_at(swizzle_128(address), issued), sizeof bits);
    for (int i = 0; i < 8; ++i) {
      elements[i] = bf16 ? float_from_bf16(bits[i]) : float_from_fp16(bits[i]);
    }
  }

  // element(mn, k) gives the place of each of the `rows` x 16 elements.
  template <typename Element>
  void decode(int rows, Element element) const {
    float loaded[8];
    if (mn_major) {  // a pattern is 64 rows by 8 columns
      for (int k = 0; k < K; ++k) {
        for (int mn = 0; mn < rows; mn += 8) {
          load(
              start() + mn / 64 * leading_offset() + k / 8 * stride_offset() + k % 8 * 128 + mn % 64 * 2,
              loaded);
          for (int i = 0; i < 8; ++i) element(mn + i, k) = loaded[i];
        }
      }
    } else {  // a pattern is 8 rows by 64 columns
      for (int mn = 0; mn < rows; ++mn) {
        for (int k = 0; k < K; k += 8) {
          load(start() + mn / 8 * stride_offset() + mn % 8 * 128 + k * 2, loaded);
          for (int i = 0; i < 8; ++i) element(mn, k + i) = loaded[i];
        }
      }
    }
  }
};

}  // namespace cuda_on_cpu
