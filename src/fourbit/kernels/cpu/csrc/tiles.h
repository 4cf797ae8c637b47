// Tiles of products of small integers on 256-bit vectors: exact sums of 6 rows times 16 columns, and what becomes of them.
//
// A step is 32 bits of every row and every column: two neighbours along the sum as int16, or four in 8 bits, of which one side's
// are unsigned. Signed numbers on that side get an offset, whose part in the sums is taken out of them again. A panel is 16 columns,
// step after step. What is missing to a whole step or panel is zero.
#pragma once

#include <immintrin.h>

#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace fourbit {
namespace {

constexpr int kRows = 6, kColumns = 16, kStepBytes = 4 * kColumns;
constexpr int64_t kInt32 = 0x7FFFFFFF;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most_of(int64_t a, int64_t b) { return a > b ? a : b; }

inline __m256i load_vector(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store_vector(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline void store_half(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }

struct Release {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
// Memory for so many numbers, with nothing in it, that begins with a line of the cache.
template <typename T>
using Room = std::unique_ptr<T[], Release>;
template <typename T>
Room<T> room_for(int64_t count) {
  return Room<T>(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64})));
}

// ---- the two kinds of numbers ----

// Dot products of integers: AVX-VNNI, or AVX-512 VNNI on vectors of 256 bits.
#if defined(__AVXVNNI__)
#define FOURBIT_VNNI 1
inline __m256i dot_words(__m256i sum, __m256i a, __m256i b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }
inline __m256i dot_bytes(__m256i sum, __m256i a, __m256i b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define FOURBIT_VNNI 1
inline __m256i dot_words(__m256i sum, __m256i a, __m256i b) { return _mm256_dpwssd_epi32(sum, a, b); }
inline __m256i dot_bytes(__m256i sum, __m256i a, __m256i b) { return _mm256_dpbusd_epi32(sum, a, b); }
#else
#define FOURBIT_VNNI 0
#endif

struct In16 {
  using Number = int16_t;
  static constexpr int kTerms = 2;
  static constexpr bool kNarrow = false;  // whether sums are in 16 bits until they are widened
  static FOURBIT_INLINE __m256i add(__m256i sum, __m256i a, __m256i b) {
#if FOURBIT_VNNI
    return dot_words(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
#endif
  }
};

// kLeft: the rows are the unsigned ones, otherwise the columns.
template <bool kLeft>
struct In8 {
  using Number = uint8_t;
  static constexpr int kTerms = 4;
  static constexpr bool kNarrow = !FOURBIT_VNNI;
  static FOURBIT_INLINE __m256i add(__m256i sum, __m256i a, __m256i b) {
#if FOURBIT_VNNI
    return kLeft ? dot_bytes(sum, a, b) : dot_bytes(sum, b, a);
#else
    return _mm256_add_epi16(sum, kLeft ? _mm256_maddubs_epi16(a, b) : _mm256_maddubs_epi16(b, a));
#endif
  }
};

// How a product of integers is computed, from their ranges.
struct Way {
  bool bytes = false;
  int32_t left_offset = 0, right_offset = 0;  // of unsigned bytes
  int64_t steps = 0;                          // that 16 bits hold the sum of
  int64_t terms = 0;                          // that 32 bits hold the sum of
};

inline bool has_ranges(const Integers& n) {
  return n.unit > 0.0f && n.a_min >= -32767 && n.a_max <= 32767 && n.b_min >= -128 && n.b_max <= 127 &&
         n.a_min <= n.a_max && n.b_min <= n.b_max;
}

// left: the rows may be the unsigned bytes; otherwise the columns.
inline Way way_of(const Integers& n, bool left) {
  constexpr int64_t kFewest = 4;  // steps: with fewer, widening costs more than int16 numbers do
  const int32_t low = left ? n.a_min : n.b_min, high = left ? n.a_max : n.b_max;
  const int32_t other = static_cast<int32_t>(left ? most_of(-n.b_min, n.b_max) : most_of(-n.a_min, n.a_max));
  const int32_t offset = low < 0 ? -low : 0;
  Way way;
  const int64_t largest = int64_t{high} + offset, product = most_of(largest * other, 1);
  way.steps = 32767 / (2 * product);
  const bool kHolds = FOURBIT_VNNI || way.steps >= kFewest;
  const bool fits = left || (n.a_min >= -128 && n.a_max <= 127);  // the signed side
  way.bytes = kHolds && largest <= 255 && fits;
  if (way.bytes) {
    (left ? way.left_offset : way.right_offset) = offset;
    way.terms = kInt32 / product;
  } else {
    way.terms = kInt32 / most_of(most_of(-n.a_min, n.a_max) * most_of(-n.b_min, n.b_max), 1);
  }
  return way;
}

// ---- sums of a tile ----

// Where the steps of a tile's sum lie, in bytes from the first: `runs` of `steps`, `blocks` times.
struct Walk {
  int64_t most;  // steps before sums in 16 bits are widened
  int64_t steps, a_step, b_step;
  int64_t runs = 1, a_run = 0, b_run = 0;
  int64_t blocks = 1, a_block = 0, b_block = 0;
};

template <int R>
FOURBIT_INLINE void widen_sums(__m256i (&acc)[R][2], int32_t* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      int32_t* to = sums + r * kColumns + v * 8;
      store_vector(to, _mm256_add_epi32(load_vector(to), _mm256_madd_epi16(acc[r][v], ones)));
      acc[r][v] = _mm256_setzero_si256();
    }
}

// sums[R][16] of the rows that begin at rows[..], with one panel.
template <class Kind, int R>
void sum_rows(const uint8_t* const* rows, const uint8_t* b, const Walk& w, int32_t* sums) {
  const uint8_t* a[R];
  __m256i acc[R][2];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    a[r] = rows[r];
    acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  }
  if (Kind::kNarrow) std::memset(sums, 0, R * kColumns * sizeof(int32_t));
  const int64_t a_step = w.a_step, b_step = w.b_step;
  int64_t left = w.most;
  for (int64_t block = 0; block < w.blocks; ++block)
    for (int64_t run = 0; run < w.runs; ++run) {
      int64_t at = block * w.a_block + run * w.a_run;
      const uint8_t* right = b + block * w.b_block + run * w.b_run;
      for (int64_t rest = w.steps; rest > 0;) {
        int64_t now = rest;
        if (Kind::kNarrow) {
          if (left == 0) {
            widen_sums<R>(acc, sums);
            left = w.most;
          }
          now = rest < left ? rest : left;
          left -= now;
        }
        rest -= now;
#pragma GCC unroll 2
        for (; now > 0; --now, at += a_step, right += b_step) {
          const __m256i b0 = load_vector(right), b1 = load_vector(right + 32);
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
            int32_t step;
            std::memcpy(&step, a[r] + at, 4);
            const __m256i four = _mm256_set1_epi32(step);
            acc[r][0] = Kind::add(acc[r][0], four, b0);
            acc[r][1] = Kind::add(acc[r][1], four, b1);
          }
        }
      }
    }
  if (Kind::kNarrow) {
    widen_sums<R>(acc, sums);
  } else {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      store_vector(sums + r * kColumns, acc[r][0]);
      store_vector(sums + r * kColumns + 8, acc[r][1]);
    }
  }
}

template <class Kind>
void sum_tile(int64_t count, const uint8_t* const* rows, const uint8_t* b, const Walk& w, int32_t* sums) {
  switch (count) {
    case 1: return sum_rows<Kind, 1>(rows, b, w, sums);
    case 2: return sum_rows<Kind, 2>(rows, b, w, sums);
    case 3: return sum_rows<Kind, 3>(rows, b, w, sums);
    case 4: return sum_rows<Kind, 4>(rows, b, w, sums);
    case 5: return sum_rows<Kind, 5>(rows, b, w, sums);
    default: return sum_rows<Kind, 6>(rows, b, w, sums);
  }
}

// ---- numbers into the form that tiles are made of ----

// Sixteen numbers as int16.
inline __m256i words(const uint16_t* x, float inverse_unit) {  // bfloat16
  const __m256 unit = _mm256_set1_ps(inverse_unit);
  auto eight = [&](const uint16_t* p) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(p)), 16);
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(bits), unit));
  };
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(eight(x), eight(x + 8)), 0xD8);
}
inline __m256i words(const int8_t* x, float) { return _mm256_cvtepi8_epi16(load_half(x)); }
inline __m256i words(const uint8_t* x, float) { return _mm256_cvtepu8_epi16(load_half(x)); }

inline void store_numbers(__m256i x, int32_t, int16_t* out) { store_vector(out, x); }
inline void store_numbers(__m256i x, int32_t offset, uint8_t* out) {  // modulo 256: a signed number where there is no offset
  const __m256i sum = _mm256_and_si256(_mm256_add_epi16(x, _mm256_set1_epi16(static_cast<int16_t>(offset))),
                                       _mm256_set1_epi16(255));
  store_half(out, _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi16(sum, sum), 0xD8)));
}

// out[i] = x[i] / unit + offset, for `count` numbers.
template <typename From, typename To>
void convert_row(const From* x, float inverse_unit, int32_t offset, int64_t count, To* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store_numbers(words(x + i, inverse_unit), offset, out + i);
  if (i == count) return;
  From last[16] = {};
  To converted[16];
  std::memcpy(last, x + i, static_cast<size_t>(count - i) * sizeof(From));
  store_numbers(words(last, inverse_unit), offset, converted);
  std::memcpy(out + i, converted, static_cast<size_t>(count - i) * sizeof(To));
}

// One step of sixteen neighbours: the rows of numbers that the terms come from, side by side.
FOURBIT_INLINE void interleave(const __m256i* terms, uint8_t* out, In16) {
  const __m256i low = _mm256_unpacklo_epi16(terms[0], terms[1]), high = _mm256_unpackhi_epi16(terms[0], terms[1]);
  store_vector(out, _mm256_permute2x128_si256(low, high, 0x20));
  store_vector(out + 32, _mm256_permute2x128_si256(low, high, 0x31));
}

FOURBIT_INLINE void interleave(const __m128i* terms, uint8_t* out) {
  for (int half = 0; half < 2; ++half) {
    const __m128i a = half ? _mm_unpackhi_epi8(terms[0], terms[1]) : _mm_unpacklo_epi8(terms[0], terms[1]);
    const __m128i b = half ? _mm_unpackhi_epi8(terms[2], terms[3]) : _mm_unpacklo_epi8(terms[2], terms[3]);
    store_half(out + 32 * half, _mm_unpacklo_epi16(a, b));
    store_half(out + 32 * half + 16, _mm_unpackhi_epi16(a, b));
  }
}
template <bool kLeft>
FOURBIT_INLINE void interleave(const __m128i* terms, uint8_t* out, In8<kLeft>) { interleave(terms, out); }

// Sixteen numbers / unit of `kTerms` rows side by side, `count` of each; null: a row of zeros. `line`: in whole sixteens of steps.
template <typename From>
inline __m256i as_row(const From* x, float inverse_unit, In16) { return words(x, inverse_unit); }
template <typename From, bool kLeft>
inline __m128i as_row(const From* x, float inverse_unit, In8<kLeft>) {
  uint8_t bytes[16];
  store_numbers(words(x, inverse_unit), 0, bytes);
  return load_half(bytes);
}

template <class Kind, typename From>
void interleave_rows(const From* const* rows, float inverse_unit, int64_t count, uint8_t* line) {
  static const From zeros[kColumns] = {};
  for (int64_t i = 0; i < count; i += kColumns) {
    decltype(as_row(rows[0], 1.0f, Kind{})) terms[Kind::kTerms];
#pragma GCC unroll 4
    for (int k = 0; k < Kind::kTerms; ++k) {
      const From* x = rows[k] ? rows[k] + i : zeros;
      if (rows[k] && count - i < kColumns) {
        From some[kColumns] = {};
        std::memcpy(some, x, static_cast<size_t>(count - i) * sizeof(From));
        terms[k] = as_row(some, inverse_unit, Kind{});
      } else {
        terms[k] = as_row(x, inverse_unit, Kind{});
      }
    }
    interleave(terms, line + 4 * i, Kind{});
  }
}

// Steps of all rows, `line` bytes each, to the tiles that they belong to, which lie `stride` bytes apart.
inline void scatter_steps(const uint8_t* lines, int64_t line, int64_t steps, int64_t tiles, int64_t height, int64_t stride,
                          uint8_t* out) {
  for (int64_t tile = 0; tile < tiles; ++tile)
    for (int64_t step = 0; step < steps; ++step)
      std::memcpy(out + tile * stride + step * kRows * 4, lines + step * line + tile * height * 4, kRows * 4);
}

// Calls f with the type of the numbers at x.
template <class F>
void with_numbers(const void* x, int32_t dtype, F f) {
  if (dtype == kBFloat16) f(static_cast<const uint16_t*>(x));
  else if (dtype == kUInt8) f(static_cast<const uint8_t*>(x));
  else f(static_cast<const int8_t*>(x));
}

// Up to sixteen integers of 8 bits as they are interleaved; `offset` goes to bytes.
inline __m128i sixteen(const int8_t* x, int64_t count) {
  if (count >= kColumns) return load_half(x);
  int8_t some[kColumns] = {};
  if (count > 0) std::memcpy(some, x, static_cast<size_t>(count));
  return load_half(some);
}
inline __m256i as_terms(__m128i x, int32_t, In16) { return _mm256_cvtepi8_epi16(x); }
template <bool kLeft>
inline __m128i as_terms(__m128i x, int32_t offset, In8<kLeft>) {
  return _mm_add_epi8(x, _mm_set1_epi8(static_cast<char>(offset)));
}

// Panels that lie side by side, `stride` bytes from one to the next, of `count` columns together: term k of the sum is the row of
// numbers at row(k), `depth` of them. `sums`: of every column, or null.
template <class Kind, class Row>
void pack_panels_of(Row row, int64_t depth, int64_t panels, int64_t count, int32_t offset, uint8_t* out, int64_t stride,
                    int32_t* sums) {
  for (int64_t k = 0; k < depth; k += Kind::kTerms, out += kStepBytes) {
    const int8_t* rows[Kind::kTerms] = {};
    for (int i = 0; i < Kind::kTerms && k + i < depth; ++i) rows[i] = row(k + i);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t column = panel * kColumns;
      decltype(as_terms(__m128i{}, 0, Kind{})) terms[Kind::kTerms];
#pragma GCC unroll 4
      for (int i = 0; i < Kind::kTerms; ++i) {
        const __m128i x = rows[i] ? sixteen(rows[i] + column, count - column) : _mm_setzero_si128();
        terms[i] = as_terms(x, offset, Kind{});
        if (!sums) continue;
        int32_t* to = sums + column;
        store_vector(to, _mm256_add_epi32(load_vector(to), _mm256_cvtepi8_epi32(x)));
        store_vector(to + 8, _mm256_add_epi32(load_vector(to + 8), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))));
      }
      interleave(terms, out + panel * stride, Kind{});
    }
  }
}

template <class Kind, class Row>
void pack_panel(Row row, int64_t depth, int64_t count, int32_t offset, uint8_t* out, int32_t* sums) {
  pack_panels_of<Kind>(row, depth, 1, count, offset, out, 0, sums);
}

// Four steps of one column.
inline __m128i four_steps(const int8_t* x, int64_t count, In16) {
  int8_t some[8] = {};
  std::memcpy(some, x, static_cast<size_t>(least(count, 8)));
  return _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(some)));
}
template <bool kLeft>
inline __m128i four_steps(const int8_t* x, int64_t count, In8<kLeft>) { return sixteen(x, count); }

// The same where the terms of a column are neighbours: column c is the row of numbers at w + c * stride.
template <class Kind>
void pack_columns(const int8_t* w, int64_t stride, int64_t depth, int64_t count, uint8_t* out, int32_t* sums) {
  const int64_t steps = ceil_div(depth, Kind::kTerms);
  for (int64_t step = 0; step < steps; step += 4)
    for (int64_t c = 0; c < kColumns; c += 4) {
      __m128i x[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t k = step * Kind::kTerms;
        x[i] = c + i < count ? four_steps(w + (c + i) * stride + k, depth - k, Kind{}) : _mm_setzero_si128();
      }
      const __m128i a = _mm_unpacklo_epi32(x[0], x[1]), b = _mm_unpacklo_epi32(x[2], x[3]);
      const __m128i d = _mm_unpackhi_epi32(x[0], x[1]), e = _mm_unpackhi_epi32(x[2], x[3]);
      const __m128i turned[4] = {_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b), _mm_unpacklo_epi64(d, e),
                                 _mm_unpackhi_epi64(d, e)};
      for (int64_t i = 0; i < 4 && step + i < steps; ++i) store_half(out + (step + i) * kStepBytes + 4 * c, turned[i]);
    }
  if (!sums) return;
  for (int64_t c = 0; c < kColumns && c < count; ++c) {
    const int8_t* column = w + c * stride;
    int32_t sum = 0;
    for (int64_t k = 0; k < depth; ++k) sum += column[k];
    sums[c] += sum;
  }
}

// ---- results ----

// Eight sums, less what the offset put in, as float32: rounded once.
FOURBIT_INLINE __m256 as_floats(const int32_t* sums, const int32_t* extra) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(load_vector(sums), load_vector(extra)));
}
FOURBIT_INLINE __m256 as_floats(const double* sums, const int32_t* extra) {
  auto four = [&](int i) {
    const __m256d less = _mm256_cvtepi32_pd(load_half(extra + i));
    return _mm256_cvtpd_ps(_mm256_sub_pd(_mm256_loadu_pd(sums + i), less));
  };
  return _mm256_set_m128(four(4), four(0));
}

// As float_nearest (rounding.h), for eight numbers.
FOURBIT_INLINE __m256 nearest_eight(__m256 s, const FloatGrid& g) {
  const __m256 sign = _mm256_set1_ps(-0.0f), most = _mm256_set1_ps(2.0f * g.max);
  const __m256 x = _mm256_min_ps(most, _mm256_max_ps(_mm256_xor_ps(most, sign), s));
  const __m256i exponent = _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7F800000)),
                                            _mm256_set1_epi32(g.lowest << 23));
  const __m256i quanta = _mm256_set1_epi32(((23 - g.mantissa_bits) << 23) | 0x400000);
  const __m256 m = _mm256_castsi256_ps(_mm256_add_epi32(exponent, quanta));
  __m256 y = _mm256_sub_ps(_mm256_add_ps(x, m), m);
  const __m256 magnitude = _mm256_andnot_ps(sign, x), smallest = _mm256_set1_ps(g.smallest);
  const __m256 counts = _mm256_cmp_ps(magnitude, _mm256_set1_ps(0.5f * g.smallest), _CMP_GT_OQ);
  const __m256 tiny = _mm256_and_ps(counts, _mm256_or_ps(smallest, _mm256_and_ps(x, sign)));
  y = _mm256_blendv_ps(y, tiny, _mm256_cmp_ps(magnitude, smallest, _CMP_LT_OQ));
  y = _mm256_min_ps(_mm256_set1_ps(g.max), _mm256_max_ps(_mm256_set1_ps(g.min), y));
  const __m256 over = _mm256_cmp_ps(_mm256_andnot_ps(sign, s), _mm256_set1_ps(g.overflow), _CMP_GE_OQ);
  const __m256 infinite = _mm256_or_ps(_mm256_set1_ps(std::numeric_limits<float>::infinity()), _mm256_and_ps(s, sign));
  return _mm256_blendv_ps(y, infinite, over);
}

// As to_halves (numbers.h), for sixteen numbers that are scaled already.
FOURBIT_INLINE __m256i halves_of(__m256 low, __m256 high, const Half& h) {
  auto eight = [&](__m256 x) {
    const __m256i bits = _mm256_castps_si256(x), magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, h.shift), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(magnitude, _mm256_set1_epi32((1 << (h.shift - 1)) - 1)), odd);
    __m256i code = _mm256_sub_epi32(_mm256_srli_epi32(up, h.shift), _mm256_set1_epi32(h.bias));
    const __m256i counts = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(h.half_smallest));
    code = _mm256_max_epi32(code, _mm256_srli_epi32(counts, 31));
    code = _mm256_min_epi32(code, _mm256_set1_epi32(h.largest));
    return _mm256_or_si256(code, _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x8000)));
  };
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(eight(low), eight(high)), 0xD8);
}

inline void store_floats(__m256 low, __m256 high, int64_t count, float* out) {
  if (count >= kColumns) {
    _mm256_storeu_ps(out, low);
    _mm256_storeu_ps(out + 8, high);
    return;
  }
  float some[kColumns];
  _mm256_storeu_ps(some, low);
  _mm256_storeu_ps(some + 8, high);
  std::memcpy(out, some, static_cast<size_t>(count) * 4);
}

}  // namespace
}  // namespace fourbit
