// Rounding kernels. Compiled once per instruction set (FOURBIT_ISA names it): plain loops over blocks of 64 elements that
// the compiler vectorises. Must be built with -ffp-contract=off and without -ffast-math: the numbers are defined bit by bit.
#include <cmath>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "rounding.h"

namespace fourbit {
namespace {

inline float load(const float* p) { return *p; }
inline float load(const uint16_t* p) { return as_float(static_cast<int32_t>(static_cast<uint32_t>(*p) << 16)); }

inline void store(float* p, float x) { *p = x; }
inline void store(uint16_t* p, float x) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = static_cast<uint32_t>(as_bits(x));
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  *p = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}
inline void store(int8_t* p, float x) { *p = static_cast<int8_t>(static_cast<int32_t>(x)); }

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

// ---- integers, with clipping ----

template <typename T>
void clip_block(const Clip& c, const T* x, int64_t begin, int count, int32_t& largest) {
  int8_t q[kBlock];
  uint8_t m[kBlock];
  const float inv = c.inv_scale, low = c.low, high = c.high, bound = c.bound;
  int32_t top = largest;
  for (int i = 0; i < count; ++i) {
    const float t = load(x + i);
    top = max_of(top, as_bits(t) & 0x7FFFFFFF);
    float y = t * inv;
    y = y > low ? y : low;  // NaN becomes low
    y = y < high ? y : high;
    q[i] = static_cast<int8_t>(static_cast<int32_t>(round_even(y)));
  }
  largest = top;
  if (c.mask) {
    if (c.mask_rule == 1) {
      for (int i = 0; i < count; ++i) { const float t = load(x + i); m[i] = (t >= 0.0f) & (t < bound); }
    } else if (c.mask_rule == 2) {
      for (int i = 0; i < count; ++i) { const float t = load(x + i); m[i] = (t > -bound) & (t < bound); }
    } else {
      for (int i = 0; i < count; ++i) { const float t = load(x + i); m[i] = (t >= -bound) & (t <= bound); }
    }
    for (int i = count; i < kBlock; ++i) m[i] = 0;
    pack_bits(m, c.mask + begin / 8);
  }
  if (c.packed) {
    for (int i = count; i < kBlock; ++i) q[i] = 0;
    uint8_t* out = c.packed + begin / 2;
    for (int i = 0; i < 32; ++i) out[i] = static_cast<uint8_t>((q[i] & 15) | (q[i + 32] << 4));
  }
  if (c.codes) std::memcpy(c.codes + begin, q, static_cast<size_t>(count));
}

template <typename T>
float clip_typed(const Clip* c) {
  struct Task { const Clip* c; Largest largest; } task{c, {}};
  const int pieces = parallel(c->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const T* x = static_cast<const T*>(t.c->x);
    int32_t largest = 0;
    int64_t i = begin;
    for (; i + kBlock <= end; i += kBlock) clip_block(*t.c, x + i, i, kBlock, largest);
    if (i < end) clip_block(*t.c, x + i, i, static_cast<int>(end - i), largest);
    t.largest.of[thread] = largest;
  }, &task);
  return task.largest.get(pieces);
}

float clip(const Clip* c) { return c->dtype == kBFloat16 ? clip_typed<uint16_t>(c) : clip_typed<float>(c); }

// ---- powers of a radix ----

// The bits of the nearest power's magnitude, 0 below the first decision point.
inline int32_t log_nearest(int32_t bits, const LogGrid& g) {
  const int32_t magnitude = bits & 0x7FFFFFFF;
  int32_t y = ((magnitude - g.start) & -g.octaves) + g.smallest;
  y = min_of(y, g.largest);
  return magnitude >= g.start ? y : 0;
}

template <typename T>
void log_block(const LogRound& r, const T* x, int64_t begin, int count, int32_t& largest) {
  const float inv = r.inv_scale;
  int32_t top = largest;
  int32_t bits[kBlock];
  for (int i = 0; i < count; ++i) {
    const float t = load(x + i);
    top = max_of(top, as_bits(t) & 0x7FFFFFFF);
    bits[i] = as_bits(t * inv);
  }
  largest = top;
  for (int k = 0; k < r.num; ++k) {
    const LogGrid g = r.grid[k];
    uint16_t* out = r.out[k] + begin;
    if (!r.stochastic) {
      for (int i = 0; i < count; ++i)
        out[i] = static_cast<uint16_t>((log_nearest(bits[i], g) >> 16) | ((bits[i] >> 16) & 0x8000));
      continue;
    }
    float u[kBlock];
    draw(r.key[k], begin, count, u);
    const float ratio = as_float(0x3F800000 + g.octaves), smallest = as_float(g.smallest), most = as_float(g.largest);
    for (int i = 0; i < count; ++i) {
      const float s = as_float(bits[i]);
      const int32_t magnitude = bits[i] & 0x7FFFFFFF;
      int32_t y = min_of(((magnitude - g.smallest) & -g.octaves) + g.smallest, g.largest);
      const float near = magnitude >= g.smallest ? as_float(y) : 0.0f;
      float far = near > 0.0f ? near * ratio : smallest;
      far = far < most ? far : most;
      far = near == as_float(magnitude) ? near : far;
      // As the reference: towards +infinity with probability (x - low) / (high - low).
      const bool negative = s < 0.0f;
      const float low = negative ? -far : near, high = negative ? -near : far;
      const float inside = clamp(s, -most, most);
      const float threshold = (inside - low) / (high - low) * 16777216.0f;
      const float q = u[i] < threshold ? high : low;
      out[i] = static_cast<uint16_t>(static_cast<uint32_t>(as_bits(q)) >> 16);
    }
  }
}

template <typename T>
float log_typed(const LogRound* r) {
  struct Task { const LogRound* r; Largest largest; } task{r, {}};
  const int pieces = parallel(r->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const T* x = static_cast<const T*>(t.r->x);
    int32_t largest = 0;
    int64_t i = begin;
    for (; i + kBlock <= end; i += kBlock) log_block(*t.r, x + i, i, kBlock, largest);
    if (i < end) log_block(*t.r, x + i, i, static_cast<int>(end - i), largest);
    t.largest.of[thread] = largest;
  }, &task);
  return task.largest.get(pieces);
}

float log_round(const LogRound* r) { return r->dtype == kBFloat16 ? log_typed<uint16_t>(r) : log_typed<float>(r); }

// ---- binary floats ----

template <typename T, typename O>
float float_typed(const FloatRound* r) {
  struct Task { const FloatRound* r; Largest largest; } task{r, {}};
  const int pieces = parallel(r->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const T* x = static_cast<const T*>(t.r->x);
    O* out = static_cast<O*>(t.r->out);
    const FloatGrid g = t.r->grid;
    const float inv = t.r->inv_scale;
    int32_t top = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float v = load(x + i), s = v * inv;
      top = max_of(top, as_bits(v) & 0x7FFFFFFF);
      const float y = float_nearest(s, g);
      store(out + i, s != s ? s : y);
    }
    t.largest.of[thread] = top;
  }, &task);
  return task.largest.get(pieces);
}

float float_round(const FloatRound* r) {
  if (r->dtype == kBFloat16)
    return r->out_dtype == kBFloat16 ? float_typed<uint16_t, uint16_t>(r) : float_typed<uint16_t, float>(r);
  return r->out_dtype == kBFloat16 ? float_typed<float, uint16_t>(r) : float_typed<float, float>(r);
}

// ---- any grid, by its table ----

template <typename T, typename O>
float table_typed(const TableRound* r) {
  struct Task { const TableRound* r; Largest largest; } task{r, {}};
  const int pieces = parallel(r->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const TableRound& r = *t.r;
    const T* x = static_cast<const T*>(r.x);
    O* out = static_cast<O*>(r.out);
    const float* levels = r.levels;
    const int last = r.num_levels - 1;
    const float lowest = levels[0], highest = levels[last], infinity = std::numeric_limits<float>::infinity();
    int32_t top = 0;
    for (int64_t i = begin; i < end; i += kBlock) {
      const int count = static_cast<int>(end - i < kBlock ? end - i : kBlock);
      float s[kBlock], u[kBlock];
      int32_t index[kBlock];
      for (int j = 0; j < count; ++j) {
        const float v = load(x + i + j);
        top = max_of(top, as_bits(v) & 0x7FFFFFFF);
        s[j] = v * r.inv_scale;
        index[j] = 0;
      }
      const float* edges = r.stochastic ? levels + 1 : r.boundaries;
      if (last <= 32) {  // count the edges below: vectorises over the elements
        for (int k = 0; k < last; ++k) {
          const float edge = edges[k];
          if (r.stochastic)
            for (int j = 0; j < count; ++j) index[j] += s[j] >= edge;
          else
            for (int j = 0; j < count; ++j) index[j] += s[j] > edge;
        }
      } else {
        for (int j = 0; j < count; ++j) {
          int low = 0, high = last;
          while (low < high) {
            const int middle = (low + high) / 2;
            if (r.stochastic ? s[j] >= edges[middle] : s[j] > edges[middle]) low = middle + 1;
            else high = middle;
          }
          index[j] = low;
        }
      }
      if (r.stochastic) {
        draw(r.key, i, count, u);
        for (int j = 0; j < count; ++j) {
          const float inside = clamp(s[j], lowest, highest);
          const float low = levels[index[j]];
          const float high = low >= inside || index[j] == last ? low : levels[index[j] + 1];
          const float threshold = (inside - low) / (high - low) * 16777216.0f;
          const float y = u[j] < threshold ? high : low;
          store(out + i + j, s[j] != s[j] ? s[j] : y);
        }
      } else {
        for (int j = 0; j < count; ++j) {
          float y = levels[index[j]];
          const float size = as_float(as_bits(s[j]) & 0x7FFFFFFF);
          y = size >= r.overflow ? (s[j] < 0.0f ? -infinity : infinity) : y;
          store(out + i + j, s[j] != s[j] ? s[j] : y);
        }
      }
    }
    t.largest.of[thread] = top;
  }, &task);
  return task.largest.get(pieces);
}

template <typename T>
float table_out(const TableRound* r) {
  if (r->out_dtype == kBFloat16) return table_typed<T, uint16_t>(r);
  if (r->out_dtype == kFloat32) return table_typed<T, float>(r);
  return table_typed<T, int8_t>(r);
}

float table_round(const TableRound* r) {
  return r->dtype == kBFloat16 ? table_out<uint16_t>(r) : table_out<float>(r);
}

// ---- packed codes ----

// The integers of one block, -8..7 or 0..15.
inline void unpack_block(const uint8_t* packed, int32_t is_signed, int8_t* q) {
  const int8_t flip = is_signed ? 8 : 0;  // (nibble ^ 8) - 8 extends the sign
  for (int i = 0; i < 32; ++i) {
    q[i] = static_cast<int8_t>(((packed[i] & 15) ^ flip) - flip);
    q[i + 32] = static_cast<int8_t>(((packed[i] >> 4) ^ flip) - flip);
  }
}

template <typename O>
void unpack_typed(const Unpack* u) {
  parallel(u->n, kBlock, [](int64_t begin, int64_t end, int, void* p) {
    const Unpack& u = *static_cast<const Unpack*>(p);
    O* out = static_cast<O*>(u.out);
    for (int64_t i = begin; i < end; i += kBlock) {
      int8_t q[kBlock];
      unpack_block(u.packed + i / 2, u.is_signed, q);
      const int count = static_cast<int>(end - i < kBlock ? end - i : kBlock);
      if (sizeof(O) == 1) {
        std::memcpy(out + i, q, static_cast<size_t>(count));
      } else if (sizeof(O) == 2) {  // exact in bfloat16
        for (int j = 0; j < count; ++j) {
          const uint16_t half = static_cast<uint16_t>(static_cast<uint32_t>(as_bits(static_cast<float>(q[j]))) >> 16);
          std::memcpy(out + i + j, &half, 2);
        }
      } else {
        for (int j = 0; j < count; ++j) store(out + i + j, static_cast<float>(q[j]));
      }
    }
  }, const_cast<Unpack*>(u));
}

void unpack(const Unpack* u) {
  if (u->out_dtype == kFloat32) unpack_typed<float>(u);
  else if (u->out_dtype == kBFloat16) unpack_typed<uint16_t>(u);
  else unpack_typed<int8_t>(u);
}

// ---- after a matrix product ----

inline float load(const int32_t* p) { return static_cast<float>(*p); }

// One block; the compiler sees the number of elements, so every loop becomes a few vector instructions.
template <typename T, typename O>
float epilogue_block(const Epilogue& e, const T* x, const int32_t* high, int64_t begin, O* out) {
  const float scale = e.scale, post = e.post;
  float v[kBlock];
  if (high) {  // the sum of the two halves is exact in double precision, and rounded to float32 once
    for (int j = 0; j < kBlock; ++j)
      v[j] = static_cast<float>(256.0 * high[j] + static_cast<double>(x[j])) * scale;
  } else {
    for (int j = 0; j < kBlock; ++j) v[j] = load(x + j) * scale;
  }
  if (e.rounds) {
    const FloatGrid g = e.grid;
    if (e.keep_infinite) {
      for (int j = 0; j < kBlock; ++j) {
        const float y = float_nearest(v[j], g);
        v[j] = ((as_bits(v[j]) & 0x7FFFFFFF) >= 0x7F800000 ? v[j] : y) * post;
      }
    } else {
      for (int j = 0; j < kBlock; ++j) {
        const float y = float_nearest(v[j], g);
        v[j] = (v[j] != v[j] ? v[j] : y) * post;
      }
    }
  } else if (post != 1.0f) {
    for (int j = 0; j < kBlock; ++j) v[j] *= post;
  }
  float sum = 0.0f;
  if (e.mask) {
    int32_t m[kBlock];
    expand_bits(e.mask + begin / 8, m);
    if (e.packed) {
      int8_t q[kBlock];
      float part[16] = {};
      unpack_block(e.packed + begin / 2, e.is_signed, q);
      for (int j = 0; j < kBlock; j += 16)
        for (int k = 0; k < 16; ++k) {
          const int32_t code = q[j + k];
          const float clipped = as_float(as_bits(v[j + k]) & ~m[j + k]);
          part[k] += code > 0 ? clipped : (code < 0 ? -clipped : 0.0f);
        }
      for (int j = 0; j < 16; ++j) sum += part[j];
    }
    for (int j = 0; j < kBlock; ++j) v[j] = as_float(as_bits(v[j]) & m[j]);
  }
  for (int j = 0; j < kBlock; ++j) store(out + j, v[j]);
  return sum;
}

template <typename T, typename O>
double epilogue_typed(const Epilogue* e) {
  struct Task { const Epilogue* e; double sum[kMaxThreads]; } task{e, {}};
  const int pieces = parallel(e->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const Epilogue& e = *t.e;
    const T* x = static_cast<const T*>(e.x);
    O* out = static_cast<O*>(e.out);
    double total = 0.0;
    int64_t i = begin;
    for (; i + kBlock <= end; i += kBlock) total += epilogue_block(e, x + i, e.high ? e.high + i : nullptr, i, out + i);
    if (i < end) {  // the rest, in a block of its own
      const size_t count = static_cast<size_t>(end - i);
      T rest[kBlock] = {};
      int32_t high[kBlock] = {};
      O result[kBlock];
      std::memcpy(rest, x + i, count * sizeof(T));
      if (e.high) std::memcpy(high, e.high + i, count * sizeof(int32_t));
      total += epilogue_block(e, rest, e.high ? high : nullptr, i, result);
      std::memcpy(out + i, result, count * sizeof(O));
    }
    t.sum[thread] = total;
  }, &task);
  double total = 0.0;
  for (int i = 0; i < pieces; ++i) total += task.sum[i];
  return total;
}

template <typename T>
double epilogue_out(const Epilogue* e) {
  return e->out_dtype == kBFloat16 ? epilogue_typed<T, uint16_t>(e) : epilogue_typed<T, float>(e);
}

double epilogue(const Epilogue* e) {
  if (e->dtype == kInt32) return epilogue_out<int32_t>(e);
  return e->dtype == kBFloat16 ? epilogue_out<uint16_t>(e) : epilogue_out<float>(e);
}

// ---- two int8 halves ----

void split(const Split* s) {
  parallel(s->n, kBlock, [](int64_t begin, int64_t end, int, void* p) {
    const Split& s = *static_cast<const Split*>(p);
    const float unit = s.unit;
    for (int64_t i = begin; i < end; i += kBlock) {
      const int count = static_cast<int>(end - i < kBlock ? end - i : kBlock);
      int32_t v[kBlock] = {};
      if (count == kBlock) {
        for (int j = 0; j < kBlock; ++j) v[j] = static_cast<int32_t>(load(s.x + i + j) * unit);
      } else {
        for (int j = 0; j < count; ++j) v[j] = static_cast<int32_t>(load(s.x + i + j) * unit);
      }
      int8_t high[kBlock], low[kBlock];
      for (int j = 0; j < kBlock; ++j) {
        const int32_t h = (v[j] + ((v[j] >> 31) & 255)) >> 8;  // v / 256, towards zero
        high[j] = static_cast<int8_t>(h);
        low[j] = static_cast<int8_t>(v[j] - 256 * h);
      }
      std::memcpy(s.high + i, high, static_cast<size_t>(count));
      std::memcpy(s.low + i, low, static_cast<size_t>(count));
    }
  }, const_cast<Split*>(s));
}

// ---- moments ----

template <typename T>
Moments moments_typed(const void* data, int64_t n) {
  struct Task { const T* x; Moments part[kMaxThreads]; Largest largest; } task{static_cast<const T*>(data), {}, {}};
  const int pieces = parallel(n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    double square[16] = {}, absolute[16] = {};
    int32_t top = 0;
    int64_t i = begin;
    for (; i + 16 <= end; i += 16)
      for (int j = 0; j < 16; ++j) {
        const float v = load(t.x + i + j);
        const int32_t magnitude = as_bits(v) & 0x7FFFFFFF;
        const double a = as_float(magnitude);
        top = max_of(top, magnitude);
        square[j] += a * a;
        absolute[j] += a;
      }
    for (; i < end; ++i) {
      const int32_t magnitude = as_bits(load(t.x + i)) & 0x7FFFFFFF;
      const double a = as_float(magnitude);
      top = max_of(top, magnitude);
      square[0] += a * a;
      absolute[0] += a;
    }
    Moments m{0.0, 0.0, 0.0f};
    for (int j = 0; j < 16; ++j) {
      m.sum_square += square[j];
      m.sum_abs += absolute[j];
    }
    t.part[thread] = m;
    t.largest.of[thread] = top;
  }, &task);
  Moments total{0.0, 0.0, task.largest.get(pieces)};
  for (int i = 0; i < pieces; ++i) {
    total.sum_square += task.part[i].sum_square;
    total.sum_abs += task.part[i].sum_abs;
  }
  return total;
}

Moments moments(const void* x, int32_t dtype, int64_t n) {
  return dtype == kBFloat16 ? moments_typed<uint16_t>(x, n) : moments_typed<float>(x, n);
}

}  // namespace

extern const Table FOURBIT_JOIN(FOURBIT_ISA, _table) = {
    clip, log_round, float_round, table_round, unpack, epilogue, split, moments, FOURBIT_JOIN(FOURBIT_ISA, _accumulate)};

}  // namespace fourbit
