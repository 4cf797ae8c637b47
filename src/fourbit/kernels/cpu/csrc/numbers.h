// What the kernels of one instruction set share: bit patterns, rounding of one number, packed codes and masks of one block.
// Everything has internal linkage, because each instruction set compiles it anew. Must be built with -ffp-contract=off and
// without -ffast-math: the numbers are defined bit by bit.
#pragma once

#include <cmath>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common.h"

#ifndef FOURBIT_ISA
#define FOURBIT_ISA portable
#endif
#define FOURBIT_JOIN2(a, b) a##b
#define FOURBIT_JOIN(a, b) FOURBIT_JOIN2(a, b)

namespace fourbit {

namespace FOURBIT_ISA {
float norm_forward(const NormForward* f);
float norm_backward(NormBackward* b);
}  // namespace FOURBIT_ISA

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

inline float load(const float* p) { return *p; }
inline float load(const uint16_t* p) { return as_float(static_cast<int32_t>(static_cast<uint32_t>(*p) << 16)); }

inline void store(float* p, float x) { *p = x; }
inline void store(uint16_t* p, float x) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = static_cast<uint32_t>(as_bits(x));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  *p = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}
inline void store(int8_t* p, float x) { *p = static_cast<int8_t>(static_cast<int32_t>(x)); }

inline int32_t max_of(int32_t a, int32_t b) { return a > b ? a : b; }
inline int32_t min_of(int32_t a, int32_t b) { return a < b ? a : b; }
// As torch.clamp where x is a number.
inline float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

// The largest of several magnitudes' bit patterns, thread by thread: infinity and NaN come out on top.
struct Largest {
  int32_t of[kMaxThreads] = {};
  float get(int pieces) const {
    int32_t largest = 0;
    for (int i = 0; i < pieces; ++i) largest = max_of(largest, of[i]);
    return as_float(largest);
  }
};

// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even, for |x| < 2^22.
inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// SplitMix64's output function, as fourbit.quantizers.random_words: element i takes half of pair i / 2.
inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

// The words' upper 24 bits of `count` elements from element `begin` (even) on, as floats.
inline void draw(uint64_t key, int64_t begin, int count, float* u) {
  uint32_t words[kBlock];
  const uint64_t pair = static_cast<uint64_t>(begin) / 2;
  for (int i = 0; i < kBlock / 2; ++i) {
    const uint64_t z = mix((pair + i + 1) * 0x9E3779B97F4A7C15ull + key);
    std::memcpy(words + 2 * i, &z, 8);
  }
  for (int i = 0; i < count; ++i) u[i] = static_cast<float>(static_cast<int32_t>(words[i] >> 8));
}

// 64 truth values (0 or 1) to 64 bits and back, as 0 or -1 in 32 bits each.
inline void pack_bits(const uint8_t* m, uint8_t* out) {
#if defined(__AVX512BW__)
  const __mmask64 bits = _mm512_test_epi8_mask(_mm512_loadu_si512(m), _mm512_set1_epi8(1));
  std::memcpy(out, &bits, 8);
#else
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    std::memcpy(&eight, m + 8 * i, 8);
    out[i] = static_cast<uint8_t>((eight * 0x0102040810204080ull) >> 56);
  }
#endif
}

inline void expand_bits(const uint8_t* bits, int32_t* m) {
#if defined(__AVX512DQ__)
  for (int i = 0; i < 4; ++i) {
    __mmask16 sixteen;
    std::memcpy(&sixteen, bits + 2 * i, 2);
    _mm512_storeu_si512(m + 16 * i, _mm512_movm_epi32(sixteen));
  }
#else
  for (int i = 0; i < 8; ++i)
    for (int b = 0; b < 8; ++b) m[8 * i + b] = -((bits[i] >> b) & 1);
#endif
}

// The bits of the nearest power's magnitude, 0 below the first decision point.
inline int32_t log_nearest(int32_t bits, const LogGrid& g) {
  const int32_t magnitude = bits & 0x7FFFFFFF;
  int32_t y = ((magnitude - g.start) & -g.octaves) + g.smallest;
  y = min_of(y, g.largest);
  return magnitude >= g.start ? y : 0;
}

inline float float_nearest(float s, const FloatGrid& g) {
  const float most = 2.0f * g.max;  // finite for every format whose largest magnitude is below 2^127
  const float x = clamp(s, -most, most);
  const int32_t exponent = max_of(as_bits(x) & 0x7F800000, g.lowest << 23);
  // x + m - m rounds x to multiples of the quantum 2^(exponent - mantissa_bits): m is 1.5 * 2^23 quanta.
  const float m = as_float((exponent + ((23 - g.mantissa_bits) << 23)) | 0x400000);
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

// The integers of one block, -8..7 or 0..15.
inline void unpack_block(const uint8_t* packed, int32_t is_signed, int8_t* q) {
  const int8_t flip = is_signed ? 8 : 0;  // (nibble ^ 8) - 8 extends the sign
  for (int i = 0; i < 32; ++i) {
    q[i] = static_cast<int8_t>(((packed[i] & 15) ^ flip) - flip);
    q[i + 32] = static_cast<int8_t>(((packed[i] >> 4) ^ flip) - flip);
  }
}

}  // namespace
}  // namespace fourbit
