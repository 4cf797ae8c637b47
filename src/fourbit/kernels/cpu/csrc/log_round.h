// Rounding to powers of a radix, one or two grids from one read: to the nearest, or to a neighbour by random words.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace {

// Bits of the neighbour of s, of magnitude `near` or `far`, that the word u chooses, as the reference: towards +infinity with
// probability (s - low) / (high - low).
FOURBIT_INLINE Ints log_stochastic(Floats s, Ints magnitude, Floats u, const LogGrid& g) {
  const float smallest = as_float(g.smallest), most = as_float(g.largest), ratio = as_float(0x3F800000 + g.octaves);
  const Ints power = smaller(wrapping_sum((magnitude - g.smallest) & -g.octaves, all_ints(g.smallest)), all_ints(g.largest));
  const Floats near = as_floats(magnitude >= g.smallest ? power : Ints{});
  Floats far = near > 0.0f ? near * ratio : all_floats(smallest);
  far = smaller(far, all_floats(most));
  const Floats size = as_floats(magnitude), inside = smaller(all_floats(most), size);
  far = near == size ? near : far;
  const Ints is_negative = s < 0.0f;
  const Floats above_low = is_negative ? far - inside : inside - near;
  const Ints is_far = goes_up(u, above_low, far - near) ^ is_negative;
  return as_ints(is_far ? far : near) | (is_negative & kSign);
}

template <typename T>
FOURBIT_INLINE void log_block(const LogRound& r, const T* from, int64_t begin, int count, Ints& top) {
  T room[kBlock];
  const T* x = whole(from, count, room);
  Target<uint16_t> first(r.out[0] + begin, count), second(r.out[r.num - 1] + begin, count);
  uint16_t* out[2] = {first.block(), second.block()};
  FOURBIT_EACH(v) {
    const Floats t = read(x + v * kVector), s = t * r.inv_scale;
    const Ints magnitude = magnitudes(s), sign = as_ints(s) & kSign;
    raise(top, t);
    for (int k = 0; k < r.num; ++k) {
      const LogGrid& g = r.grid[k];
      Ints y = log_nearest(magnitude, g) | sign;
      if (r.rule) {
        const Ints drawn = log_stochastic(s, magnitude, draw(r.key[k], begin, v), g);
        y = r.rule == 1 ? drawn : (magnitude >= g.smallest ? y : drawn);
      }
      write_upper(out[k] + v * kVector, y);
    }
  }
  first.finish();
  if (r.num == 2) second.finish();
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
