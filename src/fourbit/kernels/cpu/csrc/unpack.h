// Packed codes as numbers.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace {

FOURBIT_INLINE void write_codes(const int8_t* q, int8_t* out) { std::memcpy(out, q, kBlock); }

template <typename O>
FOURBIT_INLINE void write_codes(const int8_t* q, O* out) {
  Floats x[kPerBlock];
  FOURBIT_EACH(v) x[v] = to_floats(read_signed(q + v * kVector));
  write_exactly(out, x);
}

template <typename O>
void unpack_typed(const Unpack* u) {
  parallel(u->n, kBlock, [](int64_t begin, int64_t end, int, void* p) {
    const Unpack u = *static_cast<const Unpack*>(p);
    each_block(begin, end, [&](int64_t i, int count) {
      int8_t q[kBlock];
      Target<O> target(static_cast<O*>(u.out) + i, count);
      unpack_block(u.packed + i / 2, u.is_signed, q);
      write_codes(q, target.block());
      target.finish();
    });
  }, const_cast<Unpack*>(u));
}

void unpack(const Unpack* u) {
  if (u->out_dtype == kFloat32) unpack_typed<float>(u);
  else if (u->out_dtype == kBFloat16) unpack_typed<uint16_t>(u);
  else unpack_typed<int8_t>(u);
}

}  // namespace
}  // namespace fourbit
