// Conversions of bfloat16, float16 and float8_e4m3fn bits, rounding to nearest even. Decoding is
// branch-free, so that it vectorizes for wgmma operands.
#pragma once

#include <cstdint>

#include "cuda_language.h"

namespace cuda_on_cpu {

inline uint16_t bf16_from_float(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN, in the chip's canonical form
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float float_from_bf16(uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); }

inline uint16_t fp16_from_float(float value) {
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= __float_as_uint(65520.0f)) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < __float_as_uint(0x1p-14f)) {
    // Subnormal: floats near 0.5 have the same spacing as these, so the sum rounds correctly.
    const float sum = 0.5f + __uint_as_float(magnitude);
    return static_cast<uint16_t>(sign | (__float_as_uint(sum) - __float_as_uint(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | (rounded - (uint32_t{127 - 15} << 23)) >> 13);
}

inline float float_from_fp16(uint16_t bits) {
  // Shifted into place, the exponent is 127 - 15 too small. A multiplication corrects that, also for
  // subnormals, but not for infinity and NaN.
  const uint32_t shifted = (bits & 0x7fffu) << 13;
  const uint32_t magnitude = __float_as_uint(__uint_as_float(shifted) * 0x1p112f);
  const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
  return __uint_as_float(magnitude | special | (bits & 0x8000u) << 16);
}

// There is no infinity; if all bits except the sign are set, it is NaN.
inline float float_from_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const float magnitude = exponent == 0 ? fraction * 0x1p-9f : ldexpf(8 + fraction, exponent - 10);
  return copysignf((bits & 127) == 127 ? NAN : magnitude, bits & 128 ? -1.0f : 1.0f);
}

}  // namespace cuda_on_cpu
