// Rounding to a binary float format.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace {

template <typename T, typename O>
float float_typed(const FloatRound* r) {
  struct Task { const FloatRound* r; Largest largest; } task{r, {}};
  const int pieces = parallel(r->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const FloatRound r = *t.r;
    Ints top{};
    each_block(begin, end, [&](int64_t i, int count) {
      T room[kBlock];
      const T* x = whole(static_cast<const T*>(r.x) + i, count, room);
      Target<O> target(static_cast<O*>(r.out) + i, count);
      Floats y[kPerBlock];
      FOURBIT_EACH(v) {
        y[v] = read(x + v * kVector);
        raise(top, y[v]);
        y[v] *= r.inv_scale;
      }
      float_nearest(y, r.grid);
      if (r.grid.mantissa_bits <= 7) write_exactly(target.block(), y);  // as many as bfloat16 has
      else write(target.block(), y);
      target.finish();
    });
    t.largest.of[thread] = largest_of(top);
  }, &task);
  return task.largest.get(pieces);
}

float float_round(const FloatRound* r) {
  if (r->dtype == kBFloat16)
    return r->out_dtype == kBFloat16 ? float_typed<uint16_t, uint16_t>(r) : float_typed<uint16_t, float>(r);
  return r->out_dtype == kBFloat16 ? float_typed<float, uint16_t>(r) : float_typed<float, float>(r);
}

}  // namespace
}  // namespace fourbit
