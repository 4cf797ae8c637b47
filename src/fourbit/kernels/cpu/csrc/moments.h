// Sums of x^2 and |x|, in double precision, and max|x|.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace {

template <typename T>
Moments moments_of(const T* x, int64_t n, int32_t& largest) {
  constexpr int kSums = 16, kDoubles = 2 * kSums / kVector;  // partial sums, whatever the instruction set
  Doubles square[kDoubles] = {}, absolute[kDoubles] = {};
  Ints top{};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    prefetch(x + i, kSums);
#pragma GCC unroll 4
    for (int v = 0; v < kSums / kVector; ++v) {
      const Ints magnitude = magnitudes(read(x + i + v * kVector));
      Doubles a[2];
      to_doubles(as_floats(magnitude), a[0], a[1]);
      top = larger(top, magnitude);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        square[2 * v + half] = add_square(square[2 * v + half], a[half]);
        absolute[2 * v + half] += a[half];
      }
    }
  }
  largest = largest_of(top);
  for (; i < n; ++i) {
    const int32_t magnitude = as_bits(load(x + i)) & 0x7FFFFFFF;
    const double a = as_float(magnitude);
    largest = max_of(largest, magnitude);
    square[0][0] += a * a;
    absolute[0][0] += a;
  }
  Moments m{0.0, 0.0, 0.0f};
  for (int k = 0; k < kDoubles; ++k)
    for (int j = 0; j < kVector / 2; ++j) {
      m.sum_square += square[k][j];
      m.sum_abs += absolute[k][j];
    }
  return m;
}

template <typename T>
Moments moments_typed(const void* data, int64_t n) {
  struct Task { const T* x; Moments part[kMaxThreads]; Largest largest; } task{static_cast<const T*>(data), {}, {}};
  const int pieces = parallel(n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    t.part[thread] = moments_of(t.x + begin, end - begin, t.largest.of[thread]);
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
}  // namespace fourbit
