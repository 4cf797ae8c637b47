// The layer under the kernels that knows instruction sets: vectors of 16 (AVX-512), 8 (AVX2) or 4 numbers, and the few things that
// compilers do not make of C++'s operators on them: saturating minima, masks as bits, narrow stores, tables. Everything else is
// written once, with operators. Each function has up to three bodies, with the same results for every input, NaN included; the last
// one, in plain loops, says what they are.
#pragma once

#include "common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fourbit {
namespace {

#if defined(__AVX512F__)
constexpr int kVector = 16;
#elif defined(__AVX2__)
constexpr int kVector = 8;
#else
constexpr int kVector = 4;
#endif

constexpr int kPerBlock = kBlock / kVector;  // vectors in a block

typedef float Floats __attribute__((vector_size(4 * kVector)));
typedef int32_t Ints __attribute__((vector_size(4 * kVector)));
typedef uint32_t Words __attribute__((vector_size(4 * kVector)));
typedef uint64_t Pairs __attribute__((vector_size(4 * kVector)));
typedef double Doubles __attribute__((vector_size(4 * kVector)));
typedef int16_t Halves __attribute__((vector_size(4 * kVector)));  // twice as many as Ints
typedef uint16_t UnsignedHalves __attribute__((vector_size(4 * kVector)));

// The vectors of a block: unrolled, so that what depends on the number of the vector is a constant.
#if defined(__AVX2__)
#define FOURBIT_EACH(v) _Pragma("GCC unroll 8") for (int v = 0; v < kPerBlock; ++v)
#else
#define FOURBIT_EACH(v) for (int v = 0; v < kPerBlock; ++v)
#endif

FOURBIT_INLINE Ints as_ints(Floats x) { return (Ints)x; }
FOURBIT_INLINE Floats as_floats(Ints x) { return (Floats)x; }
FOURBIT_INLINE Floats all_floats(float x) { return x - Floats{}; }
FOURBIT_INLINE Ints all_ints(int32_t x) { return x + Ints{}; }
FOURBIT_INLINE Ints magnitudes(Floats x) { return as_ints(x) & 0x7FFFFFFF; }

// a + b where it may leave int32: wraps.
FOURBIT_INLINE Ints wrapping_sum(Ints a, Ints b) { return (Ints)((Words)a + (Words)b); }
FOURBIT_INLINE Halves wrapping_sum(Halves a, Halves b) { return (Halves)((UnsignedHalves)a + (UnsignedHalves)b); }

// Shifts of magnitudes by a number that is known at run time only: the instruction for uniform shifts is the slower one.
FOURBIT_INLINE Ints shifted_left(Ints x, int32_t count) {
#if defined(__AVX512F__)
  return (Ints)_mm512_sllv_epi32((__m512i)x, _mm512_set1_epi32(count));
#elif defined(__AVX2__)
  return (Ints)_mm256_sllv_epi32((__m256i)x, _mm256_set1_epi32(count));
#else
  return x << count;
#endif
}

FOURBIT_INLINE Ints shifted_right(Ints x, int32_t count) {  // arithmetic
#if defined(__AVX512F__)
  return (Ints)_mm512_srav_epi32((__m512i)x, _mm512_set1_epi32(count));
#elif defined(__AVX2__)
  return (Ints)_mm256_srav_epi32((__m256i)x, _mm256_set1_epi32(count));
#else
  return x >> count;
#endif
}

// a > b ? a : b and a < b ? a : b, number by number: b where one of them is NaN.
FOURBIT_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

FOURBIT_INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

FOURBIT_INLINE Ints larger(Ints a, Ints b) { return a > b ? a : b; }
FOURBIT_INLINE Ints smaller(Ints a, Ints b) { return a < b ? a : b; }
FOURBIT_INLINE Halves smaller(Halves a, Halves b) { return a < b ? a : b; }

// As torch.clamp: NaN stays NaN.
FOURBIT_INLINE Floats clamp(Floats x, float low, float high) {
  return smaller(all_floats(high), larger(all_floats(low), x));
}

// The integers nearest to x, ties to even, for |x| < 2^22; of NaN, one whose lowest 8 bits are 0.
FOURBIT_INLINE Ints nearest_integers(Floats x) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtps_epi32(x);
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtps_epi32(x);
#else
  const Floats rounded = (x + 12582912.0f) - 12582912.0f;
  Ints n;
  for (int j = 0; j < kVector; ++j) n[j] = rounded[j] == rounded[j] ? static_cast<int32_t>(rounded[j]) : 0;
  return n;
#endif
}

FOURBIT_INLINE Floats to_floats(Ints n) { return __builtin_convertvector(n, Floats); }

FOURBIT_INLINE void to_doubles(Floats x, Doubles& first, Doubles& second) {
#if defined(__AVX512F__)
  first = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  second = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
#elif defined(__AVX2__)
  first = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
  second = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
#else
  for (int j = 0; j < kVector / 2; ++j) {
    first[j] = x[j];
    second[j] = x[j + kVector / 2];
  }
#endif
}

// sum + x * x where x * x is exact, as that of a float32 number is: so it makes no difference whether it is rounded first.
FOURBIT_INLINE Doubles add_square(Doubles sum, Doubles x) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(x, x, sum);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(x, x, sum);
#else
  return sum + x * x;
#endif
}

// x * signs + y where signs are 1 or -1: one rounding, that of the sum.
FOURBIT_INLINE Floats add_signed(Floats x, Floats signs, Floats y) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, signs, y);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(x, signs, y);
#else
  return x * signs + y;
#endif
}

// ---- memory ----

// float32, bfloat16 and integers of 32 bits as float32.
FOURBIT_INLINE Floats read(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

FOURBIT_INLINE Ints read_unsigned(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Ints n;
  for (int j = 0; j < kVector; ++j) n[j] = p[j];
  return n;
#endif
}

FOURBIT_INLINE Floats read(const uint16_t* p) { return as_floats(read_unsigned(p) << 16); }

FOURBIT_INLINE Floats read(const int32_t* p) {
  Ints n;
  std::memcpy(&n, p, sizeof n);
  return to_floats(n);
}

FOURBIT_INLINE Ints read_signed(const int8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  Ints n;
  for (int j = 0; j < kVector; ++j) n[j] = p[j];
  return n;
#endif
}

FOURBIT_INLINE void write(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

// Numbers of 0 to 65535 in 16 bits each: of one vector, and of a block.
FOURBIT_INLINE void write_unsigned(uint16_t* p, Ints n) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)n));
#elif defined(__AVX2__)
  const __m256i all = (__m256i)n;
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
#else
  for (int j = 0; j < kVector; ++j) p[j] = static_cast<uint16_t>(n[j]);
#endif
}

FOURBIT_INLINE void write_unsigned(uint16_t* p, const Ints (&n)[kPerBlock]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  for (int i = 0; i < kPerBlock / 2; ++i) {
    const __m256i mixed = _mm256_packus_epi32((__m256i)n[2 * i], (__m256i)n[2 * i + 1]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * i), _mm256_permute4x64_epi64(mixed, 0xD8));
  }
#else
  FOURBIT_EACH(v) write_unsigned(p + v * kVector, n[v]);
#endif
}

FOURBIT_INLINE Ints upper_half(Ints bits) { return (Ints)((Words)bits >> 16); }

// Those of two vectors, in order.
FOURBIT_INLINE Halves upper_halves(Floats first, Floats second) {
  const Ints a = upper_half(as_ints(first)), b = upper_half(as_ints(second));
#if defined(__AVX512F__)
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi32_epi16((__m512i)a));
  return (Halves)_mm512_inserti64x4(low, _mm512_cvtepi32_epi16((__m512i)b), 1);
#elif defined(__AVX2__)
  return (Halves)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)a, (__m256i)b), 0xD8);
#else
  Halves both;
  for (int j = 0; j < kVector; ++j) {
    both[j] = static_cast<int16_t>(a[j]);
    both[j + kVector] = static_cast<int16_t>(b[j]);
  }
  return both;
#endif
}

FOURBIT_INLINE void upper_halves(const Floats (&x)[kPerBlock], Halves (&halves)[kPerBlock / 2]) {
#pragma GCC unroll 8
  for (int v = 0; v < kPerBlock / 2; ++v) halves[v] = upper_halves(x[2 * v], x[2 * v + 1]);
}

// The nearest bfloat16, ties to even, in the lower half; NaN stays NaN.
FOURBIT_INLINE Ints to_bfloat16(Floats x) {
  const Words bits = (Words)x;
  const Words rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return upper_half((Ints)(x == x ? rounded : bits | 0x400000u));
}

FOURBIT_INLINE void write(float* p, const Floats (&x)[kPerBlock]) {
  FOURBIT_EACH(v) write(p + v * kVector, x[v]);
}

FOURBIT_INLINE void write(uint16_t* p, const Floats (&x)[kPerBlock]) {
  Ints n[kPerBlock];
  FOURBIT_EACH(v) n[v] = to_bfloat16(x[v]);
  write_unsigned(p, n);
}

// The same where bfloat16 holds all of them.
FOURBIT_INLINE void write_exactly(uint16_t* p, const Floats (&x)[kPerBlock]) {
  Ints n[kPerBlock];
  FOURBIT_EACH(v) n[v] = upper_half(as_ints(x[v]));
  write_unsigned(p, n);
}

FOURBIT_INLINE void write_exactly(float* p, const Floats (&x)[kPerBlock]) { write(p, x); }

// The same for results that no cache will hold, past all of them: p on a boundary of a vector. stream_end() before others may read.
FOURBIT_INLINE void stream_exactly(float* p, const Floats (&x)[kPerBlock]) {
#if defined(__AVX512F__)
  FOURBIT_EACH(v) _mm512_stream_ps(p + v * kVector, x[v]);
#elif defined(__AVX2__)
  FOURBIT_EACH(v) _mm256_stream_ps(p + v * kVector, x[v]);
#else
  write(p, x);
#endif
}

FOURBIT_INLINE void stream_exactly(uint16_t* p, const Floats (&x)[kPerBlock]) {
#if defined(__AVX512F__)
  for (int i = 0; i < kPerBlock / 2; ++i)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p + 2 * kVector * i), (__m512i)upper_halves(x[2 * i], x[2 * i + 1]));
#elif defined(__AVX2__)
  for (int i = 0; i < kPerBlock / 2; ++i)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 2 * kVector * i), (__m256i)upper_halves(x[2 * i], x[2 * i + 1]));
#else
  write_exactly(p, x);
#endif
}

FOURBIT_INLINE void stream_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

FOURBIT_INLINE void write(uint16_t* p, Halves x) { std::memcpy(p, &x, sizeof x); }

// The lowest 8 bits of 64 numbers.
FOURBIT_INLINE void write_bytes(int8_t* p, const Ints (&n)[kPerBlock]) {
#if defined(__AVX512F__)
  for (int i = 0; i < 2; ++i) {
    const __m128i low = _mm512_cvtepi32_epi8((__m512i)n[2 * i]), high = _mm512_cvtepi32_epi8((__m512i)n[2 * i + 1]);
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32 * i), both);
  }
#elif defined(__AVX2__)
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), byte = _mm256_set1_epi16(255);
  for (int i = 0; i < 2; ++i) {
    __m256i low = _mm256_packs_epi32((__m256i)n[4 * i], (__m256i)n[4 * i + 1]);
    __m256i high = _mm256_packs_epi32((__m256i)n[4 * i + 2], (__m256i)n[4 * i + 3]);
    low = _mm256_and_si256(low, byte);
    high = _mm256_and_si256(high, byte);
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32 * i), bytes);
  }
#else
  for (int j = 0; j < kBlock; ++j) p[j] = static_cast<int8_t>(n[j / kVector][j % kVector]);
#endif
}

// Integers for a carrier of 8 bits, NaN as 0.
FOURBIT_INLINE void write_exactly(int8_t* p, const Floats (&y)[kPerBlock]) {
  Ints n[kPerBlock];
  FOURBIT_EACH(v) n[v] = __builtin_convertvector(y[v] == y[v] ? y[v] : Floats{}, Ints);
  write_bytes(p, n);
}

// A block's bytes as they lie in `p`, of which `count` are there to be written.
FOURBIT_INLINE void copy_bytes(int8_t* p, const int8_t* bytes, int count) {
  if (count == kBlock) std::memcpy(p, bytes, kBlock);  // without a call
  else std::memcpy(p, bytes, static_cast<size_t>(count));
}

// ---- codes of 4 bits: elements j and j + 32 of a block share a byte ----

FOURBIT_INLINE void pack_codes(const int8_t* q, uint8_t* out) {
#if defined(__AVX2__)
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32)), nibble = _mm256_set1_epi8(15);
  const __m256i upper = _mm256_andnot_si256(nibble, _mm256_slli_epi16(high, 4));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_or_si256(_mm256_and_si256(low, nibble), upper));
#else
  for (int i = 0; i < 32; ++i) out[i] = static_cast<uint8_t>((q[i] & 15) | (static_cast<uint8_t>(q[i + 32]) << 4));
#endif
}

// The integers of one block, -8..7 or 0..15.
FOURBIT_INLINE void unpack_block(const uint8_t* packed, int32_t is_signed, int8_t* q) {
  const int8_t flip = is_signed ? 8 : 0;  // (nibble ^ 8) - 8 extends the sign
#if defined(__AVX2__)
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)), nibble = _mm256_set1_epi8(15);
  const __m256i sign = _mm256_set1_epi8(flip);
  const __m256i low = _mm256_and_si256(both, nibble), high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_sub_epi8(_mm256_xor_si256(low, sign), sign));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + 32), _mm256_sub_epi8(_mm256_xor_si256(high, sign), sign));
#else
  for (int i = 0; i < 32; ++i) {
    q[i] = static_cast<int8_t>(((packed[i] & 15) ^ flip) - flip);
    q[i + 32] = static_cast<int8_t>(((packed[i] >> 4) ^ flip) - flip);
  }
#endif
}

// ---- truth values: 64 are the bits of one integer, element 0 lowest, as in memory ----

enum Comparison { kLess, kLessEqual, kGreater, kGreaterEqual };

#if defined(__AVX512F__)
typedef __mmask16 Truth;  // of one vector
#else
typedef Ints Truth;
#endif

template <Comparison op>
FOURBIT_INLINE Truth compare(Floats x, float bound) {
#if defined(__AVX512F__)
  constexpr int how = op == kLess ? _CMP_LT_OQ : op == kLessEqual ? _CMP_LE_OQ : op == kGreater ? _CMP_GT_OQ : _CMP_GE_OQ;
  return _mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), how);
#else
  return op == kLess ? x < bound : op == kLessEqual ? x <= bound : op == kGreater ? x > bound : x >= bound;
#endif
}

// The bits of vector v of a block.
FOURBIT_INLINE uint64_t bits_of(Truth t, int v) {
#if defined(__AVX512F__)
  const uint64_t bits = t;
#elif defined(__AVX2__)
  const uint64_t bits = static_cast<uint32_t>(_mm256_movemask_ps((__m256)t));
#else
  uint64_t bits = 0;
  for (int j = 0; j < kVector; ++j) bits |= static_cast<uint64_t>(t[j] & 1) << j;
#endif
  return bits << (kVector * v);
}

// Where a code is positive, negative.
FOURBIT_INLINE uint64_t positive(const int8_t* q) {
#if defined(__AVX512BW__)
  return _mm512_cmpgt_epi8_mask(_mm512_loadu_si512(q), _mm512_setzero_si512());
#elif defined(__AVX2__)
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)), zero = _mm256_setzero_si256();
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32));
  const uint64_t upper = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi8(high, zero)));
  return upper << 32 | static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi8(low, zero)));
#else
  uint64_t bits = 0;
  for (int j = 0; j < kBlock; ++j) bits |= static_cast<uint64_t>(q[j] > 0) << j;
  return bits;
#endif
}

FOURBIT_INLINE uint64_t negative(const int8_t* q) {
#if defined(__AVX512BW__)
  return _mm512_movepi8_mask(_mm512_loadu_si512(q));
#elif defined(__AVX2__)
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32));
  const uint64_t upper = static_cast<uint32_t>(_mm256_movemask_epi8(high));
  return upper << 32 | static_cast<uint32_t>(_mm256_movemask_epi8(low));
#else
  uint64_t bits = 0;
  for (int j = 0; j < kBlock; ++j) bits |= static_cast<uint64_t>(q[j] < 0) << j;
  return bits;
#endif
}

// Vector v of a block, zero where its bit of `bits` is not set.
FOURBIT_INLINE Floats keep(Floats x, uint64_t bits, int v) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits >> (kVector * v)), x);
#else
  Ints own;
  for (int j = 0; j < kVector; ++j) own[j] = static_cast<int32_t>(1u << ((kVector * v + j) & 31));
  const Ints word = all_ints(static_cast<int32_t>(bits >> (kVector * v & 32)));
  return as_floats(as_ints(x) & ((word & own) == own));
#endif
}

// ---- tables ----

// entries[index], of 8.
FOURBIT_INLINE Floats look_up_8(const float* entries, Ints index) {
#if defined(__AVX512F__)
  const __m512 table = _mm512_castps256_ps512(_mm256_loadu_ps(entries));
  return _mm512_permutexvar_ps((__m512i)index, table);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(entries), (__m256i)index);
#else
  Floats y;
  for (int j = 0; j < kVector; ++j) y[j] = entries[index[j]];
  return y;
#endif
}

// entries[index], of any number.
FOURBIT_INLINE Floats look_up(const float* entries, Ints index) {
#if defined(__AVX512F__)
  return _mm512_i32gather_ps((__m512i)index, entries, 4);
#elif defined(__AVX2__)
  return _mm256_i32gather_ps(entries, (__m256i)index, 4);
#else
  Floats y;
  for (int j = 0; j < kVector; ++j) y[j] = entries[index[j]];
  return y;
#endif
}

// entries[index], of 16.
FOURBIT_INLINE Floats look_up_16(const float* entries, Ints index) {
#if defined(__AVX512F__)
  return _mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(entries));
#elif defined(__AVX2__)
  const Floats low = look_up_8(entries, index), high = look_up_8(entries + 8, index);
  return _mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
  return look_up(entries, index);
#endif
}

// ---- operands in tiles: lanes that change places, words of two vectors, codes by position ----

// Numbers whose lanes differ in the bit `half` change places.
template <int half>
FOURBIT_INLINE Floats swapped(Floats x) {
#if defined(__AVX512F__)
  if (half == 1) return _mm512_permute_ps(x, 0xB1);
  if (half == 2) return _mm512_permute_ps(x, 0x4E);
  return _mm512_shuffle_f32x4(x, x, half == 4 ? 0xB1 : 0x4E);
#elif defined(__AVX2__)
  if (half == 1) return _mm256_permute_ps(x, 0xB1);
  if (half == 2) return _mm256_permute_ps(x, 0x4E);
  return _mm256_permute2f128_ps(x, x, 1);
#else
  Floats y;
  for (int j = 0; j < kVector; ++j) y[j] = x[j ^ half];
  return y;
#endif
}

// The integers below x, or x, for |x| < 2^22.
FOURBIT_INLINE Floats floors(Floats x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, 9);
#elif defined(__AVX2__)
  return _mm256_floor_ps(x);
#else
  const Floats near = (x + 12582912.0f) - 12582912.0f;
  return near > x ? near - 1.0f : near;
#endif
}

// The lower and upper halves of the words of two vectors of pairs.
FOURBIT_INLINE void word_halves(Pairs a, Pairs b, Words& low, Words& high) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  low = (Words)_mm512_permutex2var_epi32((__m512i)a, even, (__m512i)b);
  high = (Words)_mm512_permutex2var_epi32((__m512i)a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), (__m512i)b);
#elif defined(__AVX2__)
  const __m256 x = (__m256)a, y = (__m256)b;
  low = (Words)_mm256_permute4x64_epi64((__m256i)_mm256_shuffle_ps(x, y, 0x88), 0xD8);
  high = (Words)_mm256_permute4x64_epi64((__m256i)_mm256_shuffle_ps(x, y, 0xDD), 0xD8);
#else
  for (int j = 0; j < kVector; ++j) {
    const uint64_t z = j < kVector / 2 ? a[j] : b[j - kVector / 2];
    low[j] = static_cast<uint32_t>(z);
    high[j] = static_cast<uint32_t>(z >> 32);
  }
#endif
}

// The largest of each of kVector vectors.
FOURBIT_INLINE Ints largest_of_each(const Ints* r) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  auto two = [](Ints a, Ints b) {
    return _mm256_max_epi32(_mm256_unpacklo_epi32((__m256i)a, (__m256i)b), _mm256_unpackhi_epi32((__m256i)a, (__m256i)b));
  };
  auto four = [](__m256i a, __m256i b) { return _mm256_max_epi32(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)); };
  const __m256i first = four(two(r[0], r[1]), two(r[2], r[3])), second = four(two(r[4], r[5]), two(r[6], r[7]));
  return (Ints)_mm256_max_epi32(_mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31));
#else
  Ints top;
  for (int i = 0; i < kVector; ++i) {
#if defined(__AVX512F__)
    top[i] = _mm512_reduce_max_epi32((__m512i)r[i]);
#else
    top[i] = r[i][0];
    for (int j = 1; j < kVector; ++j) top[i] = r[i][j] > top[i] ? r[i][j] : top[i];
#endif
  }
  return top;
#endif
}

// The signed positions of 64 integers of magnitudes below 16 on a grid that has table[magnitude] as its positions from zero on.
FOURBIT_INLINE void to_positions(int8_t* n, const int8_t* table, int8_t zero) {
#if defined(__AVX2__)
  const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  for (int i = 0; i < 2; ++i) {
    __m256i* at = reinterpret_cast<__m256i*>(n + 32 * i);
    const __m256i number = _mm256_loadu_si256(at);
    const __m256i position = _mm256_sign_epi8(_mm256_shuffle_epi8(entries, _mm256_abs_epi8(number)), number);
    _mm256_storeu_si256(at, _mm256_add_epi8(position, _mm256_set1_epi8(zero)));
  }
#else
  for (int j = 0; j < kBlock; ++j) {
    const int8_t position = table[(n[j] < 0 ? -n[j] : n[j]) & 15];
    n[j] = static_cast<int8_t>((n[j] < 0 ? -position : position) + zero);
  }
#endif
}

}  // namespace
}  // namespace fourbit
