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

// Runs block(i, count, channel of i) for each block of a range.
template <typename F>
FOURBIT_INLINE void each_block(int64_t begin, int64_t end, int32_t channels, F block) {
  int64_t c = begin % channels;
  const int64_t step = kBlock % channels;
  each_block(begin, end, [&](int64_t i, int count) {
    block(i, count, c);
    c += step;
    if (c >= channels) c -= channels;
  });
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

// Numbers of a block: v as it is kept, in codes or in float32.
struct Kept {
  const void* from;
  int halves;
  Half half;
  template <typename Task>
  explicit Kept(const Task& t) : from(t.kept), halves(t.halves), half(t.grid) {}
};

FOURBIT_INLINE void read_kept(const Kept& kept, int64_t i, int count, Floats (&v)[kPerBlock]) {
  if (kept.halves) {
    uint16_t room[kBlock];
    const uint16_t* codes = whole(static_cast<const uint16_t*>(kept.from) + i, count, room);
    from_halves(codes, kept.half, v);
  } else {
    float room[kBlock];
    const float* numbers = whole(static_cast<const float*>(kept.from) + i, count, room);
    FOURBIT_EACH(k) v[k] = read(numbers + k * kVector);
  }
}

// v of a block of y, which is written to `kept` unless it lies there.
FOURBIT_INLINE void round_block(const NormStatistics& s, const Half& h, int64_t i, int count, Floats (&v)[kPerBlock]) {
  float room[kBlock];
  const float* y = whole(s.y + i, count, room);
  if (s.halves) {
    Target<uint16_t> kept(static_cast<uint16_t*>(s.kept) + i, count);
    Ints codes[kPerBlock];
    FOURBIT_EACH(k) codes[k] = to_half(read(y + k * kVector) * s.scale, h, v[k]);
    write_unsigned(kept.block(), codes);
    kept.finish();
    return;
  }
  FOURBIT_EACH(k) v[k] = read(y + k * kVector) * s.scale;
  if (s.rounds) float_nearest(v, s.grid);
  if (s.kept == s.y && !s.rounds && s.scale == 1.0f) return;
  Target<float> kept(static_cast<float*>(s.kept) + i, count);
  write(kept.block(), v);
  kept.finish();
}

// Adds a block to the sums of its channels.
FOURBIT_INLINE void add_block(Sums& sums, int64_t c, const Floats (&a)[kPerBlock], const Floats (&b)[kPerBlock]) {
  float *first = sums.first(c), *second = sums.second(c);
  FOURBIT_EACH(k) {
    write(first + k * kVector, read(first + k * kVector) + a[k]);
    write(second + k * kVector, read(second + k * kVector) + b[k]);
  }
  sums.block_done();
}

FOURBIT_INLINE void statistics_block(const NormStatistics& s, const Kept& kept, const Channels& shift, Sums& sums, int64_t i,
                                     int count, int64_t c) {
  Floats d[kPerBlock], square[kPerBlock];
  if (s.coded) read_kept(kept, i, count, d);
  else round_block(s, kept.half, i, count, d);
  const float* from = shift.at(c);
  FOURBIT_EACH(k) {
    d[k] -= read(from + k * kVector);
    if (count != kBlock) d[k] = keep(d[k], first_bits(count), k);
    square[k] = d[k] * d[k];
  }
  add_block(sums, c, d, square);
}

FOURBIT_INLINE void apply_block(const NormApply& a, const Kept& kept, const Channels& slope, const Channels& offset, int64_t i,
                                int count, int64_t c, Ints& top) {
  Floats t[kPerBlock];
  float room[kBlock];
  const float *as = slope.at(c), *bs = offset.at(c);
  const float* residual = a.residual ? whole(a.residual + i, count, room) : nullptr;
  uint64_t pass = first_bits(count), inside = 0;
  // Whether the clip range of the codes is what the activation passes, too, and nobody asks for the latter.
  const bool at_once = a.act && a.clips && !a.pass && a.clip.mask_rule == 1 && a.clip.bound <= a.cap;
  read_kept(kept, i, count, t);
  Ints codes[kPerBlock];
  FOURBIT_EACH(k) {
    Floats x = t[k] * read(as + k * kVector) + read(bs + k * kVector);
    if (residual) x += read(residual + k * kVector);
    if (count != kBlock) x = keep(x, first_bits(count), k);
    t[k] = x;
  }
  if (a.act && !at_once) {
    uint64_t passing = 0;
    FOURBIT_EACH(k) passing |= bits_of(compare<kGreater>(t[k], 0.0f) & compare<kLess>(t[k], a.cap), k);
    pass &= passing;
  }
  if (a.act) {
    FOURBIT_EACH(k) t[k] = clamp(t[k], 0.0f, a.cap);
  }
  FOURBIT_EACH(k) raise(top, t[k]);
  if (a.out) {
    Target<float> out(a.out + i, count);
    write(out.block(), t);
    out.finish();
  }
  if (a.pass) store_bits(a.pass + i / 8, pass);
  if (!a.clips) return;
  FOURBIT_EACH(k) codes[k] = nearest_code(t[k] * a.clip.inv_scale, a.clip.low, a.clip.high);
  if (at_once) {
    FOURBIT_EACH(k) inside |= bits_of(compare<kGreater>(t[k], 0.0f) & compare<kLess>(t[k], a.clip.bound), k);
  } else {
    FOURBIT_EACH(k) inside |= bits_of(inside_range(t[k], a.clip.mask_rule, a.clip.bound), k);
  }
  int8_t q[kBlock];
  write_bytes(q, codes);
  for (int j = count; j < kBlock; ++j) q[j] = 0;
  store_bits(a.clip.mask + i / 8, inside & pass);
  pack_codes(q, a.clip.packed + i / 2);
  copy_bytes(a.clip.codes + i, q, count);
}

// ---- backward ----

struct BackwardTask {
  NormBackward* b;
  const Channels *mean, *a, *mean_g, *slope;
  std::vector<std::unique_ptr<Sums>> sums;
  double clipped[kMaxThreads] = {};
  Largest largest;
};

// g of one block; `parts`, if wanted, gets what the mask removed.
template <typename T>
FOURBIT_INLINE void gradient_block(const NormBackward& b, int64_t i, int count, Floats (&g)[kPerBlock], Parts* parts) {
  uint64_t pass = b.pass ? load_bits(b.pass + i / 8) : ~0ull, up = 0, down = 0;
  const uint64_t mask = b.mask ? load_bits(b.mask + i / 8) : 0;
  const bool by_code = b.act && !b.pass && b.packed;  // whether the activation passed is known from the codes
  if (b.packed && ((b.token && parts) || (b.out_grad && by_code))) {
    int8_t q[kBlock];
    unpack_block(b.packed + i / 2, b.is_signed, q);
    up = positive(q);
    down = negative(q);
  }
  if (b.token) {
    T room[kBlock];
    const T* token = whole(static_cast<const T*>(b.token) + i, count, room);
    FOURBIT_EACH(k) g[k] = read(token + k * kVector) * b.token_scale;
    if (count != kBlock) {
      FOURBIT_EACH(k) g[k] = keep(g[k], first_bits(count), k);
    }
    const uint64_t clipped = ~mask & (b.cap_clips ? ~0ull : pass);
    if (parts) add_where(g, up & clipped, down & clipped, *parts);
    FOURBIT_EACH(k) g[k] = keep(g[k], mask, k);
  } else {
    FOURBIT_EACH(k) g[k] = Floats{};
  }
  if (!b.out_grad) return;
  if (by_code) pass = mask | up | down;
  float room[kBlock];
  const float* out_grad = whole(b.out_grad + i, count, room);
  FOURBIT_EACH(k) g[k] += keep(read(out_grad + k * kVector), pass, k);
}

template <typename T>
FOURBIT_INLINE void reduce_block(const NormBackward& b, const Kept& kept, const Channels& mean, Sums& sums, Parts& parts,
                                 int64_t i, int count, int64_t c) {
  Floats g[kPerBlock], v[kPerBlock];
  gradient_block<T>(b, i, count, g, &parts);
  if (b.g) {
    Target<float> out(b.g + i, count);
    write(out.block(), g);
    out.finish();
  }
  read_kept(kept, i, count, v);
  const float* m = mean.at(c);
  FOURBIT_EACH(k) {
    v[k] = g[k] * (v[k] - read(m + k * kVector));
    if (count != kBlock) v[k] = keep(v[k], first_bits(count), k);
  }
  add_block(sums, c, g, v);
}

template <typename T>
FOURBIT_INLINE void differentiate_block(const NormBackward& b, const Kept& kept, const BackwardTask& task, int64_t i, int count,
                                        int64_t c, Ints& top) {
  Floats g[kPerBlock], v[kPerBlock];
  if (b.g) {
    float room[kBlock];
    const float* stored = whole(b.g + i, count, room);
    FOURBIT_EACH(k) g[k] = read(stored + k * kVector);
  } else {
    gradient_block<T>(b, i, count, g, nullptr);
  }
  read_kept(kept, i, count, v);
  const float *m = task.mean->at(c), *a = task.a->at(c), *mean_g = task.mean_g->at(c), *slope = task.slope->at(c);
  FOURBIT_EACH(k) {
    const int j = k * kVector;
    v[k] = read(a + j) * (g[k] - read(mean_g + j) - (v[k] - read(m + j)) * read(slope + j));
    if (count != kBlock) v[k] = keep(v[k], first_bits(count), k);
    raise(top, v[k]);
  }
  if (!b.num) {
    Target<float> out(static_cast<float*>(b.out[0]) + i, count);
    write(out.block(), v);
    out.finish();
    return;
  }
  FOURBIT_EACH(k) v[k] *= b.inv_scale;
  Halves halves[kPerBlock / 2];
  upper_halves(v, halves);
  for (int k = 0; k < b.num; ++k) {
    Target<uint16_t> out(static_cast<uint16_t*>(b.out[k]) + i, count);
    write_nearest(out.block(), halves, b.log_grid[k]);
    out.finish();
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
    const NormBackward b = *t.b;
    const Kept kept(b);
    auto& sums = t.sums[static_cast<size_t>(thread)];
    sums.reset(new Sums(b.channels));
    double clipped = 0.0;
    Parts parts;
    each_block(begin, end, b.channels, [&](int64_t i, int count, int64_t c) {
      reduce_block<T>(b, kept, *t.mean, *sums, parts, i, count, c);
      if (sums->pending == 0) parts.move_to(clipped);
    });
    parts.move_to(clipped);
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
    const NormBackward b = *t.b;
    const Kept kept(b);
    Ints top{};
    each_block(begin, end, b.channels,
               [&](int64_t i, int count, int64_t c) { differentiate_block<T>(b, kept, t, i, count, c, top); });
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
  for (int32_t c = 0; c < channels; ++c) {
    float& v = first[static_cast<size_t>(c)];
    if (s->coded) {
      v = from_half(all_ints(static_cast<const uint16_t*>(s->kept)[c]), Half(s->grid))[0];
    } else {
      v = s->y[c] * s->scale;
      if (s->rounds) v = float_nearest(v, s->grid);
    }
  }
  shift.fill(channels, [&](int32_t c) { return first[static_cast<size_t>(c)]; });
  StatisticsTask task{s, &shift, {}};
  task.sums.resize(kMaxThreads);
  parallel(n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    StatisticsTask& t = *static_cast<StatisticsTask*>(p);
    const NormStatistics s = *t.s;
    const Kept kept(s);
    auto& sums = t.sums[static_cast<size_t>(thread)];
    sums.reset(new Sums(s.channels));
    each_block(begin, end, s.channels,
               [&](int64_t i, int count, int64_t c) { statistics_block(s, kept, *t.shift, *sums, i, count, c); });
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
    const NormApply a = *t.a;
    const Kept kept(a);
    Ints top{};
    each_block(begin, end, a.channels, [&](int64_t i, int count, int64_t c) {
      apply_block(a, kept, *t.slope, *t.offset, i, count, c, top);
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
