// Rounding to powers of a radix, one or two grids from one read: to the nearest, or to a neighbour by random words.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace {

// Bits of the neighbour of s, in magnitude `near` or `far`, that the word u chooses, as the reference: towards +infinity with
// probability (s - low) / (high - low). A number of the grid is its own `near`, and stays.
FOURBIT_INLINE Ints log_stochastic(Floats s, Floats u, const Powers& g) {
  const Ints magnitude = magnitudes(s), is_negative = s < 0.0f;
  const Ints power = smaller(wrapping_sum((magnitude - g.smallest) & g.octaves, g.smallest), g.largest);
  const Floats near = as_floats(g.smallest > magnitude ? Ints{} : power), most = as_floats(g.largest);
  const Floats ratio = as_floats(0x3F800000 - g.octaves);
  const Floats far = smaller(larger(near * ratio, as_floats(g.smallest)), most);
  const Floats inside = smaller(most, as_floats(magnitude));
  const Floats above_low = is_negative ? far - inside : inside - near;
  const Ints is_far = goes_up(u, above_low, far - near) ^ is_negative;
  return as_ints(is_far ? far : near) | (is_negative & kSign);
}

// A block on one grid, as bfloat16.
template <int rule>
FOURBIT_INLINE void log_codes(const LogRound& r, int k, const Floats (&s)[kPerBlock], int64_t begin, Ints (&codes)[kPerBlock]) {
  const Powers g(r.grid[k]);
  FOURBIT_EACH(v) {
    const Ints magnitude = magnitudes(s[v]);
    Ints y;
    if (rule != 1) y = log_nearest(magnitude, g) | (as_ints(s[v]) & kSign);
    if (rule != 0) {
      const Ints drawn = log_stochastic(s[v], draw(r.key[k], begin, v), g);
      y = rule == 1 ? drawn : (g.smallest > magnitude ? drawn : y);
    }
    codes[v] = upper_half(y);
  }
}

template <typename T>
FOURBIT_INLINE void log_block(const LogRound& r, const T* from, int64_t begin, int count, Ints& top) {
  T room[kBlock];
  const T* x = whole(from, count, room);
  Floats s[kPerBlock];
  FOURBIT_EACH(v) {
    s[v] = read(x + v * kVector);
    raise(top, s[v]);
    s[v] *= r.inv_scale;
  }
  for (int k = 0; k < r.num; ++k) {
    Ints codes[kPerBlock];
    if (r.rule == 0) log_codes<0>(r, k, s, begin, codes);
    else if (r.rule == 1) log_codes<1>(r, k, s, begin, codes);
    else log_codes<2>(r, k, s, begin, codes);
    Target<uint16_t> out(r.out[k] + begin, count);
    write_unsigned(out.block(), codes);
    out.finish();
  }
}

template <typename T>
float log_typed(const LogRound* r) {
  struct Task { const LogRound* r; Largest largest; } task{r, {}};
  const int pieces = parallel(r->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const LogRound r = *t.r;
    Ints top{};
    each_block(begin, end, [&](int64_t i, int count) { log_block(r, static_cast<const T*>(r.x) + i, i, count, top); });
    t.largest.of[thread] = largest_of(top);
  }, &task);
  return task.largest.get(pieces);
}

float log_round(const LogRound* r) { return r->dtype == kBFloat16 ? log_typed<uint16_t>(r) : log_typed<float>(r); }

}  // namespace
}  // namespace fourbit
