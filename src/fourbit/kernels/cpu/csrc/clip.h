// Rounding to integers, with clipping: codes, packed codes and mask from one read.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace {

template <typename T>
FOURBIT_INLINE void clip_block(const Clip& c, const T* from, int64_t begin, int count, Ints& top) {
  T room[kBlock];
  int8_t q[kBlock];
  Ints codes[kPerBlock];
  uint64_t inside = 0;
  const T* x = whole(from, count, room);
  FOURBIT_EACH(v) {
    const Floats t = read(x + v * kVector);
    raise(top, t);
    codes[v] = nearest_code(t * c.inv_scale, c.low, c.high);
    if (c.mask_rule) inside |= bits_of(inside_range(t, c.mask_rule, c.bound), v);
  }
  write_bytes(q, codes);
  for (int j = count; j < kBlock; ++j) q[j] = 0;
  if (c.mask) store_bits(c.mask + begin / 8, inside & first_bits(count));
  if (c.packed) pack_codes(q, c.packed + begin / 2);
  if (c.codes) copy_bytes(c.codes + begin, q, count);
}

template <typename T>
float clip_typed(const Clip* c) {
  struct Task { const Clip* c; Largest largest; } task{c, {}};
  const int pieces = parallel(c->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& t = *static_cast<Task*>(p);
    const Clip c = *t.c;
    Ints top{};
    each_block(begin, end, [&](int64_t i, int count) { clip_block(c, static_cast<const T*>(c.x) + i, i, count, top); });
    t.largest.of[thread] = largest_of(top);
  }, &task);
  return task.largest.get(pieces);
}

float clip(const Clip* c) { return c->dtype == kBFloat16 ? clip_typed<uint16_t>(c) : clip_typed<float>(c); }

}  // namespace
}  // namespace fourbit
