// What the kernels of one instruction set share: rounding, random words and sums, on vectors (see vectors.h) and on blocks of 64
// elements. Everything has internal linkage, because each instruction set compiles it anew. Must be built with
// -ffp-contract=off and without -ffast-math: the numbers are defined bit by bit.
#pragma once

#include <cmath>

#include "rounding.h"
#include "vectors.h"

namespace fourbit {

namespace FOURBIT_ISA {
void norm_statistics(const NormStatistics* s);
float norm_apply(const NormApply* a);
float norm_backward(NormBackward* b);
void lstm_forward(const LstmForward* task);
void lstm_backward(const LstmBackward* task);
float round_tiles(RoundTiles* r);
void unpack_tiles(const UnpackTiles* u);
}  // namespace FOURBIT_ISA

namespace {

// ---- blocks at the end of a tensor ----

// Asks for what `count` numbers from x on are followed by, some blocks further.
template <typename T>
FOURBIT_INLINE void prefetch(const T* x, int count) {
  constexpr int kAhead = 2048, kLine = 64;  // bytes
  const char* from = reinterpret_cast<const char*>(x) + kAhead;
  for (int i = 0; i < count * static_cast<int>(sizeof(T)); i += kLine) __builtin_prefetch(from + i);
}

// `count` numbers as a whole block: where they lie, or in `room` with zeros behind them.
template <typename T>
FOURBIT_INLINE const T* whole(const T* x, int count, T* room) {
  if (count == kBlock) {
    prefetch(x, kBlock);
    return x;
  }
  std::memset(room, 0, kBlock * sizeof(T));
  std::memcpy(room, x, static_cast<size_t>(count) * sizeof(T));
  return room;
}

// Where a whole block may be written of which `count` numbers exist; finish() puts them where they belong.
template <typename T>
struct Target {
  T* out;
  int count;
  T room[kBlock];
  FOURBIT_INLINE Target(T* out, int count) : out(out), count(count) {}
  FOURBIT_INLINE T* block() { return count == kBlock ? out : room; }
  FOURBIT_INLINE void finish() {
    if (count != kBlock) std::memcpy(out, room, static_cast<size_t>(count) * sizeof(T));
  }
};

// Runs block(i, count) for each block of a range.
template <typename F>
FOURBIT_INLINE void each_block(int64_t begin, int64_t end, F block) {
  for (int64_t i = begin; i < end; i += kBlock) block(i, static_cast<int>(end - i < kBlock ? end - i : kBlock));
}

constexpr int32_t kSign = static_cast<int32_t>(0x80000000u);

// ---- largest magnitudes, as bit patterns: infinity and NaN come out on top ----

FOURBIT_INLINE void raise(Ints& top, Floats x) { top = larger(top, magnitudes(x)); }

inline int32_t largest_of(Ints top) {
  int32_t largest = 0;
  for (int j = 0; j < kVector; ++j) largest = max_of(largest, top[j]);
  return largest;
}

// Thread by thread.
struct Largest {
  int32_t of[kMaxThreads] = {};
  float get(int pieces) const {
    int32_t largest = 0;
    for (int i = 0; i < pieces; ++i) largest = max_of(largest, of[i]);
    return as_float(largest);
  }
};

// ---- random words ----

// The upper 24 bits of the words of vector v of the block that begins at an even element.
FOURBIT_INLINE Ints draw_bits(uint64_t key, int64_t begin, int v) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
  Pairs steps;
  for (int j = 0; j < kVector / 2; ++j) steps[j] = static_cast<uint64_t>(v * kVector / 2 + j + 1) * kGolden;
  const Pairs z = mix(steps + (static_cast<uint64_t>(begin) / 2 * kGolden + key));
  return (Ints)((Words)z >> 8);
}

// The same as numbers.
FOURBIT_INLINE Floats draw(uint64_t key, int64_t begin, int v) { return to_floats(draw_bits(key, begin, v)); }

// Where (x - low) / (high - low) calls for the upper neighbour of a number.
FOURBIT_INLINE Ints goes_up(Floats u, Floats above_low, Floats gap) { return u < above_low / gap * 16777216.0f; }

// ---- integers ----

// The integers nearest to y within [low, high]; NaN becomes low.
FOURBIT_INLINE Ints nearest_code(Floats y, float low, float high) {
  return nearest_integers(smaller(larger(y, all_floats(low)), all_floats(high)));
}

// Where numbers lie inside a clip range (rules of Clip).
FOURBIT_INLINE Truth inside_range(Floats t, int32_t rule, float bound) {
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

// ---- powers of a radix ----

// A LogGrid in vectors.
struct Powers {
  Ints start, octaves, smallest, largest;
  explicit Powers(const LogGrid& g)
      : start(all_ints(g.start)), octaves(all_ints(-g.octaves)), smallest(all_ints(g.smallest)), largest(all_ints(g.largest)) {}
};

// The bits of the nearest power's magnitude, 0 below the first decision point.
FOURBIT_INLINE Ints log_nearest(Ints magnitude, const Powers& g) {
  const Ints power = smaller(wrapping_sum((magnitude - g.start) & g.octaves, g.smallest), g.largest);
  return g.start > magnitude ? Ints{} : power;
}

// A LogGrid whose numbers have no more bits than bfloat16, in the upper halves of patterns.
struct PowerHalves {
  Halves start, octaves, smallest, largest;
  explicit PowerHalves(const LogGrid& g)
      : start(all(g.start)), octaves(all(-g.octaves)), smallest(all(g.smallest)), largest(all(g.largest)) {}
  static Halves all(int32_t bits) { return static_cast<int16_t>(bits >> 16) + Halves{}; }
};

// log_nearest of upper halves: the lower ones decide nothing.
FOURBIT_INLINE Halves log_nearest(Halves magnitude, const PowerHalves& g) {
  const Halves power = smaller(wrapping_sum((magnitude - g.start) & g.octaves, g.smallest), g.largest);
  return g.start > magnitude ? Halves{} : power;
}

// The upper halves of a block's numbers, on a grid: in bfloat16, and in integers of 8 bits.
FOURBIT_INLINE void write_nearest(uint16_t* out, const Halves (&s)[kPerBlock / 2], const LogGrid& grid) {
  const PowerHalves g(grid);
  const Halves sign = PowerHalves::all(kSign);
#pragma GCC unroll 8
  for (int v = 0; v < kPerBlock / 2; ++v) write(out + 2 * kVector * v, log_nearest(s[v] & ~sign, g) | (s[v] & sign));
}

FOURBIT_INLINE void write_nearest(int8_t* out, const Halves (&s)[kPerBlock / 2], const LogGrid& grid) {
  uint16_t rounded[kBlock];
  Floats y[kPerBlock];
  write_nearest(rounded, s, grid);
  FOURBIT_EACH(v) y[v] = read(rounded + v * kVector);
  write_exactly(out, y);
}

// ---- binary floats ----

// A format without subnormals, whose numbers are rounded by their bits. Between 0 and the smallest magnitude there is nothing;
// a tie goes to 0. In 16 bits, they are codes: sign, then float32's exponent and mantissa less the lowest exponent; 0 is zero.
struct Half {
  int32_t shift, bias;                     // bias: of codes
  int32_t smallest, half_smallest, largest;  // patterns of float32
  explicit Half(const FloatGrid& g)
      : shift(23 - g.mantissa_bits),
        bias(g.lowest << g.mantissa_bits),
        smallest(as_bits(g.smallest)),
        half_smallest(as_bits(0.5f * g.smallest)),
        largest(as_bits(g.max)) {}
};

// Bits of the nearest magnitude, ties to even, saturating; right where `magnitude` is above h.half_smallest, else it becomes 0.
FOURBIT_INLINE Ints round_magnitude(Ints magnitude, const Half& h) {
  const int32_t below_half = (1 << (h.shift - 1)) - 1;
  const Ints carried = wrapping_sum(magnitude, (shifted_right(magnitude, h.shift) & 1) + below_half);
  const Ints rounded = carried & -(1 << h.shift);
  return smaller(larger(rounded, all_ints(h.smallest)), all_ints(h.largest));
}

// float_nearest of a format with subnormals: x + m - m rounds to multiples of the quantum. What is beyond the largest number becomes
// it first, and rounds to itself.
FOURBIT_INLINE Floats with_subnormals(Floats s, const FloatGrid& g) {
  const Floats x = clamp(s, -g.max, g.max);
  const Ints exponent = larger(as_ints(x) & 0x7F800000, all_ints(g.lowest << 23));
  const Floats m = as_floats(wrapping_sum(exponent, all_ints(((23 - g.mantissa_bits) << 23) | 0x400000)));
  return (x + m) - m;
}

FOURBIT_INLINE Floats without_subnormals(Floats s, const Half& h) {
  const Ints magnitude = magnitudes(s), y = round_magnitude(magnitude, h) | (as_ints(s) & kSign);
  const Ints found = magnitude > h.half_smallest ? y : Ints{};
  return as_floats(found | (s == s ? Ints{} : all_ints(0x7FC00000)));
}

FOURBIT_INLINE Floats overflowed(Floats s, Floats y, float overflow) {
  const Floats infinity = as_floats((as_ints(s) & kSign) | 0x7F800000);
  return as_floats(magnitudes(s)) >= overflow ? infinity : y;
}

// As float_nearest of one number, for a vector or a block; g.min is -g.max.
FOURBIT_INLINE Floats float_nearest(Floats s, const FloatGrid& g) {
  const Floats y = g.smallest > 0.0f ? without_subnormals(s, Half(g)) : with_subnormals(s, g);
  return g.overflow == g.overflow ? overflowed(s, y, g.overflow) : y;
}

FOURBIT_INLINE void float_nearest(Floats (&x)[kPerBlock], const FloatGrid& g) {
  if (g.overflow == g.overflow) {
    FOURBIT_EACH(v) x[v] = float_nearest(x[v], g);
  } else if (g.smallest > 0.0f) {
    const Half h(g);
    FOURBIT_EACH(v) x[v] = without_subnormals(x[v], h);
  } else {
    FOURBIT_EACH(v) x[v] = with_subnormals(x[v], g);
  }
}

// Codes of the nearest numbers: as float_nearest for numbers and infinities. `rounded` becomes the numbers themselves.
FOURBIT_INLINE Ints to_half(Floats x, const Half& h, Floats& rounded) {
  const Ints magnitude = magnitudes(x), sign = as_ints(x) & kSign;
  const Ints y = magnitude > h.half_smallest ? round_magnitude(magnitude, h) : Ints{};
  rounded = as_floats(y | sign);
  return larger(shifted_right(y, h.shift) - h.bias, Ints{}) | upper_half(sign);
}

FOURBIT_INLINE Floats from_half(Ints half, const Half& h) {
  const Ints code = half & 0x7FFF;
  const Ints bits = code != 0 ? shifted_left(code + h.bias, h.shift) : Ints{};
  return as_floats(bits | ((half ^ code) << 16));
}

// A block of them.
FOURBIT_INLINE void from_halves(const uint16_t* p, const Half& h, Floats (&x)[kPerBlock]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // 16 at a time: of (code + bias) << shift, the upper and the lower half apart, by products with 2^shift.
  const __m256i factor = _mm256_set1_epi16(static_cast<int16_t>(1 << h.shift)), all = _mm256_set1_epi16(0x7FFF);
  const __m256i bias = _mm256_set1_epi16(static_cast<int16_t>(h.bias >> (16 - h.shift)));
  for (int i = 0; i < kPerBlock / 2; ++i) {
    const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16 * i));
    const __m256i half = _mm256_permute4x64_epi64(loaded, 0xD8), code = _mm256_and_si256(half, all);
    const __m256i power = _mm256_add_epi16(_mm256_mulhi_epu16(code, factor), bias);
    const __m256i is_zero = _mm256_cmpeq_epi16(code, _mm256_setzero_si256());
    const __m256i upper = _mm256_or_si256(_mm256_andnot_si256(is_zero, power), _mm256_andnot_si256(all, half));
    const __m256i lower = _mm256_mullo_epi16(code, factor);
    x[2 * i] = (Floats)_mm256_unpacklo_epi16(lower, upper);
    x[2 * i + 1] = (Floats)_mm256_unpackhi_epi16(lower, upper);
  }
#else
  FOURBIT_EACH(v) x[v] = from_half(read_unsigned(p + v * kVector), h);
#endif
}

// Codes of scale * x for `count` numbers in memory, a multiple of kVector.
FOURBIT_INLINE void to_halves(const float* x, float scale, const Half& h, int count, uint16_t* codes) {
  Floats rounded;
  for (int j = 0; j < count; j += kVector) write_unsigned(codes + j, to_half(read(x + j) * scale, h, rounded));
}

// ---- sums ----

constexpr int kParts = 16;  // partial sums, whatever the instruction set

struct Parts {
  Floats of[kParts / kVector] = {};
  void move_to(double& total) {
    for (Floats& p : of) {
      for (int j = 0; j < kVector; ++j) total += p[j];
      p = Floats{};
    }
  }
};

// Adds a block of what(v), for vector v, to 16 partial sums.
template <typename F>
FOURBIT_INLINE void add_vectors(Parts& parts, F what) {
  constexpr int kOwn = kParts / kVector;
  Floats sum[kOwn];
  FOURBIT_EACH(v) sum[v % kOwn] = v < kOwn ? what(v) : sum[v % kOwn] + what(v);
  for (int i = 0; i < kOwn; ++i) parts.of[i] += sum[i];
}

// Adds a block to 16 partial sums where `plus` is set, and subtracts it where `minus` is: nowhere, where codes have no sign.
FOURBIT_INLINE void add_where(const Floats (&x)[kPerBlock], uint64_t plus, uint64_t minus, Parts& parts) {
  if (minus) add_vectors(parts, [&](int v) { return keep(x[v], plus, v) - keep(x[v], minus, v); });
  else if (plus) add_vectors(parts, [&](int v) { return keep(x[v], plus, v); });
}

}  // namespace
}  // namespace fourbit
