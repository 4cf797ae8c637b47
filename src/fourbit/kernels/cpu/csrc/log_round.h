// Rounding to powers of a radix, one or two grids from one read: to the nearest, or to a neighbour by random words.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace {

// Bits of the neighbour of s, in magnitude `near` or `far`, that the word u chooses, as the reference: towards +infinity with
// probability (s - low) / (high - low). A number of the grid is its own `near`, and stays.
FOURBIT_INLINE Ints log_stochastic(Floats s, Ints u, const Powers& g) {
  const Ints magnitude = magnitudes(s), is_negative = s < 0.0f;
  const Ints power = smaller(wrapping_sum((magnitude - g.smallest) & g.octaves, g.smallest), g.largest);
  const Floats near = as_floats(g.smallest > magnitude ? Ints{} : power), most = as_floats(g.largest);
  const Floats ratio = as_floats(0x3F800000 - g.octaves);
  const Floats far = smaller(larger(near * ratio, as_floats(g.smallest)), most);
  const Floats inside = smaller(most, as_floats(magnitude));
  const Floats above_low = is_negative ? far - inside : inside - near;
  const Ints is_far = goes_up(to_floats(u), above_low, far - near) ^ is_negative;
  return as_ints(is_far ? far : near) | (is_negative & kSign);
}

// The same with radix 2, without the division: a mantissa is how far a number has come from its power of two to the next.
// `scale` is 2^24 / smallest.
FOURBIT_INLINE Ints twos_stochastic(Floats s, Ints u, const Powers& g, Floats scale) {
  const Ints is_negative = s < 0.0f, inside = smaller(magnitudes(s), g.largest);
  const Ints from_top = u ^ (~is_negative & 0xFFFFFF);  // carries where u is below 2^24 times the way, if s is positive
  const Ints power = (Ints)((((Words)inside << 1) + (Words)from_top) >> 1) & 0x7F800000;
  const Floats low = as_floats(inside), way = (is_negative ? as_floats(g.smallest) - low : low) * scale;
  const Ints up = to_floats(u) < way;
  const Ints y = g.smallest > inside ? (up ^ is_negative) & g.smallest : power;
  return y | (is_negative & kSign);
}

// A block on one grid, one vector after the other.
template <int rule, bool twos, typename O>
FOURBIT_INLINE void log_numbers(const LogRound& r, int k, const Floats (&s)[kPerBlock], int64_t begin, O* out) {
  const Powers g(r.grid[k]);
  const Floats scale = all_floats(16777216.0f / as_float(r.grid[k].smallest));
  Floats numbers[kPerBlock];
  FOURBIT_EACH(v) {
    const Ints magnitude = magnitudes(s[v]);
    Ints y;
    if (rule != 1) y = log_nearest(magnitude, g) | (as_ints(s[v]) & kSign);
    if (rule != 0) {
      const Ints u = draw_bits(r.key[k], begin, v);
      const Ints drawn = twos ? twos_stochastic(s[v], u, g, scale) : log_stochastic(s[v], u, g);
      y = rule == 1 ? drawn : (g.smallest > magnitude ? drawn : y);
    }
    numbers[v] = as_floats(y);
  }
  write_exactly(out, numbers);
}

template <int rule, typename O>
FOURBIT_INLINE void log_drawn(const LogRound& r, int k, const Floats (&s)[kPerBlock], int64_t begin, O* out) {
  if (r.grid[k].octaves == 1 << 23) log_numbers<rule, true>(r, k, s, begin, out);
  else log_numbers<rule, false>(r, k, s, begin, out);
}

template <typename T, typename O>
FOURBIT_INLINE void log_block(const LogRound& r, const T* from, int64_t begin, int count, Ints& top) {
  T room[kBlock];
  const T* x = whole(from, count, room);
  Floats s[kPerBlock];
  FOURBIT_EACH(v) {
    s[v] = read(x + v * kVector);
    raise(top, s[v]);
    s[v] *= r.inv_scale;
  }
  Halves halves[kPerBlock / 2];
  upper_halves(s, halves);
  for (int k = 0; k < r.num; ++k) {
    Target<O> out(static_cast<O*>(r.out[k]) + begin, count);
    if (r.rule == 0) write_nearest(out.block(), halves, r.grid[k]);
    else if (r.rule == 1) log_drawn<1>(r, k, s, begin, out.block());
    else log_drawn<2>(r, k, s, begin, out.block());
    out.finish();
  }
}

template <typename T, typename O>
float log_typed(const LogRound* r) {
  struct Task { const LogRound* r; Largest largest; } task{r, {}};
  const int pieces = parallel(r->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const LogRound r = *t.r;
    Ints top{};
    each_block(begin, end, [&](int64_t i, int count) { log_block<T, O>(r, static_cast<const T*>(r.x) + i, i, count, top); });
    t.largest.of[thread] = largest_of(top);
  }, &task);
  return task.largest.get(pieces);
}

template <typename T>
float log_out(const LogRound* r) {
  return r->out_dtype == kBFloat16 ? log_typed<T, uint16_t>(r) : log_typed<T, int8_t>(r);
}

float log_round(const LogRound* r) { return r->dtype == kBFloat16 ? log_out<uint16_t>(r) : log_out<float>(r); }

}  // namespace
}  // namespace fourbit
