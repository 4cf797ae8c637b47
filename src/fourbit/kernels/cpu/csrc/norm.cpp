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

// A 16-bit float without subnormals as sign, and the float32 exponent and mantissa less the lowest exponent: 0 is zero.
inline uint16_t to_half(float v, const FloatGrid& g) {
  const int32_t bits = as_bits(v), magnitude = bits & 0x7FFFFFFF;
  const int32_t code = (magnitude >> (23 - g.mantissa_bits)) - (g.lowest << g.mantissa_bits);
  return static_cast<uint16_t>((magnitude ? code : 0) | ((bits >> 16) & 0x8000));
}

inline float from_half(uint16_t half, const FloatGrid& g) {
  const int32_t code = half & 0x7FFF;
  const int32_t bits = (code + (g.lowest << g.mantissa_bits)) << (23 - g.mantissa_bits);
  return as_float((code ? bits : 0) | ((half & 0x8000) << 16));
}

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

// v of one block, rounded; kept as codes or as float32.
inline void rounded_block(const NormForward& f, const FloatGrid& g, int64_t i, int count, float* v) {
  const float* y = f.y + i;
  if (f.rounds) {
    for (int j = 0; j < count; ++j) v[j] = float_nearest(y[j] * f.scale, g);
  } else {
    for (int j = 0; j < count; ++j) v[j] = y[j] * f.scale;
  }
}

struct ForwardTask {
  const NormForward* f;
  const Channels *shift, *a, *b;
  std::vector<std::unique_ptr<Sums>> sums;
  Largest largest;
};

inline void statistics_block(const NormForward& f, const FloatGrid& g, const Channels& shift, Sums& sums, int64_t i,
                             int count, int64_t c) {
  float v[kBlock];
  rounded_block(f, g, i, count, v);
  if (f.halves) {
    uint16_t* kept = static_cast<uint16_t*>(f.kept) + i;
    for (int j = 0; j < count; ++j) kept[j] = to_half(v[j], g);
  } else if (f.kept != f.y || f.rounds || f.scale != 1.0f) {
    float* kept = static_cast<float*>(f.kept) + i;
    for (int j = 0; j < count; ++j) kept[j] = v[j];
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

inline void load_kept(const void* kept, bool halves, const FloatGrid& g, int64_t i, int count, float* v) {
  if (halves) {
    const uint16_t* p = static_cast<const uint16_t*>(kept) + i;
    for (int j = 0; j < count; ++j) v[j] = from_half(p[j], g);
  } else {
    const float* p = static_cast<const float*>(kept) + i;
    for (int j = 0; j < count; ++j) v[j] = p[j];
  }
}

inline void apply_block(const NormForward& f, const FloatGrid& g, const Channels& a, const Channels& b, int64_t i,
                        int count, int64_t c, int32_t& largest) {
  float t[kBlock];
  uint8_t pass[kBlock], inside[kBlock];
  int8_t q[kBlock];
  load_kept(f.kept, f.halves, g, i, count, t);
  const float *as = a.at(c), *bs = b.at(c);
  for (int j = 0; j < count; ++j) t[j] = t[j] * as[j] + bs[j];
  if (f.residual)
    for (int j = 0; j < count; ++j) t[j] += f.residual[i + j];
  if (f.act) {
    const float cap = f.cap;
    for (int j = 0; j < count; ++j) pass[j] = (t[j] > 0.0f) & (t[j] < cap);
    for (int j = 0; j < count; ++j) {
      float x = t[j] < 0.0f ? 0.0f : t[j];  // NaN stays
      t[j] = x > cap ? cap : x;
    }
  } else {
    for (int j = 0; j < count; ++j) pass[j] = 1;
  }
  int32_t top = largest;
  for (int j = 0; j < count; ++j) top = max_of(top, as_bits(t[j]) & 0x7FFFFFFF);
  largest = top;
  if (f.out)
    for (int j = 0; j < count; ++j) f.out[i + j] = t[j];
  if (f.pass) {
    for (int j = count; j < kBlock; ++j) pass[j] = 0;
    pack_bits(pass, f.pass + i / 8);
  }
  if (!f.clips) return;
  const float inv = f.clip.inv_scale, low = f.clip.low, high = f.clip.high, bound = f.clip.bound;
  for (int j = 0; j < count; ++j) {
    float y = t[j] * inv;
    y = y > low ? y : low;
    y = y < high ? y : high;
    q[j] = static_cast<int8_t>(static_cast<int32_t>(round_even(y)));
  }
  if (f.clip.mask) {
    if (f.clip.mask_rule == 1) {
      for (int j = 0; j < count; ++j) inside[j] = (t[j] >= 0.0f) & (t[j] < bound) & pass[j];
    } else if (f.clip.mask_rule == 2) {
      for (int j = 0; j < count; ++j) inside[j] = (t[j] > -bound) & (t[j] < bound) & pass[j];
    } else {
      for (int j = 0; j < count; ++j) inside[j] = (t[j] >= -bound) & (t[j] <= bound) & pass[j];
    }
    for (int j = count; j < kBlock; ++j) inside[j] = 0;
    pack_bits(inside, f.clip.mask + i / 8);
  }
  if (f.clip.packed) {
    for (int j = count; j < kBlock; ++j) q[j] = 0;
    uint8_t* out = f.clip.packed + i / 2;
    for (int j = 0; j < 32; ++j) out[j] = static_cast<uint8_t>((q[j] & 15) | (q[j + 32] << 4));
  }
  if (f.clip.codes) std::memcpy(f.clip.codes + i, q, static_cast<size_t>(count));
}

// ---- backward ----

struct BackwardTask {
  NormBackward* b;
  const Channels *mean, *a, *mean_g, *slope;
  std::vector<std::unique_ptr<Sums>> sums;
  double clipped[kMaxThreads] = {};
  Largest largest;
};

// g of one block; `sum`, if wanted, gets what the mask removed.
template <typename T>
inline void gradient_block(const NormBackward& b, int64_t i, int count, float* g, float* sum) {
  int32_t mask[kBlock], pass[kBlock];
  int8_t q[kBlock];
  const bool own_pass = b.pass != nullptr;
  const int32_t capped = b.cap_clips ? -1 : 0;
  if (own_pass) expand_bits(b.pass + i / 8, pass);
  if (b.token) {
    const T* token = static_cast<const T*>(b.token) + i;
    for (int j = 0; j < count; ++j) g[j] = load(token + j) * b.token_scale;
    if (b.mask) {
      expand_bits(b.mask + i / 8, mask);
    } else {
      for (int j = 0; j < kBlock; ++j) mask[j] = -1;
    }
    const bool codes = (sum || (b.act && !own_pass)) && b.packed;
    if (codes) unpack_block(b.packed + i / 2, b.is_signed, q);
    if (!own_pass)
      for (int j = 0; j < kBlock; ++j) pass[j] = b.act ? (codes ? mask[j] | -(q[j] != 0) : mask[j]) : -1;
    if (sum && codes) {
      float part[16] = {};
      for (int j = count; j < kBlock; ++j) g[j] = 0.0f;
      for (int j = 0; j < kBlock; j += 16)
        for (int k = 0; k < 16; ++k) {
          const float clipped = as_float(as_bits(g[j + k]) & ~mask[j + k] & (pass[j + k] | capped));
          part[k] += q[j + k] > 0 ? clipped : (q[j + k] < 0 ? -clipped : 0.0f);
        }
      for (int j = 0; j < 16; ++j) *sum += part[j];
    }
    for (int j = 0; j < count; ++j) g[j] = as_float(as_bits(g[j]) & mask[j]);
  } else {
    if (!own_pass)
      for (int j = 0; j < kBlock; ++j) pass[j] = -1;
    for (int j = 0; j < count; ++j) g[j] = 0.0f;
  }
  if (b.out_grad) {
    const float* out_grad = b.out_grad + i;
    for (int j = 0; j < count; ++j) g[j] += as_float(as_bits(out_grad[j]) & pass[j]);
  }
}

template <typename T>
inline void reduce_block(const NormBackward& b, const FloatGrid& grid, const Channels& mean, Sums& sums, double& clipped,
                         int64_t i, int count, int64_t c) {
  float g[kBlock], v[kBlock], sum = 0.0f;
  gradient_block<T>(b, i, count, g, &sum);
  clipped += sum;
  if (b.g)
    for (int j = 0; j < count; ++j) b.g[i + j] = g[j];
  load_kept(b.kept, b.halves, grid, i, count, v);
  const float* m = mean.at(c);
  float *first = sums.first(c), *second = sums.second(c);
  for (int j = 0; j < count; ++j) {
    first[j] += g[j];
    second[j] += g[j] * (v[j] - m[j]);
  }
  sums.block_done();
}

template <typename T>
inline void differentiate_block(const NormBackward& b, const FloatGrid& grid, const BackwardTask& task, int64_t i,
                                int count, int64_t c, int32_t& largest) {
  float g[kBlock], v[kBlock];
  if (b.g) {
    for (int j = 0; j < count; ++j) g[j] = b.g[i + j];
  } else {
    gradient_block<T>(b, i, count, g, nullptr);
  }
  load_kept(b.kept, b.halves, grid, i, count, v);
  const float *m = task.mean->at(c), *a = task.a->at(c), *mean_g = task.mean_g->at(c), *slope = task.slope->at(c);
  for (int j = 0; j < count; ++j) v[j] = a[j] * (g[j] - mean_g[j] - (v[j] - m[j]) * slope[j]);
  int32_t top = largest;
  for (int j = 0; j < count; ++j) top = max_of(top, as_bits(v[j]) & 0x7FFFFFFF);
  largest = top;
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
    const FloatGrid grid = b.grid;
    auto& sums = t.sums[static_cast<size_t>(thread)];
    sums.reset(new Sums(b.channels));
    double clipped = 0.0;
    each_block(begin, end, b.channels, [&](int64_t i, int count, int64_t c) {
      if (count == kBlock) reduce_block<T>(b, grid, *t.mean, *sums, clipped, i, kBlock, c);
      else reduce_block<T>(b, grid, *t.mean, *sums, clipped, i, count, c);
    });
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
    const FloatGrid grid = b.grid;
    int32_t largest = 0;
    each_block(begin, end, b.channels, [&](int64_t i, int count, int64_t c) {
      if (count == kBlock) differentiate_block<T>(b, grid, t, i, kBlock, c, largest);
      else differentiate_block<T>(b, grid, t, i, count, c, largest);
    });
    t.largest.of[thread] = largest;
  }, &task);
  return task.largest.get(pieces);
}

}  // namespace

namespace FOURBIT_ISA {

float norm_forward(const NormForward* f) {
  const int64_t n = f->rows * f->channels;
  const int32_t channels = f->channels;
  Channels shift(channels), a(channels), b(channels);
  std::vector<float> first(static_cast<size_t>(channels));
  for (int32_t c = 0; c < channels; ++c) {  // variances are taken about the first row: nothing cancels
    float v = f->y[c] * f->scale;
    if (f->rounds) v = float_nearest(v, f->grid);
    first[static_cast<size_t>(c)] = v;
  }
  shift.fill(channels, [&](int32_t c) { return first[static_cast<size_t>(c)]; });
  ForwardTask task{f, &shift, &a, &b, {}, {}};
  task.sums.resize(kMaxThreads);
  parallel(n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    ForwardTask& t = *static_cast<ForwardTask*>(p);
    const NormForward& f = *t.f;
    const FloatGrid g = f.grid;
    auto& sums = t.sums[static_cast<size_t>(thread)];
    sums.reset(new Sums(f.channels));
    each_block(begin, end, f.channels, [&](int64_t i, int count, int64_t c) {
      if (count == kBlock) statistics_block(f, g, *t.shift, *sums, i, kBlock, c);
      else statistics_block(f, g, *t.shift, *sums, i, count, c);
    });
  }, &task);
  std::vector<double> total;
  merge(task.sums, channels, total);
  const double rows = static_cast<double>(f->rows);
  for (int32_t c = 0; c < channels; ++c) {
    const double d = total[static_cast<size_t>(c)] / rows;
    double variance = total[static_cast<size_t>(channels + c)] / rows - d * d;
    if (variance < 0.0) variance = 0.0;
    const double mean = first[static_cast<size_t>(c)] + d;
    f->mean[c] = static_cast<float>(mean);
    f->inv_std[c] = static_cast<float>(1.0 / std::sqrt(variance + static_cast<double>(f->eps)));
    if (f->running_mean) {
      const double unbiased = rows > 1.0 ? variance * rows / (rows - 1.0) : variance;
      const double m = static_cast<double>(f->momentum);
      f->running_mean[c] = static_cast<float>((1.0 - m) * f->running_mean[c] + m * mean);
      f->running_var[c] = static_cast<float>((1.0 - m) * f->running_var[c] + m * unbiased);
    }
  }
  a.fill(channels, [&](int32_t c) { return f->inv_std[c] * (f->gamma ? f->gamma[c] : 1.0f); });
  b.fill(channels, [&](int32_t c) { return (f->beta ? f->beta[c] : 0.0f) - f->mean[c] * a.of[static_cast<size_t>(c)]; });
  const int pieces = parallel(n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    ForwardTask& t = *static_cast<ForwardTask*>(p);
    const NormForward& f = *t.f;
    const FloatGrid g = f.grid;
    int32_t largest = 0;
    each_block(begin, end, f.channels, [&](int64_t i, int count, int64_t c) {
      if (count == kBlock) apply_block(f, g, *t.a, *t.b, i, kBlock, c, largest);
      else apply_block(f, g, *t.a, *t.b, i, count, c, largest);
    });
    t.largest.of[thread] = largest;
  }, &task);
  return task.largest.get(pieces);
}

float norm_backward(NormBackward* b) {
  return b->token_dtype == kBFloat16 ? backward_typed<uint16_t>(b) : backward_typed<float>(b);
}

}  // namespace FOURBIT_ISA

}  // namespace fourbit
