// Matrix products whose sums are rounded to a binary float format after every addition, chunk by chunk. Compiled once per
// instruction set (FOURBIT_ISA names it). Each lane of a panel is a chain of its own, so that the compiler vectorises over
// the lanes. Must be built with -ffp-contract=off and without -ffast-math: the numbers are defined addition by addition.
#include "rounding.h"

namespace fourbit {
namespace {

constexpr int64_t kPiece = 1 << 16;  // numbers per piece of work where nothing else is natural
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// s + p with the last bit of the result set unless the sum was exact (rounding to odd). Rounding that to a format of 22 bits
// or fewer gives what rounding the exact sum would.
inline float add_odd(float s, float p) {
  const float t = s + p, q = t - s;
  const float error = (s - (t - q)) + (p - q);  // exact; NaN where t is not finite
  const int32_t bits = as_bits(t);
  const int32_t step = ((as_bits(error) ^ bits) >> 31) | 1;  // away from zero, or towards it
  return as_float(bits + ((error < 0.0f || error > 0.0f) && !(bits & 1) ? step : 0));
}

inline float infinite_or(float t, float y) { return (as_bits(t) & 0x7FFFFFFF) >= 0x7F800000 ? t : y; }

inline float add_nearest(float s, float p, const FloatGrid& g) {
  const float t = add_odd(s, p);
  return infinite_or(t, float_nearest(t, g));
}

// Whatever the numbers: infinities, sums beyond the range or below the smallest magnitude.
template <int W>
void careful_chunk(const FloatGrid& g, const float* row, const float* panel, int64_t count, float* s) {
  for (int j = 0; j < W; ++j) s[j] = 0.0f;
  for (int64_t k = 0; k < count; ++k) {
    const float a = row[k];
    const float* b = panel + k * W;
    for (int j = 0; j < W; ++j) s[j] = add_nearest(s[j], a * b[j], g);
  }
}

// The sums of one chunk if none of them leaves the ordinary range of the format, which is found out at the end; otherwise
// false, and `sums` means nothing. kWide: products have more bits than the format, so that float32 may round a sum first.
template <int W, bool kWide, bool kSubnormals>
bool ordinary_chunk(const FloatGrid& g, const float* row, const float* panel, int64_t count, float* sums) {
  const uint32_t lift = static_cast<uint32_t>(((23 - g.mantissa_bits) << 23) | 0x400000);
  const int32_t lowest = g.lowest << 23;
  float s[W] = {};
  int32_t most[W] = {};
  uint32_t least[W];
  for (int j = 0; j < W; ++j) least[j] = 0xFFFFFFFFu;
  for (int64_t k = 0; k < count; ++k) {
    const float a = row[k];
    const float* b = panel + k * W;
    for (int j = 0; j < W; ++j) {
      const float p = a * b[j];
      const float t = kWide ? add_odd(s[j], p) : s[j] + p;
      const int32_t magnitude = as_bits(t) & 0x7FFFFFFF;
      most[j] = max_of(most[j], magnitude);
      int32_t exponent = magnitude & 0x7F800000;
      if (kSubnormals) {
        exponent = max_of(exponent, lowest);
      } else {
        const uint32_t below = static_cast<uint32_t>(magnitude) - 1u;  // zero is ordinary
        least[j] = below < least[j] ? below : least[j];
      }
      // As in float_nearest; it may wrap around beyond the range.
      const float m = as_float(static_cast<int32_t>(static_cast<uint32_t>(exponent) + lift));
      s[j] = (t + m) - m;
    }
  }
  int32_t top = 0;
  uint32_t bottom = 0xFFFFFFFFu;
  for (int j = 0; j < W; ++j) top = max_of(top, most[j]);
  for (int j = 0; j < W; ++j) bottom = least[j] < bottom ? least[j] : bottom;
  for (int j = 0; j < W; ++j) sums[j] = s[j];
  return top <= as_bits(g.max) && (kSubnormals || bottom >= static_cast<uint32_t>(as_bits(g.smallest)) - 1u);
}

// The chains of one row and `W` lanes.
template <int W, bool kWide, bool kSubnormals>
void nearest_lanes(const Accumulate& c, const float* row, const float* panel, int64_t, float* out) {
  const FloatGrid g = c.grid;
  float total[W] = {}, s[W];
  for (int64_t begin = 0; begin < c.depth; begin += c.chunk) {
    const int64_t count = c.depth - begin < c.chunk ? c.depth - begin : c.chunk;
    const float *a = row + begin, *b = panel + begin * W;
    if (!ordinary_chunk<W, kWide, kSubnormals>(g, a, b, count, s)) careful_chunk<W>(g, a, b, count, s);
    for (int j = 0; j < W; ++j) total[j] = add_nearest(total[j], s[j], g);
  }
  for (int j = 0; j < W; ++j) out[j] = total[j] + 0.0f;  // never -0
}

// As the reference: the neighbour towards +infinity where u < 2^24 (x - low) / (high - low).
inline float add_stochastic(float s, float p, float u, const FloatGrid& g) {
  const float t = s + p;
  float x = t > g.min ? t : g.min;  // NaN becomes a number, for now
  x = x < g.max ? x : g.max;
  const int32_t exponent = max_of(as_bits(x) & 0x7F800000, g.lowest << 23) - (g.mantissa_bits << 23);
  const float quantum = as_float(exponent), steps = x * as_float((254 << 23) - exponent);
  const float whole = static_cast<float>(static_cast<int32_t>(steps));
  float low = (whole > steps ? whole - 1.0f : whole) * quantum, high = (whole < steps ? whole + 1.0f : whole) * quantum;
  const bool tiny = as_float(as_bits(x) & 0x7FFFFFFF) < g.smallest;
  low = tiny ? (x < 0.0f ? -g.smallest : 0.0f) : low;
  high = tiny ? (x > 0.0f ? g.smallest : 0.0f) : high;
  const float threshold = (x - low) / (high - low) * 16777216.0f;  // 0 / 0 where low is high
  return infinite_or(t, u < threshold ? high : low);
}

// The random words of `W` chains, an addition at a time; two of them share one evaluation of the generator.
template <int W>
struct Words {
  uint64_t base[W] = {}, pairs[W] = {};
  int64_t pair = -1;

  void draw(int64_t addition, float* u) {
    if (addition / 2 != pair) {
      pair = addition / 2;
      for (int j = 0; j < W; ++j) pairs[j] = mix(base[j] + static_cast<uint64_t>(pair) * kGolden);
    }
    const int shift = addition & 1 ? 40 : 8;
    for (int j = 0; j < W; ++j) u[j] = static_cast<float>(static_cast<int32_t>((pairs[j] >> shift) & 0xFFFFFF));
  }
};

template <int W>
void stochastic_lanes(const Accumulate& c, const float* row, const float* panel, int64_t element, float* out) {
  const FloatGrid g = c.grid;
  const int64_t pairs = (c.depth + (c.depth + c.chunk - 1) / c.chunk + 1) / 2;  // of words for each element
  Words<W> words;
  for (int j = 0; j < W; ++j)
    words.base[j] = c.key + (static_cast<uint64_t>(element + j * c.lane_step) * static_cast<uint64_t>(pairs) + 1) * kGolden;
  float total[W] = {}, u[W];
  int64_t chunk_sums = c.depth;
  for (int64_t begin = 0; begin < c.depth; begin += c.chunk) {
    const int64_t end = c.depth - begin < c.chunk ? c.depth : begin + c.chunk;
    float s[W] = {};
    for (int64_t k = begin; k < end; ++k) {
      const float a = row[k];
      const float* b = panel + k * W;
      words.draw(k, u);
      for (int j = 0; j < W; ++j) s[j] = add_stochastic(s[j], a * b[j], u[j], g);
    }
    words.draw(chunk_sums++, u);
    for (int j = 0; j < W; ++j) total[j] = add_stochastic(total[j], s[j], u[j], g);
  }
  for (int j = 0; j < W; ++j) out[j] = total[j] + 0.0f;  // never -0
}

using Lanes = void (*)(const Accumulate&, const float* row, const float* panel, int64_t element, float* out);

template <int W, Lanes kLanes>
void run(const Accumulate* c) {
  const int64_t cost = W * (c->depth + 1);
  parallel(c->groups * c->panels * c->num_rows * cost, cost, [](int64_t begin, int64_t end, int, void* p) {
    const Accumulate& c = *static_cast<const Accumulate*>(p);
    const int64_t cost = W * (c.depth + 1);
    for (int64_t i = begin / cost; i < end / cost; ++i) {  // rows vary fastest: they share a panel
      const int64_t panel = i / c.num_rows, group = panel / c.panels, row = i % c.num_rows;
      const int64_t first_lane = panel % c.panels * W, row_of_all = group * c.num_rows + row;
      const int64_t element = group * c.group_step + row * c.row_step + first_lane * c.lane_step;
      float* out = c.out + row_of_all * c.panels * W + first_lane;
      kLanes(c, c.rows + row_of_all * c.depth, c.columns + panel * c.depth * W, element, out);
    }
  }, const_cast<Accumulate*>(c));
}

template <int W>
void run_width(const Accumulate* c, bool wide) {
  const bool subnormals = c->grid.smallest == 0.0f;
  if (c->stochastic) run<W, stochastic_lanes<W>>(c);
  else if (wide && subnormals) run<W, nearest_lanes<W, true, true>>(c);
  else if (wide) run<W, nearest_lanes<W, true, false>>(c);
  else if (subnormals) run<W, nearest_lanes<W, false, true>>(c);
  else run<W, nearest_lanes<W, false, false>>(c);
}

// The most significant bits that a number among x has, 1 to 24.
int significant_bits(const float* x, int64_t n) {
  struct Task { const float* x; int32_t mantissas[kMaxThreads]; } task{x, {}};
  const int pieces = parallel(n, kPiece, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    int32_t bits = 0;
    for (int64_t i = begin; i < end; ++i) bits |= as_bits(t.x[i]);
    t.mantissas[thread] = bits;
  }, &task);
  int32_t bits = 0;
  for (int i = 0; i < pieces; ++i) bits |= task.mantissas[i];
  return 24 - __builtin_ctz((bits & 0x7FFFFF) | 0x800000);
}

}  // namespace

void FOURBIT_JOIN(FOURBIT_ISA, _accumulate)(const Accumulate* c) {
  // If neither a sum nor a product has more bits than the format, and float32 has twice as many and two, rounding to float32
  // first changes nothing (Figueroa, When is double rounding innocuous?, SIGNUM Newsletter 1995).
  const int bits = c->grid.mantissa_bits + 1;
  const int64_t num_rows = c->groups * c->num_rows * c->depth, num_columns = c->groups * c->panels * c->depth * c->width;
  const bool wide = !c->stochastic && (2 * bits + 2 > 24 || significant_bits(c->rows, num_rows) +
                                                                significant_bits(c->columns, num_columns) > bits);
  if (c->width == 64) run_width<64>(c, wide);
  else if (c->width == 32) run_width<32>(c, wide);
  else run_width<16>(c, wide);
}

}  // namespace fourbit
