// The numbers of a panel in float32, rotated: blocks of neighbours along the sums times signs, Sylvester's matrix and a factor.
#pragma once

#include "panels.h"

namespace fourbit {
namespace FOURBIT_ISA {
namespace {

// The pairs (a, b) of lanes that lie `half` apart become (a + b, a - b).
template <int half>
FOURBIT_INLINE Floats mixed_lanes(Floats x) {
  Floats signs;
  for (int j = 0; j < kVector; ++j) signs[j] = j & half ? -1.0f : 1.0f;
  return add_signed(x, signs, swapped<half>(x));
}

FOURBIT_INLINE Floats mixed_within(Floats x, int size) {
  if (size > 1) x = mixed_lanes<1>(x);
  if (size > 2) x = mixed_lanes<2>(x);
  if (kVector > 4 && size > 4) x = mixed_lanes<kVector / 2 < 4 ? 1 : 4>(x);
  if (kVector > 8 && size > 8) x = mixed_lanes<kVector / 2 < 8 ? 1 : 8>(x);
  return x;
}

template <int N>
FOURBIT_INLINE void mix_vectors(Floats (&v)[N]) {
#pragma GCC unroll 4
  for (int half = 1; half < N; half *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if (!(i & half)) {
        const Floats a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
      }
}

template <typename T>
FOURBIT_INLINE const T* whole_line(const T* x, int count, int width, T* room) {
  if (count >= width) return x;
  const int kept = max_of(count, 0);
  std::memset(room + kept, 0, static_cast<size_t>(width - kept) * sizeof(T));
  if (kept) std::memcpy(room, x, static_cast<size_t>(kept) * sizeof(T));
  return room;
}

// N vectors that a block of a rotation fills, or blocks within one.
template <int N, typename T>
FOURBIT_INLINE void rotate_within(const T* x, int width, int size, const float* signs, float factor, float* out) {
  for (int c = 0; c < width; c += N * kVector) {
    Floats v[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      v[i] = read(x + c + i * kVector);
      if (signs) v[i] *= read(signs + i * kVector);
      v[i] = mixed_within(v[i], size);
    }
    mix_vectors(v);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) write(out + c + i * kVector, v[i] * factor);
  }
}

template <typename T>
__attribute__((noinline)) void rotate_line(const T* x, int width, int size, const float* signs, float factor, float* out) {
  switch (size / kVector) {
    case 0: case 1: return rotate_within<1>(x, width, size, signs, factor, out);
    case 2: return rotate_within<2>(x, width, size, signs, factor, out);
    case 4: return rotate_within<4>(x, width, size, signs, factor, out);
    case 8: return rotate_within<8>(x, width, size, signs, factor, out);
    case 16: return rotate_within<16>(x, width, size, signs, factor, out);
    default: return rotate_within<32>(x, width, size, signs, factor, out);
  }
}

// Lines `step` apart, N of them, mixed; the first time they are read from x and get their signs.
template <int N>
FOURBIT_INLINE void mix_lines(float* numbers, int width, int step, float factor) {
  for (int c = 0; c < width; c += kVector) {
    Floats v[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = read(numbers + i * step * width + c);
    mix_vectors(v);
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) write(numbers + i * step * width + c, factor == 1.0f ? v[i] : v[i] * factor);
  }
}

__attribute__((noinline)) void mix_some(float* numbers, int width, int num, int step, float factor) {
  switch (num) {
    case 2: return mix_lines<2>(numbers, width, step, factor);
    case 4: return mix_lines<4>(numbers, width, step, factor);
    default: return mix_lines<8>(numbers, width, step, factor);
  }
}

// The rotation of lines, eight at a time, then the eighths, and so on.
void mix_panel(float* numbers, int lines, int width, int size, float factor) {
  for (int first = 0; first < lines; first += size) {
    float* block = numbers + first * width;
    for (int step = 1; step < size; step *= 8) {
      const int num = min_of(8, size / step);
      const float last = step * 8 >= size ? factor : 1.0f;
      for (int from = 0; from < size; from += num * step)
        for (int i = 0; i < step; ++i) mix_some(block + (from + i) * width, width, num, step, last);
    }
  }
}

// A line as float32: where it lies, if it may stay there.
template <typename T>
FOURBIT_INLINE const float* widened(const T* x, bool, float* out, int width) {
  for (int c = 0; c < width; c += kVector) write(out + c, read(x + c));
  return out;
}

FOURBIT_INLINE const float* widened(const float* x, bool stays, float* out, int width) {
  if (stays) return x;
  std::memcpy(out, x, static_cast<size_t>(width) * sizeof(float));
  return out;
}

// The lines of a panel as float32, rotated.
template <typename T>
__attribute__((noinline)) void load_panel(const Panels& panels, const Place& p, Work& w) {
  const Tiles& t = *panels.t;
  const int width = panels.width;
  const int64_t x_lines = t.turned ? t.x_sums : t.rows, x_columns = t.turned ? t.rows : t.x_sums;
  const int64_t step = t.x_steps[t.turned ? 3 : 1];
  const int have = static_cast<int>(x_columns - p.column < width ? x_columns - p.column : width);
  const T* x = static_cast<const T*>(t.x) + p.group * t.x_steps[0] + p.spot * t.x_steps[2] + p.line * step + p.column;
  alignas(64) T room[kMostWidth];
  for (int i = 0; i < p.lines; ++i) {
    const T* next = x + i * step + width;
    for (int c = 0; c < width; c += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(next + c);
    float* out = w.numbers + i * width;
    const T* from = whole_line(x + i * step, p.line + i < x_lines ? have : 0, width, room);
    w.line[i] = t.rotation ? out : widened(from, from != room, out, width);
    if (!t.rotation) continue;
    if (!t.turned) {
      rotate_line(from, width, t.rotation, t.signs ? w.signs : nullptr, t.factor, out);
    } else {
      const float sign = t.signs ? t.signs[(p.line + i) % t.rotation] : 1.0f;
      for (int c = 0; c < width; c += kVector) write(out + c, read(from + c) * sign);
    }
  }
  if (t.turned && t.rotation) mix_panel(w.numbers, p.lines, width, t.rotation, t.factor);
}

}  // namespace
}  // namespace FOURBIT_ISA
}  // namespace fourbit
