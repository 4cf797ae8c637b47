// What the kernels of one instruction set share: bit patterns, random words, and rounding to a binary float format. Everything
// has internal linkage: each translation unit compiles it for its own instruction set.
#pragma once

#include <limits>

#include "common.h"

#ifndef FOURBIT_ISA
#define FOURBIT_ISA portable
#endif

namespace fourbit {
namespace {

inline float as_float(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline int32_t as_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Sums that leave int32 where x is NaN, whose result nobody uses: they wrap.
inline int32_t wrapping_sum(int32_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}

inline float load(const float* p) { return *p; }
inline float load(const uint16_t* p) { return as_float(static_cast<int32_t>(static_cast<uint32_t>(*p) << 16)); }

inline int32_t max_of(int32_t a, int32_t b) { return a > b ? a : b; }
inline int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }
// As torch.clamp where x is a number.
inline float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// SplitMix64's output function, as fourbit.quantizers.random_words: element i takes half of pair i / 2.
// Of one number, or of a vector of them.
template <typename T>
FOURBIT_INLINE T mix(T z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

inline float float_nearest(float s, const FloatGrid& g) {
  const float most = 2.0f * g.max;  // below 2^(104 + mantissa_bits), so that m is finite
  const float x = clamp(s, -most, most);
  const int32_t exponent = max_of(as_bits(x) & 0x7F800000, g.lowest << 23);
  // x + m - m rounds x to multiples of the quantum 2^(exponent - mantissa_bits): m is 1.5 * 2^23 quanta. Unsigned, because
  // NaN makes it wrap around.
  const uint32_t quanta = static_cast<uint32_t>((23 - g.mantissa_bits) << 23) | 0x400000;
  const float m = as_float(static_cast<int32_t>(static_cast<uint32_t>(exponent) + quanta));
  float y = (x + m) - m;
  const float magnitude = as_float(as_bits(x) & 0x7FFFFFFF);
  // Between 0 and the smallest magnitude there is nothing where the format has no subnormals; a tie goes to 0.
  const float tiny = magnitude > 0.5f * g.smallest ? (x < 0.0f ? -g.smallest : g.smallest) : 0.0f;
  y = magnitude < g.smallest ? tiny : y;
  y = clamp(y, g.min, g.max);
  const float size = as_float(as_bits(s) & 0x7FFFFFFF);
  const float infinity = std::numeric_limits<float>::infinity();
  return size >= g.overflow ? (s < 0.0f ? -infinity : infinity) : y;
}

}  // namespace
}  // namespace fourbit
