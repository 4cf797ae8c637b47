// Calls every function of the portable kernels on fixed numbers and prints a line of its results, "name hash", for each call:
// equal lines on two kinds of processor mean equal bits. NaN is one number here, whatever its sign and payload.
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "common.h"

using namespace fourbit;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
const FloatGrid kGrids[] = {  // FP16 1-6-9, FP8 1-5-2, IEEE half precision
    {9, 96, 0x1.008p-31f, -8573157376.0f, 8573157376.0f, kNaN},
    {2, 113, 0.0f, -114688.0f, 114688.0f, kNaN},
    {10, 113, 0.0f, -65504.0f, 65504.0f, 65520.0f},
};
const LogGrid kLogGrids[] = {  // radix-4 FP4, even and odd phase, and radix 2
    {1008730112, 1015021568, 1115684864, 16777216},
    {1000341504, 1006632960, 1107296256, 16777216},
    {1061158912, 1065353216, 1115684864, 8388608},
};

// ---- fixed numbers ----

uint64_t state = 1;

uint64_t next() {  // SplitMix64
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Magnitudes from 2^-binades to 2^binades.
std::vector<float> numbers(size_t n, uint32_t binades, bool special = false) {
  const float odd[] = {0.0f, -0.0f, 1e-40f, -1e-40f, 3e38f, -3e38f, 0.5f, -0.5f, 1.0f, 64.0f, 0x1p-149f, kInfinity, -kInfinity, kNaN};
  std::vector<float> found(n);
  for (size_t i = 0; i < n; ++i) {
    const uint64_t bits = next();
    const uint32_t exponent = 127 - binades + static_cast<uint32_t>(bits >> 32) % (2 * binades);
    found[i] = as_float(static_cast<uint32_t>(bits & 0x807FFFFF) | exponent << 23);
    if (special && i % 17 == 3) found[i] = odd[i / 17 % 14];
  }
  return found;
}

std::vector<uint16_t> bfloat16(const std::vector<float>& x) {
  std::vector<uint16_t> found;
  for (float v : x) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    found.push_back(static_cast<uint16_t>(bits >> 16));
  }
  return found;
}

template <typename T>
std::vector<T> integers(size_t n, int low, int high) {
  std::vector<T> found(n);
  for (T& x : found) x = static_cast<T>(low + static_cast<int>(next() % static_cast<uint64_t>(high - low + 1)));
  return found;
}

// ---- lines of results ----

class Line {
 public:
  explicit Line(std::string name) : name_(std::move(name)) {}
  ~Line() { std::printf("%s %016llx\n", name_.c_str(), static_cast<unsigned long long>(hash_)); }
  void bytes(const void* p, size_t n) {
    for (size_t i = 0; i < n; ++i) hash_ = (hash_ ^ static_cast<const uint8_t*>(p)[i]) * 0x100000001B3u;
  }
  void add(float x) {
    if (x != x) x = as_float(0x7FC00000);
    bytes(&x, 4);
  }
  void add(double x) { bytes(&x, 8); }
  void add(uint16_t x) {  // bfloat16
    if ((x & 0x7FFF) > 0x7F80) x = 0x7FC0;
    bytes(&x, 2);
  }
  void add(int8_t x) { bytes(&x, 1); }
  void add(uint8_t x) { bytes(&x, 1); }
  template <typename T>
  void add(const std::vector<T>& x) {
    for (T v : x) add(v);
  }

 private:
  std::string name_;
  uint64_t hash_ = 0xCBF29CE484222325u;
};

std::string text(const char* name, std::initializer_list<int64_t> with) {
  std::string found = name;
  for (int64_t n : with) found += "-" + std::to_string(n);
  return found;
}

size_t blocks(size_t n) { return (n + kBlock - 1) / kBlock; }

// ---- the functions ----

void quantizers(size_t n, bool narrow) {
  const std::vector<float> wide = numbers(n, 12, true);
  const std::vector<uint16_t> half = bfloat16(wide);
  const void* x = narrow ? static_cast<const void*>(half.data()) : wide.data();
  const int32_t dtype = narrow ? kBFloat16 : kFloat32;
  const auto size = static_cast<int64_t>(n);
  for (int32_t rule = 0; rule <= 3; ++rule) {
    Line line(text("clip", {size, narrow, rule}));
    std::vector<int8_t> codes(n);
    std::vector<uint8_t> packed(32 * blocks(n)), mask(8 * blocks(n));
    const float low = rule == 1 ? 0.0f : -7.0f, high = rule == 1 ? 15.0f : 7.0f;
    Clip c{x, dtype, size, 3.0f, low, high, rule, 2.3f, codes.data(), packed.data(), rule ? mask.data() : nullptr};
    line.add(fourbit_clip(&c));
    line.add(codes);
    line.add(packed);
    line.add(mask);
  }
  for (int32_t rule = 0; rule <= 2; ++rule)
    for (int32_t num = 1; num <= 2; ++num) {
      Line line(text("log_round", {size, narrow, rule, num}));
      std::vector<uint16_t> even(n), odd(n);
      LogRound r{x,         dtype,  size, 0.7f, num, {kLogGrids[num == 1 ? 2 : 0], kLogGrids[1]}, {even.data(), odd.data()},
                 kBFloat16, {5, 6}, rule};
      line.add(fourbit_log_round(&r));
      line.add(even);
      line.add(odd);
    }
  for (const FloatGrid& grid : kGrids) {
    Line line(text("float_round", {size, narrow, grid.mantissa_bits}));
    std::vector<float> out(n);
    FloatRound r{x, dtype, size, 0.7f, grid, out.data(), kFloat32};
    line.add(fourbit_float_round(&r));
    line.add(out);
  }
  for (int32_t rule = 0; rule <= 2; ++rule) {
    Line line(text("table_round", {size, narrow, rule}));
    const float levels[] = {-4.0f, -1.0f, -0.25f, 0.0f, 0.25f, 1.0f, 4.0f};
    const float boundaries[] = {-2.5f, -0.625f, -0.125f, 0.125f, 0.625f, 2.5f};
    std::vector<float> out(n);
    TableRound r{x, dtype, size, 0.7f, boundaries, levels, 7, kNaN, out.data(), kFloat32, 9, rule, 3, 0.25f};
    line.add(fourbit_table_round(&r));
    line.add(out);
  }
  Line line(text("moments", {size, narrow}));
  const std::vector<float> finite = numbers(n, 12);
  const std::vector<uint16_t> finite_half = bfloat16(finite);
  Moments m{};
  fourbit_moments(narrow ? static_cast<const void*>(finite_half.data()) : finite.data(), dtype, size, &m);
  line.add(m.sum_square);
  line.add(m.sum_abs);
  line.add(m.amax);
}

void behind_products(size_t n) {
  const auto size = static_cast<int64_t>(n);
  const std::vector<uint8_t> packed = integers<uint8_t>(32 * blocks(n), 0, 255), mask = integers<uint8_t>(8 * blocks(n), 0, 255);
  for (int32_t is_signed = 0; is_signed <= 1; ++is_signed) {
    Line line(text("unpack", {size, is_signed}));
    std::vector<int8_t> out(n);
    Unpack u{packed.data(), size, is_signed, out.data(), kInt8};
    fourbit_unpack(&u);
    line.add(out);
  }
  const std::vector<float> wide = numbers(n, 12, true), finite = numbers(n, 12);
  const std::vector<int32_t> low = integers<int32_t>(n, -(1 << 30), 1 << 30), high = integers<int32_t>(n, -(1 << 20), 1 << 20);
  for (int which = 0; which < 4; ++which) {
    Line line(text("epilogue", {size, which}));
    std::vector<float> out(n);
    Epilogue e{};
    e.x = which == 0 ? static_cast<const void*>(wide.data()) : which == 1 ? static_cast<const void*>(finite.data()) : low.data();
    e.dtype = which < 2 ? kFloat32 : kInt32;
    e.n = size;
    e.high = which == 3 ? high.data() : nullptr;
    e.scale = 0.011f;
    e.rounds = 1;
    e.keep_infinite = which == 0;
    e.grid = kGrids[0];
    e.post = 0.37f;
    e.mask = which ? mask.data() : nullptr;
    e.packed = which ? packed.data() : nullptr;
    e.is_signed = 1;
    e.out = out.data();
    e.out_dtype = kFloat32;
    const double clipped = fourbit_epilogue(&e);
    if (which) line.add(clipped);
    line.add(out);
  }
  Line line(text("split", {size}));
  std::vector<float> powers(n);
  for (float& x : powers) x = as_float(static_cast<uint32_t>(next() & 0x80000000) | static_cast<uint32_t>(127 - 6 + 2 * (next() % 7)) << 23);
  const std::vector<uint16_t> x = bfloat16(powers);
  std::vector<int8_t> upper(n), lower(n);
  Split s{x.data(), size, 64.0f, upper.data(), lower.data()};
  fourbit_split(&s);
  line.add(upper);
  line.add(lower);
}

void normalization(int64_t rows, int32_t channels, int32_t halves) {
  Line line(text("norm", {rows, channels, halves}));
  const size_t n = static_cast<size_t>(rows * channels), c = static_cast<size_t>(channels);
  const std::vector<float> y = numbers(n, 4), gamma = numbers(c, 1), beta = numbers(c, 1), residual = numbers(n, 3);
  std::vector<float> mean(c), inv_std(c), slope(c), offset(c), running_mean(c), running_var(c, 1.0f), kept(n), out(n);
  NormStatistics s{};
  s.y = y.data(), s.rows = rows, s.channels = channels, s.scale = 0.3f, s.rounds = 1, s.grid = kGrids[0];
  s.kept = kept.data(), s.halves = halves, s.gamma = gamma.data(), s.beta = beta.data(), s.eps = 1e-5f;
  s.running_mean = running_mean.data(), s.running_var = running_var.data(), s.momentum = 0.1f;
  s.mean = mean.data(), s.inv_std = inv_std.data(), s.slope = slope.data(), s.offset = offset.data();
  fourbit_norm_statistics(&s);
  for (const auto* numbers : {&mean, &inv_std, &slope, &offset, &running_mean, &running_var}) line.add(*numbers);

  std::vector<int8_t> codes(n);
  std::vector<uint8_t> packed(32 * blocks(n)), mask(8 * blocks(n)), passes(8 * blocks(n));
  NormApply a{};
  a.kept = kept.data(), a.halves = halves, a.grid = kGrids[0], a.rows = rows, a.channels = channels;
  a.slope = slope.data(), a.offset = offset.data(), a.residual = residual.data(), a.act = 1, a.cap = 6.0f;
  a.out = out.data(), a.pass = passes.data(), a.clips = 1;
  a.clip.inv_scale = 3.0f, a.clip.high = 15.0f, a.clip.mask_rule = 1, a.clip.bound = 5.0f;
  a.clip.codes = codes.data(), a.clip.packed = packed.data(), a.clip.mask = mask.data();
  line.add(fourbit_norm_apply(&a));
  line.add(out);
  line.add(codes);
  for (const auto* bytes : {&packed, &mask, &passes}) line.add(*bytes);

  const std::vector<float> token = numbers(n, 6), out_grad = numbers(n, 6);
  std::vector<float> g(n), dgamma(c), dbeta(c);
  std::vector<uint16_t> even(n), odd(n);
  NormBackward b{};
  b.token = token.data(), b.token_dtype = kFloat32, b.token_scale = 0.2f, b.packed = packed.data(), b.mask = mask.data();
  b.out_grad = out_grad.data(), b.pass = passes.data(), b.act = 1, b.kept = kept.data(), b.halves = halves;
  b.grid = kGrids[0], b.rows = rows, b.channels = channels, b.gamma = gamma.data(), b.mean = mean.data();
  b.inv_std = inv_std.data(), b.g = g.data(), b.dgamma = dgamma.data(), b.dbeta = dbeta.data(), b.inv_scale = 40.0f;
  b.num = 2, b.log_grid[0] = kLogGrids[0], b.log_grid[1] = kLogGrids[1], b.out[0] = even.data(), b.out[1] = odd.data();
  line.add(fourbit_norm_backward(&b));
  for (const auto* numbers : {&g, &dgamma, &dbeta}) line.add(*numbers);
  line.add(even);
  line.add(odd);
  line.add(b.clipped);
}

void sums(int32_t width, int64_t chunk, int32_t stochastic) {
  Line line(text("accumulate", {width, chunk, stochastic}));
  constexpr int64_t kRows = 5, kDepth = 37, kPanels = 2;
  const std::vector<float> rows = numbers(kRows * kDepth, 6), columns = numbers(static_cast<size_t>(kPanels * kDepth * width), 6);
  std::vector<float> out(static_cast<size_t>(kRows * kPanels * width));
  Accumulate a{rows.data(), columns.data(), out.data(), 1, kRows, kPanels, kDepth, chunk, width, kGrids[0], stochastic, 11, 0, 64, 1};
  fourbit_accumulate(&a);
  line.add(out);
}

void cell(int64_t rows, int64_t size) {
  Line line(text("lstm", {rows, size}));
  const size_t n = static_cast<size_t>(rows * size);
  const std::vector<float> x = numbers(4 * n, 3), u = numbers(4 * n, 3), c = numbers(n, 2), dh = numbers(n, 2), dc = numbers(n, 2);
  std::vector<float> kept(4 * n), h(n), new_c(n), d_gates(4 * n), before(n);
  LstmForward f{x.data(), u.data(), c.data(), kept.data(), h.data(), new_c.data(), rows, size};
  fourbit_lstm_forward(&f);
  LstmBackward b{dh.data(), dc.data(), kept.data(), c.data(), new_c.data(), d_gates.data(), before.data(), rows, size};
  fourbit_lstm_backward(&b);
  for (const auto* numbers : {&kept, &h, &new_c, &d_gates, &before}) line.add(*numbers);
}

}  // namespace

int main() {
  if (!fourbit_use_isa("portable")) return 1;
  MatMul product{};
  if (fourbit_multiply(&product)) return 1;  // declined, and nothing touched
  for (size_t n : {0, 1, 63, 64, 65, 1000}) {
    for (bool narrow : {false, true}) quantizers(n, narrow);
    behind_products(n);
  }
  for (int32_t channels : {1, 20, 64})
    for (int32_t halves : {0, 1}) normalization(33, channels, halves);
  for (int32_t width : {16, 32, 64})
    for (int64_t chunk : {3, 37})
      for (int32_t stochastic : {0, 1}) sums(width, chunk, stochastic);
  for (int64_t size : {1, 15, 64}) cell(3, size);
}
