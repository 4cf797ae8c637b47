// What follows a matrix product: scale, rounding, mask, and the sum of what the mask removes.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace {

// 256 high + low, rounded to float32 once: exact in double precision.
FOURBIT_INLINE Floats joined(const int32_t* high, const int32_t* low) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256d unit = _mm256_set1_pd(256.0);
  __m128 half[2];
  for (int i = 0; i < 2; ++i) {
    const __m256d upper = _mm256_cvtepi32_pd(_mm_loadu_si128(reinterpret_cast<const __m128i*>(high + 4 * i)));
    const __m256d lower = _mm256_cvtepi32_pd(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low + 4 * i)));
    half[i] = _mm256_cvtpd_ps(_mm256_add_pd(_mm256_mul_pd(upper, unit), lower));
  }
  return _mm256_set_m128(half[1], half[0]);
#else
  float y[kVector];
  for (int j = 0; j < kVector; ++j) y[j] = static_cast<float>(256.0 * high[j] + static_cast<double>(low[j]));
  return read(y);
#endif
}

template <typename T>
FOURBIT_INLINE Floats joined(const int32_t*, const T*) { return Floats{}; }  // halves are integers

template <typename T, typename O>
FOURBIT_INLINE void epilogue_block(const Epilogue& e, int64_t begin, int count, Parts& parts) {
  T room[kBlock];
  int32_t high_room[kBlock];
  const T* x = whole(static_cast<const T*>(e.x) + begin, count, room);
  const int32_t* high = e.high ? whole(e.high + begin, count, high_room) : nullptr;
  Floats y[kPerBlock];
  FOURBIT_EACH(v) y[v] = (high ? joined(high + v * kVector, x + v * kVector) : read(x + v * kVector)) * e.scale;
  if (e.rounds && e.keep_infinite) {
    FOURBIT_EACH(v) y[v] = magnitudes(y[v]) >= 0x7F800000 ? y[v] : float_nearest(y[v], e.grid);
  } else if (e.rounds) {
    float_nearest(y, e.grid);
  }
  FOURBIT_EACH(v) y[v] *= e.post;
  if (e.mask) {
    const uint64_t inside = load_bits(e.mask + begin / 8);
    if (e.packed) {
      int8_t q[kBlock];
      unpack_block(e.packed + begin / 2, e.is_signed, q);
      add_where(y, positive(q) & ~inside, negative(q) & ~inside, parts);
    }
    FOURBIT_EACH(v) y[v] = keep(y[v], inside, v);
  }
  Target<O> target(static_cast<O*>(e.out) + begin, count);
  write(target.block(), y);
  target.finish();
}

template <typename T, typename O>
double epilogue_typed(const Epilogue* e) {
  struct Task { const Epilogue* e; double sum[kMaxThreads]; } task{e, {}};
  const int pieces = parallel(e->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const Epilogue e = *t.e;
    double total = 0.0;
    int pending = 0;
    Parts parts;
    each_block(begin, end, [&](int64_t i, int count) {
      epilogue_block<T, O>(e, i, count, parts);
      if (++pending % 64 == 0) parts.move_to(total);
    });
    parts.move_to(total);
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

}  // namespace
}  // namespace fourbit
