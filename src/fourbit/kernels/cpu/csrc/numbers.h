// What the kernels of one instruction set share: bit patterns, rounding of one number, packed codes and masks of one block.
// Everything has internal linkage, because each instruction set compiles it anew. Must be built with -ffp-contract=off and
// without -ffast-math: the numbers are defined bit by bit.
#pragma once

#include <cmath>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "rounding.h"

#define FOURBIT_JOIN2(a, b) a##b
#define FOURBIT_JOIN(a, b) FOURBIT_JOIN2(a, b)

// A block is a function of its own, with its number of elements as a constant, and its parts are inlined into it: anything
// else was vectorised badly.
#define FOURBIT_BLOCK __attribute__((noinline))
#define FOURBIT_INLINE inline __attribute__((always_inline))

namespace fourbit {

namespace FOURBIT_ISA {
void norm_statistics(const NormStatistics* s);
float norm_apply(const NormApply* a);
float norm_backward(NormBackward* b);
void lstm_forward(const LstmForward* task);
void lstm_backward(const LstmBackward* task);
}  // namespace FOURBIT_ISA

namespace {

inline float load(const float* p) { return *p; }
inline float load(const uint16_t* p) { return as_float(static_cast<int32_t>(static_cast<uint32_t>(*p) << 16)); }

inline void store(float* p, float x) { *p = x; }
inline void store(uint16_t* p, float x) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = static_cast<uint32_t>(as_bits(x));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  *p = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}
inline void store(int8_t* p, float x) { *p = static_cast<int8_t>(static_cast<int32_t>(x == x ? x : 0.0f)); }

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

// 64 truth values are the bits of one integer, element 0 lowest, as in memory.
enum Comparison { kLess, kLessEqual, kGreater, kGreaterEqual };

template <Comparison op>
inline uint64_t compare(const float* x, float bound) {
#if defined(__AVX512F__)
  constexpr int how = op == kLess ? _CMP_LT_OQ : op == kLessEqual ? _CMP_LE_OQ : op == kGreater ? _CMP_GT_OQ : _CMP_GE_OQ;
  uint64_t bits = 0;
  for (int i = 0; i < 4; ++i)
    bits |= static_cast<uint64_t>(_mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16 * i), _mm512_set1_ps(bound), how)) << (16 * i);
  return bits;
#else
  int32_t m[kBlock];
  for (int j = 0; j < kBlock; ++j)
    m[j] = -static_cast<int32_t>(op == kLess ? x[j] < bound : op == kLessEqual ? x[j] <= bound
                                 : op == kGreater ? x[j] > bound : x[j] >= bound);
  uint64_t bits = 0;
#if defined(__AVX2__)
  for (int i = 0; i < 8; ++i) {
    const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(m + 8 * i));
    bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(eight)))) << (8 * i);
  }
#else
  for (int j = 0; j < kBlock; ++j) bits |= static_cast<uint64_t>(m[j] & 1) << j;
#endif
  return bits;
#endif
}

// Where a number lies inside a clip range (rules of Clip).
inline uint64_t inside_range(const float* t, int32_t rule, float bound) {
  if (rule == 1) return compare<kGreaterEqual>(t, 0.0f) & compare<kLess>(t, bound);
  if (rule == 2) return compare<kGreater>(t, -bound) & compare<kLess>(t, bound);
  return compare<kGreaterEqual>(t, -bound) & compare<kLessEqual>(t, bound);
}

inline uint64_t first_bits(int count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

inline uint64_t load_bits(const uint8_t* p) {
  uint64_t bits;
  std::memcpy(&bits, p, 8);
  return bits;
}

inline void store_bits(uint8_t* p, uint64_t bits) { std::memcpy(p, &bits, 8); }

// Zero where the bit is not set.
FOURBIT_INLINE void keep(float* x, uint64_t bits) {
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i)
    _mm512_storeu_ps(x + 16 * i, _mm512_maskz_loadu_ps(static_cast<__mmask16>(bits >> (16 * i)), x + 16 * i));
#else
  for (int j = 0; j < kBlock; ++j) x[j] = as_float(as_bits(x[j]) & -static_cast<int32_t>((bits >> j) & 1));
#endif
}

// Raises 16 running maxima of magnitudes, as bit patterns.
FOURBIT_INLINE void raise_magnitudes(const float* x, int32_t* top) {
  for (int j = 0; j < 16; ++j) {
    const int32_t a = max_of(as_bits(x[j]) & 0x7FFFFFFF, as_bits(x[j + 16]) & 0x7FFFFFFF);
    const int32_t b = max_of(as_bits(x[j + 32]) & 0x7FFFFFFF, as_bits(x[j + 48]) & 0x7FFFFFFF);
    top[j] = max_of(top[j], max_of(a, b));
  }
}

inline int32_t largest_of(const int32_t* top) {
  int32_t largest = 0;
  for (int j = 0; j < 16; ++j) largest = max_of(largest, top[j]);
  return largest;
}

// The integers nearest to inv * t within [low, high], as int8 codes; NaN becomes low.
FOURBIT_INLINE void clip_codes(const float* t, float inv, float low, float high, int8_t* q) {
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
    __m512 y = _mm512_mul_ps(_mm512_loadu_ps(t + 16 * i), _mm512_set1_ps(inv));
    y = _mm512_min_ps(_mm512_max_ps(y, _mm512_set1_ps(low)), _mm512_set1_ps(high));
    const __m512i n = _mm512_cvt_roundps_epi32(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * i), _mm512_cvtepi32_epi8(n));
  }
#else
  int32_t n[kBlock];
  for (int j = 0; j < kBlock; ++j) {
    float y = t[j] * inv;
    y = y > low ? y : low;
    y = y < high ? y : high;
    n[j] = static_cast<int32_t>(round_even(y));
  }
  for (int j = 0; j < kBlock; ++j) q[j] = static_cast<int8_t>(n[j]);
#endif
}

inline void pack_codes(const int8_t* q, uint8_t* out) {
  for (int i = 0; i < 32; ++i) out[i] = static_cast<uint8_t>((q[i] & 15) | (static_cast<uint8_t>(q[i + 32]) << 4));
}

// The bits of the nearest power's magnitude, 0 below the first decision point.
inline int32_t log_nearest(int32_t bits, const LogGrid& g) {
  const int32_t magnitude = bits & 0x7FFFFFFF;
  const int32_t y = min_of(wrapping_sum((magnitude - g.start) & -g.octaves, g.smallest), g.largest);
  return magnitude >= g.start ? y : 0;
}

// The integers of one block, -8..7 or 0..15.
inline void unpack_block(const uint8_t* packed, int32_t is_signed, int8_t* q) {
  const int8_t flip = is_signed ? 8 : 0;  // (nibble ^ 8) - 8 extends the sign
  for (int i = 0; i < 32; ++i) {
    q[i] = static_cast<int8_t>(((packed[i] & 15) ^ flip) - flip);
    q[i + 32] = static_cast<int8_t>(((packed[i] >> 4) ^ flip) - flip);
  }
}

// A 16-bit float without subnormals: sign, then float32's exponent and mantissa less the lowest exponent; 0 is zero.
struct Half {
  int32_t shift, bias, half_smallest, largest;  // of codes; half_smallest and largest: of float32 patterns and of codes
  explicit Half(const FloatGrid& g)
      : shift(23 - g.mantissa_bits),
        bias(g.lowest << g.mantissa_bits),
        half_smallest(as_bits(0.5f * g.smallest)),
        largest((as_bits(g.max) >> shift) - bias) {}
};

// Codes of the nearest numbers to scale * x, ties to even, saturating: as float_nearest for numbers and infinities.
FOURBIT_INLINE void to_halves(const float* x, float scale, const Half& h, int count, uint16_t* codes) {
  const int32_t shift = h.shift, bias = h.bias, half_smallest = h.half_smallest, largest = h.largest;
  const int32_t below_half = (1 << (shift - 1)) - 1;
  for (int j = 0; j < count; ++j) {
    const int32_t bits = as_bits(x[j] * scale), magnitude = bits & 0x7FFFFFFF;
    int32_t code = ((magnitude + below_half + ((magnitude >> shift) & 1)) >> shift) - bias;
    code = max_of(code, static_cast<int32_t>(magnitude > half_smallest));
    codes[j] = static_cast<uint16_t>(min_of(code, largest) | ((bits >> 16) & 0x8000));
  }
}

FOURBIT_INLINE void from_halves(const uint16_t* codes, const Half& h, int count, float* x) {
  const int32_t shift = h.shift, bias = h.bias;
  for (int j = 0; j < count; ++j) {
    const int32_t half = codes[j], code = half & 0x7FFF;
    const int32_t bits = ((code + bias) << shift) & -static_cast<int32_t>(code != 0);
    x[j] = as_float(bits | static_cast<int32_t>(static_cast<uint32_t>(half & 0x8000) << 16));
  }
}

// Where a code is positive, negative.
inline uint64_t positive(const int8_t* q) {
#if defined(__AVX512BW__)
  return _mm512_cmpgt_epi8_mask(_mm512_loadu_si512(q), _mm512_setzero_si512());
#else
  uint64_t bits = 0;
  for (int j = 0; j < kBlock; ++j) bits |= static_cast<uint64_t>(q[j] > 0) << j;
  return bits;
#endif
}

inline uint64_t negative(const int8_t* q) {
#if defined(__AVX512BW__)
  return _mm512_movepi8_mask(_mm512_loadu_si512(q));
#else
  uint64_t bits = 0;
  for (int j = 0; j < kBlock; ++j) bits |= static_cast<uint64_t>(q[j] < 0) << j;
  return bits;
#endif
}

// Adds v to 16 partial sums where `plus` is set, and subtracts it where `minus` is.
FOURBIT_INLINE void add_where(const float* v, uint64_t plus, uint64_t minus, float* part) {
  if (!(plus | minus)) return;
  float a[kBlock], b[kBlock];
  std::memcpy(a, v, sizeof a);
  std::memcpy(b, v, sizeof b);
  keep(a, plus);
  keep(b, minus);
  for (int j = 0; j < 16; ++j) part[j] += (a[j] - b[j]) + (a[j + 16] - b[j + 16]) + (a[j + 32] - b[j + 32]) + (a[j + 48] - b[j + 48]);
}

}  // namespace
}  // namespace fourbit
