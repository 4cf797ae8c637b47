// Operands [groups, rows, spots, sums] whose tiles have scales: rotated, scaled and rounded from one read, and unpacked. Compiled once
// per instruction set. An operand is walked in panels: lines of numbers that lie next to each other, along the sums, or along the
// rows ("turned": then a tile, and a rotation, run from line to line). A panel holds whole tiles and whole blocks of a rotation.
#include <vector>

#include "numbers.h"

namespace fourbit {
namespace FOURBIT_ISA {
namespace {

constexpr int kMostLines = 128, kMostWidth = 1024, kMostNumbers = 8192, kMostTiles = 1024;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

// ---- where panels lie ----

struct Place {
  int64_t group, spot, line, column;  // of the first number
  int lines, columns;                 // that exist; columns of a panel are `width`, those behind are zero
};

struct Panels {
  const Tiles* t;
  int lines, width, tile_lines, tile_columns;
  int64_t num_lines, num_columns, down, across, count;
  int64_t of_tile_group, of_tile_spot, of_tile_line, of_tile_column;  // steps between the scales of tiles

  explicit Panels(const Tiles* t) : t(t) {
    const bool turned = t->turned;
    tile_lines = turned ? t->tile_sums : t->tile_rows;
    tile_columns = turned ? t->tile_rows : t->tile_sums;
    num_lines = turned ? t->sums : t->rows;
    num_columns = turned ? t->rows : t->sums;
    lines = turned ? max_of(tile_lines, t->rotation) : tile_lines;
    const int64_t whole = (num_columns + kBlock - 1) / kBlock * kBlock;
    int most = turned || lines > 1 ? min_of(4096 / lines, kMostWidth) : kMostWidth;
    most = max_of(most, max_of(64, turned ? tile_columns : max_of(tile_columns, t->rotation)));
    width = whole < most ? static_cast<int>(whole) : most;
    const int unit = turned ? tile_columns : max_of(tile_columns, t->rotation);
    if (width % unit) width += unit - width % unit;
    down = (num_lines + lines - 1) / lines;
    across = (num_columns + width - 1) / width;
    count = t->groups * t->spots * down * across;
    const int64_t of_sums = (t->sums + t->tile_sums - 1) / t->tile_sums, of_rows = (t->rows + t->tile_rows - 1) / t->tile_rows;
    of_tile_spot = of_sums;
    of_tile_line = turned ? 1 : t->spots * of_sums;
    of_tile_column = turned ? t->spots * of_sums : 1;
    of_tile_group = of_rows * t->spots * of_sums;
  }

  Place at(int64_t panel) const {
    Place p;
    p.column = panel % across * width;
    panel /= across;
    p.spot = panel % t->spots;
    panel /= t->spots;
    p.line = panel % down * lines;
    p.group = panel / down;
    p.lines = static_cast<int>(num_lines - p.line < lines ? num_lines - p.line : lines);
    p.columns = static_cast<int>(num_columns - p.column < width ? num_columns - p.column : width);
    return p;
  }

  int64_t first_tile(const Place& p) const {
    return p.group * of_tile_group + p.spot * of_tile_spot + p.line / tile_lines * of_tile_line +
           p.column / tile_columns * of_tile_column;
  }

  int tile_rows_of(const Place& p) const { return (p.lines + tile_lines - 1) / tile_lines; }
  int tiles() const { return lines / tile_lines * tiles_across(); }
  int tiles_across() const { return width / tile_columns; }
};

// ---- vectors ----

// The pairs (a, b) of lanes that lie `half` apart become (a + b, a - b).
template <int half>
FOURBIT_INLINE Floats mixed_lanes(Floats x) {
  Ints flip;
  for (int j = 0; j < kVector; ++j) flip[j] = j & half ? kSign : 0;
  return swapped<half>(x) + as_floats(as_ints(x) ^ flip);
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

// ---- numbers of a panel, rotated ----

struct Work {
  alignas(64) float numbers[kMostNumbers];
  alignas(64) float squares[kMostNumbers];
  const float* line[kMostLines];
  alignas(64) float amax[kMostTiles], block[kMostTiles], inverse[kMostTiles];
  alignas(64) float error[2][kMostTiles], other_block[kMostTiles], other_inverse[kMostTiles];
  alignas(64) float words[2][kMostWidth];
  alignas(64) float signs[2 * 128];
};

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
    for (int c = 0; c < width; c += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(x + i * step + width + c);  // the next panel
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

// ---- scales ----

// The largest magnitude of each tile, and of all.
__attribute__((noinline)) Ints measure_panel(const Panels& panels, const Place& p, Work& w, Ints top) {
  const int width = panels.width, across = panels.tiles_across(), each = panels.tile_columns;
  alignas(64) int32_t largest[kMostWidth];
  for (int first = 0, row = 0; first < p.lines; first += panels.tile_lines, ++row) {
    const int end = min_of(first + panels.tile_lines, p.lines);
    int32_t* to = each == 1 ? reinterpret_cast<int32_t*>(w.amax) + row * width : largest;
    for (int c = 0; c < width; c += 2 * kVector) {
      Ints a{}, b{};
      for (int i = first; i < end; ++i) {
        a = larger(a, magnitudes(read(w.line[i] + c)));
        b = larger(b, magnitudes(read(w.line[i] + c + kVector)));
      }
      std::memcpy(to + c, &a, sizeof a);
      std::memcpy(to + c + kVector, &b, sizeof b);
      top = larger(top, larger(a, b));
    }
    if (each == 1) continue;
    for (int tile = 0; tile < across; tile += kVector) {
      Ints r[kVector];
#pragma GCC unroll 16
      for (int j = 0; j < kVector; ++j) {
        const int32_t* of = largest + min_of(tile + j, across - 1) * each;
        std::memcpy(&r[j], of, sizeof r[j]);
        for (int c = kVector; c < each; c += kVector) {
          Ints m;
          std::memcpy(&m, of + c, sizeof m);
          r[j] = larger(r[j], m);
        }
      }
      const Ints found = largest_of_each(r);
      std::memcpy(w.amax + row * across + tile, &found, static_cast<size_t>(min_of(kVector, across - tile)) * 4);
    }
  }
  return top;
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

// The scales of tiles whose largest numbers are to become target `which`: on their grid, and as the numbers are multiplied.
__attribute__((noinline)) void scale_tiles(const RoundTiles& r, int which, int num, const float* amax, float* block, float* inverse) {
  for (int i = 0; i < num; i += kVector) {
    const Floats largest = read(amax + i);
    Floats b;
    if (r.scale_rule == 2) {
      const Floats raw = r.num_targets > 1 ? largest / r.target[0] * r.encode * r.factor[which] : largest * r.factor[which];
      b = float_nearest(raw, r.scale_grid);
    } else {
      const int32_t target = as_bits(r.target[which]);
      Ints fraction, n = exponents(largest, fraction) - ((target >> 23) - 127);
      if (r.scale_rule == 1) n -= fraction > (target & 0x7FFFFF);  // true is -1
      n = smaller(larger(n, all_ints(-127)), all_ints(127));
      b = powers_of_two(largest > 0.0f ? n : all_ints(-127));
    }
    b = magnitudes(largest) < 0x7F800000 ? b : as_floats(all_ints(0x7FC00000));
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
__attribute__((noinline)) void write_scales(const RoundTiles& r, const Panels& panels, const Place& p, const Work& w) {
  const int across = panels.tiles_across(), rows = panels.tile_rows_of(p);
  const int exist = (p.columns + panels.tile_columns - 1) / panels.tile_columns;
  const int64_t first = panels.first_tile(p);
  alignas(64) int32_t place[kMostTiles];
  for (int i = 0; i < rows * across; i += kVector) {
    const Floats b = read(w.block + i);
    const Ints at = b == b ? places(b, r) : all_ints(255);
    std::memcpy(place + i, &at, sizeof at);
  }
  for (int row = 0; row < rows; ++row) {
    const int64_t at = first + row * panels.of_tile_line, step = panels.of_tile_column;
    for (int i = 0; i < exist; ++i) {
      r.scale_codes[at + i * step] = r.code_of[place[row * across + i] & 255];
      r.each[at + i * step] = w.block[row * across + i] * r.decode / r.prescale;
    }
  }
}

// ---- numbers ----

// The upper 24 bits of the words of two lines (of one, if not turned).
__attribute__((noinline)) void draw_lines(const RoundTiles& r, const Panels& panels, const Place& p, int line, Work& w) {
  const Tiles& t = r.tiles;
  const int width = panels.width;
  const int64_t row = t.turned ? p.column : p.line + line, sum = t.turned ? p.line + line : p.column;
  const int64_t begin = ((p.group * t.rows + row) * t.spots + p.spot) * t.sums + sum;
  const int64_t step = t.turned ? t.spots * t.sums : 1;
  if (!t.turned && begin % 2 == 0) {
    for (int c = 0; c < width; c += kBlock) {
      FOURBIT_EACH(v) write(w.words[0] + c + v * kVector, draw(r.key, begin + c, v));
    }
    return;
  }
  if (t.turned && begin % 2 == 0 && step % 2 == 0) {
    const uint64_t stride = static_cast<uint64_t>(step / 2) * kGolden;
    Pairs first, second;
    for (int j = 0; j < kVector / 2; ++j) {
      first[j] = static_cast<uint64_t>(begin / 2 + 1) * kGolden + r.key + static_cast<uint64_t>(j) * stride;
      second[j] = first[j] + kVector / 2 * stride;
    }
    const uint64_t on = kVector * stride;
    for (int c = 0; c < width; c += kVector, first += on, second += on) {
      Words low, high;
      word_halves(mix(first), mix(second), low, high);
      write(w.words[0] + c, to_floats((Ints)(low >> 8)));
      write(w.words[1] + c, to_floats((Ints)(high >> 8)));
    }
    return;
  }
  for (int two = 0; two < (t.turned ? 2 : 1); ++two)
    for (int c = 0; c < width; ++c) {
      const uint64_t at = static_cast<uint64_t>(begin + two + c * step);
      const uint64_t z = mix((at / 2 + 1) * kGolden + r.key);
      w.words[two][c] = static_cast<float>(static_cast<uint32_t>(at & 1 ? z >> 32 : z) >> 8);
    }
}

// One of the two neighbours on the grid, by the word u; as with_subnormals, the quantum is a power of two.
FOURBIT_INLINE Floats drawn(Floats s, Floats u, const FloatGrid& g) {
  const Floats x = clamp(s, g.min, g.max);
  const Ints exponent = larger(as_ints(x) & 0x7F800000, all_ints(g.lowest << 23)) - (g.mantissa_bits << 23);
  const Floats quantum = as_floats(exponent), inverse = as_floats((254 << 23) - exponent);
  const Floats steps = x * inverse, low = floors(steps);
  const Floats y = (u < (steps - low) * 16777216.0f ? low + 1.0f : low) * quantum;
  return s == s ? y : s;
}

template <int rule>
FOURBIT_INLINE Floats rounded(Floats s, const float* words, const FloatGrid& g) {
  return rule == 0 ? with_subnormals(s, g) : drawn(s, read(words), g);
}

// The scales of vector v of a line: one for each number, or for all of them.
template <bool wide>
FOURBIT_INLINE Floats scales_at(const float* scales, int column, int shift) {
  return wide ? read(scales + column) : all_floats(scales[column >> shift]);
}

template <typename O, int rule, bool wide>
__attribute__((noinline)) void round_line(const RoundTiles& r, const float* x, int count, int shift, const float* inverse, const float* block,
                                          const float* words, int64_t at) {
  for (int c = 0; c < count; c += kBlock) {
    const int here = min_of(count - c, static_cast<int>(kBlock));
    Floats y[kPerBlock];
    FOURBIT_EACH(v) {
      const int column = c + v * kVector;
      y[v] = rounded<rule>(read(x + column) * scales_at<wide>(inverse, column, shift), words + column, r.grid);
    }
    if (r.packed) {
      Ints n[kPerBlock];
      FOURBIT_EACH(v) n[v] = nearest_integers((y[v] == y[v] ? y[v] : Floats{}) * r.per_unit);
      alignas(64) int8_t q[kBlock];
      write_bytes(q, n);
      if (r.positions) to_positions(q, r.positions, static_cast<int8_t>(r.zero));
      if (!r.codes) pack_codes(q, r.packed + (at + c) / 2);
      else std::memcpy(r.codes + at + c, q, static_cast<size_t>(here));
    }
    if (!r.out) continue;
    FOURBIT_EACH(v) y[v] *= scales_at<wide>(block, c + v * kVector, shift);
    Target<O> target(static_cast<O*>(r.out) + at + c, here);
    write_exactly(target.block(), y);
    target.finish();
  }
}

using RoundLine = void (*)(const RoundTiles&, const float*, int, int, const float*, const float*, const float*, int64_t);

template <typename O>
RoundLine line_for(const RoundTiles& r, bool wide) {
  if (r.rule == 0) return wide ? round_line<O, 0, true> : round_line<O, 0, false>;
  return wide ? round_line<O, 1, true> : round_line<O, 1, false>;
}

// The squared error of each tile, term by term in the order of its rows, then of its sums.
template <bool wide>
__attribute__((noinline)) void errors(const RoundTiles& r, const Panels& panels, const Place& p, Work& w, const float* block, const float* inverse,
                                      float* error) {
  const int width = panels.width, across = panels.tiles_across(), each = panels.tile_columns;
  const int shift = __builtin_ctz(static_cast<unsigned>(each));
  std::memset(error, 0, sizeof(float) * static_cast<size_t>(panels.tile_rows_of(p) * across));
  for (int first = 0, row = 0; first < p.lines; first += panels.tile_lines, ++row) {
    const int end = min_of(first + panels.tile_lines, p.lines);
    float* total = error + row * across;
    for (int i = first; i < end; ++i)
      for (int c = 0; c < width; c += kVector) {
        const Floats x = read(w.line[i] + c), b = scales_at<wide>(block + row * across, c, shift);
        Floats y = with_subnormals(x * scales_at<wide>(inverse + row * across, c, shift), r.grid) * b;
        if (r.reach > 0.0f) y = y * r.largest / r.reach;
        const Floats squares = (y - x) * (y - x);
        if (wide) write(total + c, read(total + c) + squares);
        else write(w.squares + i * width + c, squares);
      }
    if (wide) continue;
    for (int tile = 0; tile < across; ++tile) {
      float sum = 0.0f;
      if (r.tiles.turned) {
        for (int c = tile * each; c < (tile + 1) * each; ++c)
          for (int i = first; i < end; ++i) sum += w.squares[i * width + c];
      } else {
        for (int i = first; i < end; ++i)
          for (int c = tile * each; c < (tile + 1) * each; ++c) sum += w.squares[i * width + c];
      }
      total[tile] = sum;
    }
  }
}

void choose(const RoundTiles& r, const Panels& panels, const Place& p, int num, Work& w) {
  const bool wide = panels.tile_columns == 1;
  float *first = w.error[0], *second = w.error[1];
  scale_tiles(r, 1, num, w.amax, w.other_block, w.other_inverse);
  const auto errors_of = wide ? errors<true> : errors<false>;
  errors_of(r, panels, p, w, w.block, w.inverse, first);
  errors_of(r, panels, p, w, w.other_block, w.other_inverse, second);
  for (int i = 0; i < num; ++i)
    if (second[i] < first[i]) {
      w.block[i] = w.other_block[i];
      w.inverse[i] = w.other_inverse[i];
    }
}

struct Task {
  const RoundTiles* r;
  Panels panels;
  float* kept;    // the largest magnitudes of tiles, panel by panel, between two passes
  bool measures;  // them, and no more
  int64_t size;   // of a panel
  Largest largest;
};

void load(const Panels& panels, const Place& p, Work& w) {
  if (panels.t->dtype == kBFloat16) load_panel<uint16_t>(panels, p, w);
  else load_panel<float>(panels, p, w);
}

void round_panels(int64_t begin, int64_t end, int thread, void* task) {
  Task& k = *static_cast<Task*>(task);
  const RoundTiles r = *k.r;
  const Panels& panels = k.panels;
  const Tiles& t = r.tiles;
  Work w;
  for (int j = 0; t.signs && j < max_of(t.rotation, kVector); ++j) w.signs[j] = t.signs[j % t.rotation];
  const bool wide = panels.tile_columns == 1;
  const RoundLine round = r.out_dtype == kBFloat16 ? line_for<uint16_t>(r, wide) : line_for<float>(r, wide);
  const int across = panels.tiles_across(), shift = __builtin_ctz(static_cast<unsigned>(panels.tile_columns));
  Ints top{};
  for (int64_t panel = begin / k.size; panel < (end + k.size - 1) / k.size; ++panel) {
    const Place p = panels.at(panel);
    load(panels, p, w);
    const int num = panels.tile_rows_of(p) * across;
    float* kept = k.kept ? k.kept + panel * panels.tiles() : nullptr;
    const size_t bytes = sizeof(float) * static_cast<size_t>(num);
    if (k.measures || !kept) top = measure_panel(panels, p, w, top);
    if (k.measures) {
      std::memcpy(kept, w.amax, bytes);
      continue;
    }
    if (kept) std::memcpy(w.amax, kept, bytes);
    scale_tiles(r, 0, num, w.amax, w.block, w.inverse);
    if (r.num_targets > 1) choose(r, panels, p, num, w);
    write_scales(r, panels, p, w);
    const int64_t step = r.out_steps[t.turned ? 3 : 1];
    const int64_t at = p.group * r.out_steps[0] + p.spot * r.out_steps[2] + p.line * step + p.column;
    for (int i = 0; i < p.lines; ++i) {
      const int row = i / panels.tile_lines * across, two = t.turned ? i & 1 : 0;
      if (r.rule && !two) draw_lines(r, panels, p, i, w);
      round(r, w.line[i], p.columns, shift, w.inverse + row, w.block + row, w.words[two], at + i * step);
    }
  }
  k.largest.of[thread] = largest_of(top);
}

float run(Task& task, bool measures) {
  task.measures = measures;
  task.largest = {};
  return task.largest.get(parallel(task.panels.count * task.size, task.size, round_panels, &task));
}

// ---- codes ----

// Codes in bytes, packed.
void pack_bytes(const int8_t* q, int64_t n, uint8_t* packed) {
  each_block(0, n, [&](int64_t i, int count) {
    int8_t room[kBlock];
    pack_codes(whole(q + i, count, room), packed + i / 2);
  });
}

struct Unpacking {
  const UnpackTiles* u;
  Panels panels;
  int64_t size;
};

FOURBIT_INLINE void codes_at(const UnpackTiles& u, int64_t at, int count, int8_t* q) {
  if (at % kBlock == 0) return unpack_block(u.packed + at / 2, u.positions ? 0 : u.is_signed, q);
  for (int j = 0; j < count; ++j) {
    const int64_t i = at + j;
    const int code = u.packed[i / kBlock * (kBlock / 2) + i % (kBlock / 2)] >> (i % kBlock < kBlock / 2 ? 0 : 4) & 15;
    q[j] = static_cast<int8_t>(u.positions || !u.is_signed ? code : (code ^ 8) - 8);
  }
  for (int j = count; j < kBlock; ++j) q[j] = 0;
}

template <typename O, bool wide>
__attribute__((noinline)) void unpack_line(const UnpackTiles& u, int count, int shift, const float* block, int64_t at) {
  for (int c = 0; c < count; c += kBlock) {
    const int here = min_of(count - c, static_cast<int>(kBlock));
    alignas(64) int8_t q[kBlock];
    codes_at(u, at + c, here, q);
    Floats y[kPerBlock];
    FOURBIT_EACH(v) {
      const Ints n = read_signed(q + v * kVector);
      y[v] = (u.positions ? look_up_16(u.positions, n) : to_floats(n)) * scales_at<wide>(block, c + v * kVector, shift);
    }
    Target<O> target(static_cast<O*>(u.out) + at + c, here);
    if (u.exact) write_exactly(target.block(), y);
    else write(target.block(), y);
    target.finish();
  }
}

void unpack_panels(int64_t begin, int64_t end, int, void* task) {
  const Unpacking& k = *static_cast<const Unpacking*>(task);
  const UnpackTiles u = *k.u;
  const Panels& panels = k.panels;
  const Tiles& t = u.tiles;
  alignas(64) float block[kMostTiles];
  const bool wide = panels.tile_columns == 1;
  const auto line = u.out_dtype == kBFloat16 ? (wide ? unpack_line<uint16_t, true> : unpack_line<uint16_t, false>)
                                             : (wide ? unpack_line<float, true> : unpack_line<float, false>);
  const int across = panels.tiles_across(), shift = __builtin_ctz(static_cast<unsigned>(panels.tile_columns));
  for (int64_t panel = begin / k.size; panel < (end + k.size - 1) / k.size; ++panel) {
    const Place p = panels.at(panel);
    const int64_t first = panels.first_tile(p), step = u.steps[t.turned ? 3 : 1];
    const int exist = (p.columns + panels.tile_columns - 1) / panels.tile_columns;
    for (int row = 0; row < panels.tile_rows_of(p); ++row) {
      const int64_t at = first + row * panels.of_tile_line;
      for (int i = 0; i < across; ++i)
        block[row * across + i] = i < exist ? u.scale_of[u.scale_codes[at + i * panels.of_tile_column]] : 0.0f;
    }
    const int64_t at = p.group * u.steps[0] + p.spot * u.steps[2] + p.line * step + p.column;
    for (int i = 0; i < p.lines; ++i) line(u, p.columns, shift, block + i / panels.tile_lines * across, at + i * step);
  }
}

}  // namespace

float round_tiles(RoundTiles* r) {
  Task task{r, Panels(&r->tiles), nullptr, false, 0, {}};
  task.size = static_cast<int64_t>(task.panels.lines) * task.panels.width;
  std::vector<float> kept;
  float amax = 0.0f;
  r->encode = 1.0f;
  if (r->reach > 0.0f) {
    kept.resize(static_cast<size_t>(task.panels.count * task.panels.tiles()));
    task.kept = kept.data();
    amax = r->largest = run(task, true);
    const float encode = r->reach / amax, most = std::numeric_limits<float>::max();
    r->encode = amax > 0.0f ? (encode > most ? most : encode) : amax == 0.0f ? 1.0f : amax;
  }
  r->decode = 1.0f / r->encode;
  for (int i = 0; i < r->num_targets && r->num_targets == 1; ++i) r->factor[i] *= r->encode;
  const float found = run(task, false);
  if (r->codes) pack_bytes(r->codes, r->tiles.groups * r->tiles.rows * r->tiles.spots * r->tiles.sums, r->packed);
  return task.kept ? amax : found;
}

void unpack_tiles(const UnpackTiles* u) {
  Unpacking task{u, Panels(&u->tiles), 0};
  task.size = static_cast<int64_t>(task.panels.lines) * task.panels.width;
  parallel(task.panels.count * task.size, task.size, unpack_panels, &task);
}

}  // namespace FOURBIT_ISA
}  // namespace fourbit
