// bfloat16 numbers as two 8-bit integers: x * unit = 256 high + low.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace {

// x * unit may fall short of an integer by one rounding. Saturated; NaN becomes the lowest.
void split(const Split* s) {
  parallel(s->n, kBlock, [](int64_t begin, int64_t end, int, void* p) {
    const Split s = *static_cast<const Split*>(p);
    each_block(begin, end, [&](int64_t i, int count) {
      uint16_t room[kBlock];
      const uint16_t* x = whole(s.x + i, count, room);
      Target<int8_t> high(s.high + i, count), low(s.low + i, count);
      Ints upper[kPerBlock], lower[kPerBlock];
      FOURBIT_EACH(v) {
        const Ints n = nearest_code(read(x + v * kVector) * s.unit, -32768.0f, 32767.0f);
        upper[v] = (n + ((n >> 31) & 255)) >> 8;  // n / 256, towards zero
        lower[v] = n - (upper[v] << 8);
      }
      write_bytes(high.block(), upper);
      write_bytes(low.block(), lower);
      high.finish();
      low.finish();
    });
  }, const_cast<Split*>(s));
}

}  // namespace
}  // namespace fourbit
