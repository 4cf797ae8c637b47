// Rounding kernels. Compiled once per instruction set (FOURBIT_ISA names it): plain loops over blocks of 64 elements that
// the compiler vectorises.
#include "numbers.h"

namespace fourbit {
namespace {

// ---- integers, with clipping ----

template <bool full, typename T>
FOURBIT_BLOCK void clip_block(const Clip& c, const T* x, int64_t begin, int rest, int32_t* top) {
  const int count = full ? kBlock : rest;
  float t[kBlock];
  int8_t q[kBlock];
  for (int i = 0; i < count; ++i) t[i] = load(x + i);
  for (int i = count; i < kBlock; ++i) t[i] = 0.0f;
  raise_magnitudes(t, top);
  clip_codes(t, c.inv_scale, c.low, c.high, q);
  if (c.mask) store_bits(c.mask + begin / 8, inside_range(t, c.mask_rule, c.bound) & first_bits(count));
  for (int i = count; i < kBlock; ++i) q[i] = 0;
  if (c.packed) pack_codes(q, c.packed + begin / 2);
  if (c.codes) std::memcpy(c.codes + begin, q, static_cast<size_t>(count));
}

template <typename T>
float clip_typed(const Clip* c) {
  struct Task { const Clip* c; Largest largest; } task{c, {}};
  const int pieces = parallel(c->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const T* x = static_cast<const T*>(t.c->x);
    int32_t top[16] = {};
    int64_t i = begin;
    for (; i + kBlock <= end; i += kBlock) clip_block<true>(*t.c, x + i, i, kBlock, top);
    if (i < end) clip_block<false>(*t.c, x + i, i, static_cast<int>(end - i), top);
    t.largest.of[thread] = largest_of(top);
  }, &task);
  return task.largest.get(pieces);
}

float clip(const Clip* c) { return c->dtype == kBFloat16 ? clip_typed<uint16_t>(c) : clip_typed<float>(c); }

// ---- powers of a radix ----

template <bool full, typename T>
FOURBIT_BLOCK void log_block(const LogRound& r, const T* x, int64_t begin, int rest, int32_t* top) {
  const int count = full ? kBlock : rest;
  const float inv = r.inv_scale;
  float t[kBlock];
  int32_t bits[kBlock];
  for (int i = 0; i < count; ++i) t[i] = load(x + i);
  for (int i = count; i < kBlock; ++i) t[i] = 0.0f;
  raise_magnitudes(t, top);
  for (int i = 0; i < kBlock; ++i) bits[i] = as_bits(t[i] * inv);
  for (int k = 0; k < r.num; ++k) {
    const LogGrid g = r.grid[k];
    uint16_t* out = r.out[k] + begin;
    if (r.rule == 0) {
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
      int32_t y = min_of(wrapping_sum((magnitude - g.smallest) & -g.octaves, g.smallest), g.largest);
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
      const int32_t nearest = log_nearest(bits[i], g) | (bits[i] & static_cast<int32_t>(0x80000000));
      const int32_t chosen = r.rule == 2 && magnitude >= g.smallest ? nearest : as_bits(q);
      out[i] = static_cast<uint16_t>(static_cast<uint32_t>(chosen) >> 16);
    }
  }
}

template <typename T>
float log_typed(const LogRound* r) {
  struct Task { const LogRound* r; Largest largest; } task{r, {}};
  const int pieces = parallel(r->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const T* x = static_cast<const T*>(t.r->x);
    int32_t top[16] = {};
    int64_t i = begin;
    for (; i + kBlock <= end; i += kBlock) log_block<true>(*t.r, x + i, i, kBlock, top);
    if (i < end) log_block<false>(*t.r, x + i, i, static_cast<int>(end - i), top);
    t.largest.of[thread] = largest_of(top);
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
      const bool draws = r.rule == 1;
      const float* edges = draws ? levels + 1 : r.boundaries;
      if (last <= 32) {  // count the edges below: vectorises over the elements
        for (int k = 0; k < last; ++k) {
          const float edge = edges[k];
          if (draws)
            for (int j = 0; j < count; ++j) index[j] += s[j] >= edge;
          else
            for (int j = 0; j < count; ++j) index[j] += s[j] > edge;
        }
      } else {
        for (int j = 0; j < count; ++j) {
          int low = 0, high = last;
          while (low < high) {
            const int middle = (low + high) / 2;
            if (draws ? s[j] >= edges[middle] : s[j] > edges[middle]) low = middle + 1;
            else high = middle;
          }
          index[j] = low;
        }
      }
      if (draws) {
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
        if (r.rule == 2) {
          draw(r.key, i, count, u);
          for (int j = 0; j < count; ++j) {
            if (!(as_float(as_bits(s[j]) & 0x7FFFFFFF) < r.smallest)) continue;
            const int at = s[j] < 0.0f ? max_of(r.zero - 1, 0) : r.zero;
            const float low = levels[at], high = at == last || (s[j] < 0.0f && r.zero == 0) ? low : levels[at + 1];
            const float threshold = (clamp(s[j], lowest, highest) - low) / (high - low) * 16777216.0f;
            store(out + i + j, u[j] < threshold ? high : low);
          }
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
void epilogue_block(const Epilogue& e, const T* x, const int32_t* high, int64_t begin, O* out, float* part) {
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
  if (e.mask) {
    const uint64_t inside = load_bits(e.mask + begin / 8);
    if (e.packed) {
      int8_t q[kBlock];
      unpack_block(e.packed + begin / 2, e.is_signed, q);
      add_where(v, positive(q) & ~inside, negative(q) & ~inside, part);
    }
    keep(v, inside);
  }
  for (int j = 0; j < kBlock; ++j) store(out + j, v[j]);
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
    float part[16] = {};
    auto flush = [&] {
      for (float& p : part) { total += p; p = 0.0f; }
    };
    for (int pending = 0; i + kBlock <= end; i += kBlock) {
      epilogue_block(e, x + i, e.high ? e.high + i : nullptr, i, out + i, part);
      if (++pending % 64 == 0) flush();
    }
    if (i < end) {  // the rest, in a block of its own
      const size_t count = static_cast<size_t>(end - i);
      T rest[kBlock] = {};
      int32_t high[kBlock] = {};
      O result[kBlock];
      std::memcpy(rest, x + i, count * sizeof(T));
      if (e.high) std::memcpy(high, e.high + i, count * sizeof(int32_t));
      epilogue_block(e, rest, e.high ? high : nullptr, i, result, part);
      std::memcpy(out + i, result, count * sizeof(O));
    }
    flush();
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

// The nearest integer (x * unit may fall short of it by one rounding), saturated; NaN becomes the lowest.
inline int32_t to_int16(float x) {
  x = x > -32768.0f ? x : -32768.0f;
  return static_cast<int32_t>(round_even(x < 32767.0f ? x : 32767.0f));
}

void split(const Split* s) {
  parallel(s->n, kBlock, [](int64_t begin, int64_t end, int, void* p) {
    const Split& s = *static_cast<const Split*>(p);
    const float unit = s.unit;
    for (int64_t i = begin; i < end; i += kBlock) {
      const int count = static_cast<int>(end - i < kBlock ? end - i : kBlock);
      int32_t v[kBlock] = {};
      if (count == kBlock) {
        for (int j = 0; j < kBlock; ++j) v[j] = to_int16(load(s.x + i + j) * unit);
      } else {
        for (int j = 0; j < count; ++j) v[j] = to_int16(load(s.x + i + j) * unit);
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
    clip,  log_round, float_round,               table_round,                unpack, epilogue,
    split, moments,   FOURBIT_ISA::norm_statistics, FOURBIT_ISA::norm_apply, FOURBIT_ISA::norm_backward,
    FOURBIT_JOIN(FOURBIT_ISA, _accumulate), FOURBIT_ISA::lstm_forward, FOURBIT_ISA::lstm_backward};

}  // namespace fourbit
