// The scales of a panel's tiles: the largest magnitudes, scales on their grid, the better of two, and what is written of them.
#pragma once

#include "panels.h"

namespace fourbit {
namespace FOURBIT_ISA {
namespace {

// The scales of vector v of the block of a line that begins at `column`: one for each number, or one for `each` numbers, 64 standing for
// more as well.
template <int each>
FOURBIT_INLINE Floats scales_at(const float* scales, int column, int v, int shift) {
  if (each == 1) return read(scales + column + v * kVector);
  return all_floats(scales[each == 64 ? column >> shift : column / each + v * kVector / each]);
}

// The largest magnitude of each tile, and of all.
__attribute__((noinline)) Ints measure_panel(const Panels& panels, const Place& p, Work& w, Ints top) {
  const int width = panels.width, across = panels.tiles_across(), each = panels.tile_columns;
  for (int first = 0, row = 0; first < p.lines; first += panels.tile_lines, ++row) {
    const int end = min_of(first + panels.tile_lines, p.lines);
    float* to = w.amax + row * across;
    if (each == 1) {
      for (int c = 0; c < width; c += 2 * kVector) {
        Ints a{}, b{};
        for (int i = first; i < end; ++i) {
          a = larger(a, magnitudes(read(w.line[i] + c)));
          b = larger(b, magnitudes(read(w.line[i] + c + kVector)));
        }
        write(to + c, as_floats(a));
        write(to + c + kVector, as_floats(b));
        top = larger(top, larger(a, b));
      }
      continue;
    }
    for (int tile = 0; tile < across; tile += kVector) {
      Ints r[kVector];
#pragma GCC unroll 16
      for (int j = 0; j < kVector; ++j) {
        const int from = min_of(tile + j, across - 1) * each;
        r[j] = Ints{};
        for (int i = first; i < end; ++i)
          for (int c = from; c < from + each; c += kVector) r[j] = larger(r[j], magnitudes(read(w.line[i] + c)));
      }
      const Ints found = largest_of_each(r);
      std::memcpy(to + tile, &found, static_cast<size_t>(min_of(kVector, across - tile)) * 4);
      top = larger(top, found);
    }
  }
  return top;
}

// Multiples of the root mean square of each tile.
__attribute__((noinline)) void measure_squares(const Panels& panels, const Place& p, Work& w, double multiple) {
  const int across = panels.tiles_across(), each = panels.tile_columns;
  for (int first = 0, row = 0; first < p.lines; first += panels.tile_lines, ++row) {
    const int end = min_of(first + panels.tile_lines, p.lines);
    for (int tile = 0; tile < across; ++tile) {
      const int from = tile * each, count = (end - first) * max_of(1, min_of(each, p.columns - from));
      Doubles sum[2] = {};
      for (int i = first; i < end; ++i)
        for (int c = from; c < from + each; c += kVector) {
          Doubles a, b;
          to_doubles(read(w.line[i] + c), a, b);
          sum[0] = add_square(sum[0], a);
          sum[1] = add_square(sum[1], b);
        }
      double total = 0.0;
      for (int j = 0; j < kVector / 2; ++j) total += sum[0][j] + sum[1][j];
      w.statistic[row * across + tile] = static_cast<float>(multiple * std::sqrt(total / count));
    }
  }
}

// Unbiased exponents of numbers that are not zero.
FOURBIT_INLINE Ints exponents(Floats x, Ints& fraction) {
  const Ints small = magnitudes(x) < 0x00800000;
  const Ints bits = magnitudes(small ? x * 16777216.0f : x);
  fraction = bits & 0x7FFFFF;
  return (bits >> 23) - (small ? all_ints(127 + 24) : all_ints(127));
}

// 2^n for n from -127 to 127.
FOURBIT_INLINE Floats powers_of_two(Ints n) { return as_floats(n > -127 ? (n + 127) << 23 : all_ints(0x00400000)); }

// The scales of tiles whose statistics (the largest numbers, as a rule) are to become target `which`: on their grid, and as the numbers are
// multiplied.
__attribute__((noinline)) void scale_tiles(const RoundTiles& r, int which, int num, const Work& w, float* block, float* inverse) {
  const float* statistic = r.clip_rms > 0.0 ? w.statistic : w.amax;
  for (int i = 0; i < num; i += kVector) {
    const Floats largest = read(statistic + i);
    Floats b;
    if (r.scale_rule == 2) {
      const Floats raw = r.num_targets > 1 ? largest / r.target[0] * r.encode * r.factor[which] : largest * r.factor[which];
      b = float_nearest(raw, r.scale_grid);
    } else {
      Floats from = largest;
      Ints fraction, n;
      if (r.scale_rule == 3) {
        from = largest * r.factor[which];
        n = exponents(from, fraction);
        n -= (fraction > 0x400000) | ((fraction == 0x400000) & ((n & 1) == 0));  // ties: to the even place, 2^-127 being the first
      } else {
        const int32_t target = as_bits(r.target[which]);
        n = exponents(from, fraction) - ((target >> 23) - 127);
        if (r.scale_rule == 1) n -= fraction > (target & 0x7FFFFF);  // true is -1
      }
      n = smaller(larger(n, all_ints(-127)), all_ints(127));
      b = powers_of_two(from > 0.0f ? n : all_ints(-127));
    }
    b = magnitudes(read(w.amax + i)) < 0x7F800000 ? b : as_floats(all_ints(0x7FC00000));
    write(block + i, b);
    const Floats most = all_floats(std::numeric_limits<float>::max());
    const Floats factor = smaller(most, 1.0f / (b * r.decode)) * r.prescale;  // NaN stays
    write(inverse + i, b == 0.0f ? Floats{} : factor);
  }
}

// The place of scales among the numbers of their format that are not negative.
FOURBIT_INLINE Ints places(Floats b, const RoundTiles& r) {
  if (r.scale_rule != 2) return shifted_right(as_ints(b), 23);  // powers of two, the smallest of which is no normal number
  const FloatGrid& g = r.scale_grid;
  const int shift = 23 - g.mantissa_bits;
  const Ints normal = shifted_right(as_ints(b), shift) - ((g.lowest - 1) << g.mantissa_bits);
  const Floats finest = all_floats(as_float((g.lowest - g.mantissa_bits) << 23));
  const Ints below = nearest_integers(smaller(b / finest, all_floats(static_cast<float>(1 << g.mantissa_bits))));
  return as_ints(b) >= g.lowest << 23 ? normal : below;
}

// Writes the scales of a panel: codes, and what tiles are multiplied by in all.
__attribute__((noinline)) void write_scales(const RoundTiles& r, const Panels& panels, const Place& p, Work& w) {
  const int across = panels.tiles_across(), rows = panels.tile_rows_of(p);
  const int exist = (p.columns + panels.tile_columns - 1) / panels.tile_columns;
  const int64_t first = panels.first_tile(p), step = panels.of_tile_column;
  const uint8_t* code_of = r.code_of;
  alignas(64) int32_t place[kMostTiles];
  for (int i = 0; i < rows * across; i += kVector) {
    const Floats b = read(w.block + i);
    const Ints at = b == b ? places(b, r) : all_ints(255);
    std::memcpy(place + i, &at, sizeof at);
    write(w.whole + i, b * r.decode / r.prescale);
  }
  for (int row = 0; row < rows; ++row) {
    const int from = row * across;
    uint8_t* codes = r.scale_codes + first + row * panels.of_tile_line;
    float* to = r.each + first + row * panels.of_tile_line;
    for (int i = 0; i < exist; ++i) codes[i * step] = code_of[place[from + i] & 255];
    if (step == 1) std::memcpy(to, w.whole + from, static_cast<size_t>(exist) * sizeof(float));
    else for (int i = 0; i < exist; ++i) to[i * step] = w.whole[from + i];
  }
}

// The squared error of each tile, term by term in the order of its rows, then of its sums.
template <int each>
__attribute__((noinline)) void errors(const RoundTiles& r, const Panels& panels, const Place& p, Work& w, const float* block, const float* inverse,
                                      float* error) {
  const int width = panels.width, across = panels.tiles_across(), columns = panels.tile_columns;
  const int shift = __builtin_ctz(static_cast<unsigned>(columns));
  std::memset(error, 0, sizeof(float) * static_cast<size_t>(panels.tile_rows_of(p) * across));
  for (int first = 0, row = 0; first < p.lines; first += panels.tile_lines, ++row) {
    const int end = min_of(first + panels.tile_lines, p.lines);
    float* total = error + row * across;
    for (int i = first; i < end; ++i)
      for (int c = 0; c < width; c += kBlock)
        FOURBIT_EACH(v) {
          const int column = c + v * kVector;
          const Floats x = read(w.line[i] + column), b = scales_at<each>(block + row * across, c, v, shift);
          Floats y = with_subnormals(x * scales_at<each>(inverse + row * across, c, v, shift), r.grid) * b;
          if (r.reach > 0.0f) y = y * r.largest / r.reach;
          const Floats squares = (y - x) * (y - x);
          if (each == 1) write(total + column, read(total + column) + squares);
          else write(w.squares + i * width + column, squares);
        }
    if (each == 1) continue;
    for (int tile = 0; tile < across; ++tile) {
      float sum = 0.0f;
      if (r.tiles.turned) {
        for (int c = tile * columns; c < (tile + 1) * columns; ++c)
          for (int i = first; i < end; ++i) sum += w.squares[i * width + c];
      } else {
        for (int i = first; i < end; ++i)
          for (int c = tile * columns; c < (tile + 1) * columns; ++c) sum += w.squares[i * width + c];
      }
      total[tile] = sum;
    }
  }
}

using Errors = void (*)(const RoundTiles&, const Panels&, const Place&, Work&, const float*, const float*, float*);

void choose(const RoundTiles& r, const Panels& panels, const Place& p, int num, Work& w) {
  const int each = panels.tile_columns;
  float *first = w.error[0], *second = w.error[1];
  scale_tiles(r, 1, num, w, w.other_block, w.other_inverse);
  const Errors errors_of = each == 1 ? errors<1> : each == 16 ? errors<16> : each == 32 ? errors<32> : errors<64>;
  errors_of(r, panels, p, w, w.block, w.inverse, first);
  errors_of(r, panels, p, w, w.other_block, w.other_inverse, second);
  for (int i = 0; i < num; ++i)
    if (second[i] < first[i]) {
      w.block[i] = w.other_block[i];
      w.inverse[i] = w.other_inverse[i];
    }
}

}  // namespace
}  // namespace FOURBIT_ISA
}  // namespace fourbit
