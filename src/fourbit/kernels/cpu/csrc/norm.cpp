// Batch normalization fused with its neighbours: the rounding of the convolution before it, the residual and the activation
// after it, and the quantization of the next layer's operand; backward the same way round, down to the 4-bit gradients.
//
// Tensors are [rows, channels] with the channels fastest (channels_last). Blocks of 64 elements start at any channel, so
// what belongs to channels lies in tables that go on for 64 entries after the last channel, from the first one again.
#include <memory>
#include <vector>

#include "numbers.h"

namespace fourbit {
namespace {

// Per-channel numbers, repeated for 64 entries more.
struct Channels {
  std::vector<float> of;
  explicit Channels(int32_t channels) : of(static_cast<size_t>(channels) + kBlock) {}
  template <typename F>
  void fill(int32_t channels, F value) {
    for (int32_t c = 0; c < channels; ++c) of[static_cast<size_t>(c)] = value(c);
    for (size_t i = static_cast<size_t>(channels); i < of.size(); ++i) of[i] = of[i - static_cast<size_t>(channels)];
  }
  const float* at(int64_t c) const { return of.data() + c; }
};

// Two sums per channel: float32 within a few hundred rows, float64 beyond.
struct Sums {
  int32_t channels;
  std::vector<float> part;
  std::vector<double> total;
  int pending = 0;
  explicit Sums(int32_t channels)
      : channels(channels), part(2 * (static_cast<size_t>(channels) + kBlock)), total(2 * static_cast<size_t>(channels)) {}
  float* first(int64_t c) { return part.data() + c; }
  float* second(int64_t c) { return part.data() + channels + kBlock + c; }
  void flush() {
    const int64_t width = channels + kBlock;
    for (int which = 0; which < 2; ++which)
      for (int64_t i = 0; i < width; ++i) {
        float& x = part[static_cast<size_t>(which * width + i)];
        total[static_cast<size_t>(which * channels + i % channels)] += x;
        x = 0.0f;
      }
    pending = 0;
  }
  void block_done() {
    if (++pending >= 256 + channels) flush();
  }
};

// Runs block(i, count, channel of i, state) for each block of a range.
template <typename F>
void each_block(int64_t begin, int64_t end, int32_t channels, F block) {
  int64_t c = begin % channels;
  const int64_t step = kBlock % channels;
  for (int64_t i = begin; i < end; i += kBlock) {
    block(i, static_cast<int>(end - i < kBlock ? end - i : kBlock), c);
    c += step;
    if (c >= channels) c -= channels;
  }
}

inline void merge(std::vector<std::unique_ptr<Sums>>& all, int32_t channels, std::vector<double>& total) {
  total.assign(2 * static_cast<size_t>(channels), 0.0);
  for (auto& sums : all)
    if (sums) {
      sums->flush();
      for (size_t i = 0; i < total.size(); ++i) total[i] += sums->total[i];
    }
}

// ---- forward ----

struct StatisticsTask {
  const NormStatistics* s;
  const Channels* shift;
  std::vector<std::unique_ptr<Sums>> sums;
};

struct ApplyTask {
  const NormApply* a;
  const Channels *slope, *offset;
  Largest largest;
};

// v of kept codes or float32.
FOURBIT_INLINE void load_kept(const void* kept, bool halves, const Half& h, int64_t i, int count, float* v) {
  if (halves) {
    const uint16_t* p = static_cast<const uint16_t*>(kept) + i;
    from_halves(p, h, count, v);
  } else {
    const float* p = static_cast<const float*>(kept) + i;
    for (int j = 0; j < count; ++j) v[j] = p[j];
  }
}

template <bool full>
FOURBIT_BLOCK void statistics_block(const NormStatistics& f, const FloatGrid& g, const Half& h, const Channels& shift, Sums& sums,
                             int64_t i, int rest, int64_t c) {
  const int count = full ? kBlock : rest;
  float v[kBlock];
  const float* y = f.coded ? nullptr : f.y + i;
  const float scale = f.scale;
  if (f.halves) {
    uint16_t* kept = static_cast<uint16_t*>(f.kept) + i;
    if (!f.coded) to_halves(y, scale, h, count, kept);
    from_halves(kept, h, count, v);
  } else {
    if (f.rounds) {
      for (int j = 0; j < count; ++j) v[j] = float_nearest(y[j] * scale, g);
    } else {
      for (int j = 0; j < count; ++j) v[j] = y[j] * scale;
    }
    if (f.kept != f.y || f.rounds || scale != 1.0f) {
      float* kept = static_cast<float*>(f.kept) + i;
      for (int j = 0; j < count; ++j) kept[j] = v[j];
    }
  }
  const float* s = shift.at(c);
  float *first = sums.first(c), *second = sums.second(c);
  for (int j = 0; j < count; ++j) {
    const float d = v[j] - s[j];
    first[j] += d;
    second[j] += d * d;
  }
  sums.block_done();
}

template <bool full>
FOURBIT_BLOCK void apply_block(const NormApply& f, const Half& h, const Channels& a, const Channels& b, int64_t i, int rest,
                        int64_t c, int32_t* top) {
  const int count = full ? kBlock : rest;
  float t[kBlock] = {};
  load_kept(f.kept, f.halves, h, i, count, t);
  const float *as = a.at(c), *bs = b.at(c);
  for (int j = 0; j < count; ++j) t[j] = t[j] * as[j] + bs[j];
  if (f.residual) {
    const float* residual = f.residual + i;
    for (int j = 0; j < count; ++j) t[j] += residual[j];
  }
  uint64_t pass = first_bits(count);
  if (f.act) {
    const float cap = f.cap;
    pass &= compare<kGreater>(t, 0.0f) & compare<kLess>(t, cap);
    for (int j = 0; j < kBlock; ++j) {
      const float x = t[j] < 0.0f ? 0.0f : t[j];  // NaN stays
      t[j] = x > cap ? cap : x;
    }
  }
  raise_magnitudes(t, top);
  if (f.out) {
    float* out = f.out + i;
    for (int j = 0; j < count; ++j) out[j] = t[j];
  }
  if (f.pass) store_bits(f.pass + i / 8, pass);
  if (!f.clips) return;
  int8_t q[kBlock];
  clip_codes(t, f.clip.inv_scale, f.clip.low, f.clip.high, q);
  store_bits(f.clip.mask + i / 8, inside_range(t, f.clip.mask_rule, f.clip.bound) & pass);
  for (int j = count; j < kBlock; ++j) q[j] = 0;
  pack_codes(q, f.clip.packed + i / 2);
  std::memcpy(f.clip.codes + i, q, static_cast<size_t>(count));
}

// ---- backward ----

struct BackwardTask {
  NormBackward* b;
  const Channels *mean, *a, *mean_g, *slope;
  std::vector<std::unique_ptr<Sums>> sums;
  double clipped[kMaxThreads] = {};
  Largest largest;
};

// g of one block; `part`, if wanted, gets what the mask removed.
template <typename T>
FOURBIT_INLINE void gradient_block(const NormBackward& b, int64_t i, int count, float* g, float* part) {
  uint64_t pass = b.pass ? load_bits(b.pass + i / 8) : ~0ull;
  if (b.token) {
    const T* token = static_cast<const T*>(b.token) + i;
    const float scale = b.token_scale;
    for (int j = 0; j < count; ++j) g[j] = load(token + j) * scale;
    for (int j = count; j < kBlock; ++j) g[j] = 0.0f;
    const uint64_t mask = load_bits(b.mask + i / 8);
    if (part || b.out_grad) {
      int8_t q[kBlock];
      unpack_block(b.packed + i / 2, b.is_signed, q);
      const uint64_t up = positive(q), down = negative(q);
      const uint64_t clipped = ~mask & (b.cap_clips ? ~0ull : pass);
      if (part) add_where(g, up & clipped, down & clipped, part);
      if (b.act && !b.pass) pass = mask | up | down;
    }
    keep(g, mask);
  } else {
    for (int j = 0; j < kBlock; ++j) g[j] = 0.0f;
    if (b.packed && b.act && !b.pass) {
      int8_t q[kBlock];
      unpack_block(b.packed + i / 2, b.is_signed, q);
      pass = load_bits(b.mask + i / 8) | positive(q) | negative(q);
    }
  }
  if (b.out_grad) {
    float d[kBlock] = {};
    const float* out_grad = b.out_grad + i;
    for (int j = 0; j < count; ++j) d[j] = out_grad[j];
    keep(d, pass);
    for (int j = 0; j < kBlock; ++j) g[j] += d[j];
  }
}

template <bool full, typename T>
FOURBIT_BLOCK void reduce_block(const NormBackward& b, const Half& h, const Channels& mean, Sums& sums, float* part,
                         int64_t i, int rest, int64_t c) {
  const int count = full ? kBlock : rest;
  float g[kBlock], v[kBlock];
  gradient_block<T>(b, i, count, g, part);
  if (b.g) {
    float* out = b.g + i;
    for (int j = 0; j < count; ++j) out[j] = g[j];
  }
  load_kept(b.kept, b.halves, h, i, count, v);
  const float* m = mean.at(c);
  float *first = sums.first(c), *second = sums.second(c);
  for (int j = 0; j < count; ++j) {
    first[j] += g[j];
    second[j] += g[j] * (v[j] - m[j]);
  }
  sums.block_done();
}

template <bool full, typename T>
FOURBIT_BLOCK void differentiate_block(const NormBackward& b, const Half& h, const BackwardTask& task, int64_t i,
                                int rest, int64_t c, int32_t* top) {
  const int count = full ? kBlock : rest;
  float g[kBlock], v[kBlock];
  if (b.g) {
    const float* stored = b.g + i;
    for (int j = 0; j < count; ++j) g[j] = stored[j];
  } else {
    gradient_block<T>(b, i, count, g, nullptr);
  }
  load_kept(b.kept, b.halves, h, i, count, v);
  const float *m = task.mean->at(c), *a = task.a->at(c), *mean_g = task.mean_g->at(c), *slope = task.slope->at(c);
  for (int j = 0; j < count; ++j) v[j] = a[j] * (g[j] - mean_g[j] - (v[j] - m[j]) * slope[j]);
  for (int j = count; j < kBlock; ++j) v[j] = 0.0f;
  raise_magnitudes(v, top);
  if (!b.num) {
    float* out = static_cast<float*>(b.out[0]) + i;
    for (int j = 0; j < count; ++j) out[j] = v[j];
    return;
  }
  int32_t bits[kBlock];
  for (int j = 0; j < count; ++j) bits[j] = as_bits(v[j] * b.inv_scale);
  for (int k = 0; k < b.num; ++k) {
    const LogGrid grid_k = b.log_grid[k];
    uint16_t* out = static_cast<uint16_t*>(b.out[k]) + i;
    for (int j = 0; j < count; ++j)
      out[j] = static_cast<uint16_t>((log_nearest(bits[j], grid_k) >> 16) | ((bits[j] >> 16) & 0x8000));
  }
}

template <typename T>
float backward_typed(NormBackward* b) {
  const int64_t n = b->rows * b->channels;
  const int32_t channels = b->channels;
  Channels mean(channels), a(channels), mean_g(channels), slope(channels);
  mean.fill(channels, [&](int32_t c) { return b->mean[c]; });
  BackwardTask task{b, &mean, &a, &mean_g, &slope, {}, {}, {}};
  task.sums.resize(kMaxThreads);
  parallel(n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    BackwardTask& t = *static_cast<BackwardTask*>(p);
    const NormBackward& b = *t.b;
    const Half h(b.grid);
    auto& sums = t.sums[static_cast<size_t>(thread)];
    sums.reset(new Sums(b.channels));
    double clipped = 0.0;
    float part[16] = {};
    each_block(begin, end, b.channels, [&](int64_t i, int count, int64_t c) {
      if (count == kBlock) reduce_block<true, T>(b, h, *t.mean, *sums, part, i, kBlock, c);
      else reduce_block<false, T>(b, h, *t.mean, *sums, part, i, count, c);
      if (sums->pending == 0)
        for (float& p : part) { clipped += p; p = 0.0f; }
    });
    for (float p : part) clipped += p;
    t.clipped[thread] = clipped;
  }, &task);
  std::vector<double> total;
  merge(task.sums, channels, total);
  const double rows = static_cast<double>(b->rows);
  for (int32_t c = 0; c < channels; ++c) {
    b->dbeta[c] = static_cast<float>(total[static_cast<size_t>(c)]);
    b->dgamma[c] = static_cast<float>(total[static_cast<size_t>(channels + c)] * b->inv_std[c]);
  }
  a.fill(channels, [&](int32_t c) { return (b->gamma ? b->gamma[c] : 1.0f) * b->inv_std[c]; });
  mean_g.fill(channels, [&](int32_t c) { return static_cast<float>(total[static_cast<size_t>(c)] / rows); });
  slope.fill(channels, [&](int32_t c) {
    const double inverse = b->inv_std[c];
    return static_cast<float>(total[static_cast<size_t>(channels + c)] / rows * inverse * inverse);
  });
  b->clipped = 0.0;
  for (double clipped : task.clipped) b->clipped += clipped;
  const int pieces = parallel(n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    BackwardTask& t = *static_cast<BackwardTask*>(p);
    const NormBackward& b = *t.b;
    const Half h(b.grid);
    int32_t top[16] = {};
    each_block(begin, end, b.channels, [&](int64_t i, int count, int64_t c) {
      if (count == kBlock) differentiate_block<true, T>(b, h, t, i, kBlock, c, top);
      else differentiate_block<false, T>(b, h, t, i, count, c, top);
    });
    t.largest.of[thread] = largest_of(top);
  }, &task);
  return task.largest.get(pieces);
}

}  // namespace

namespace FOURBIT_ISA {

void norm_statistics(const NormStatistics* s) {
  const int64_t n = s->rows * s->channels;
  const int32_t channels = s->channels;
  Channels shift(channels);
  std::vector<float> first(static_cast<size_t>(channels));  // variances are taken about the first row: nothing cancels
  if (s->coded) from_halves(static_cast<const uint16_t*>(s->kept), Half(s->grid), channels, first.data());
  for (int32_t c = 0; !s->coded && c < channels; ++c) {
    const float v = s->y[c] * s->scale;
    first[static_cast<size_t>(c)] = s->rounds ? float_nearest(v, s->grid) : v;
  }
  shift.fill(channels, [&](int32_t c) { return first[static_cast<size_t>(c)]; });
  StatisticsTask task{s, &shift, {}};
  task.sums.resize(kMaxThreads);
  parallel(n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    StatisticsTask& t = *static_cast<StatisticsTask*>(p);
    const NormStatistics& s = *t.s;
    const FloatGrid g = s.grid;
    const Half h(g);
    auto& sums = t.sums[static_cast<size_t>(thread)];
    sums.reset(new Sums(s.channels));
    each_block(begin, end, s.channels, [&](int64_t i, int count, int64_t c) {
      if (count == kBlock) statistics_block<true>(s, g, h, *t.shift, *sums, i, kBlock, c);
      else statistics_block<false>(s, g, h, *t.shift, *sums, i, count, c);
    });
  }, &task);
  std::vector<double> total;
  merge(task.sums, channels, total);
  const double rows = static_cast<double>(s->rows);
  for (int32_t c = 0; c < channels; ++c) {
    const double d = total[static_cast<size_t>(c)] / rows;
    double variance = total[static_cast<size_t>(channels + c)] / rows - d * d;
    if (variance < 0.0) variance = 0.0;
    const double mean = first[static_cast<size_t>(c)] + d;
    s->mean[c] = static_cast<float>(mean);
    s->inv_std[c] = static_cast<float>(1.0 / std::sqrt(variance + static_cast<double>(s->eps)));
    s->slope[c] = s->inv_std[c] * (s->gamma ? s->gamma[c] : 1.0f);
    s->offset[c] = (s->beta ? s->beta[c] : 0.0f) - s->mean[c] * s->slope[c];
    if (s->running_mean) {
      const double unbiased = rows > 1.0 ? variance * rows / (rows - 1.0) : variance;
      const double m = static_cast<double>(s->momentum);
      s->running_mean[c] = static_cast<float>((1.0 - m) * s->running_mean[c] + m * mean);
      s->running_var[c] = static_cast<float>((1.0 - m) * s->running_var[c] + m * unbiased);
    }
  }
}

float norm_apply(const NormApply* a) {
  const int64_t n = a->rows * a->channels;
  Channels slope(a->channels), offset(a->channels);
  slope.fill(a->channels, [&](int32_t c) { return a->slope[c]; });
  offset.fill(a->channels, [&](int32_t c) { return a->offset[c]; });
  ApplyTask task{a, &slope, &offset, {}};
  const int pieces = parallel(n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    ApplyTask& t = *static_cast<ApplyTask*>(p);
    const NormApply& a = *t.a;
    const Half h(a.grid);
    int32_t top[16] = {};
    each_block(begin, end, a.channels, [&](int64_t i, int count, int64_t c) {
      if (count == kBlock) apply_block<true>(a, h, *t.slope, *t.offset, i, kBlock, c, top);
      else apply_block<false>(a, h, *t.slope, *t.offset, i, count, c, top);
    });
    t.largest.of[thread] = largest_of(top);
  }, &task);
  return task.largest.get(pieces);
}

float norm_backward(NormBackward* b) {
  return b->token_dtype == kBFloat16 ? backward_typed<uint16_t>(b) : backward_typed<float>(b);
}

}  // namespace FOURBIT_ISA

}  // namespace fourbit
