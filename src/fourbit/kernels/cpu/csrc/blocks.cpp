// Operands whose tiles have scales: rotated, scaled and rounded from one read (two, where the tensor has a scale as well), and unpacked.
// Compiled once per instruction set.
#include <vector>

#include "block_scales.h"
#include "rotate.h"

namespace fourbit {
namespace FOURBIT_ISA {
namespace {

// The upper 24 bits of the words of two lines (of one, if not turned).
__attribute__((noinline)) void draw_lines(const RoundTiles& r, const Panels& panels, const Place& p, int line, Work& w) {
  const Tiles& t = r.tiles;
  const int width = panels.width;
  const int64_t row = t.turned ? p.column : p.line + line, sum = t.turned ? p.line + line : p.column;
  const int64_t rows_in_spot = t.rows_in_spot ? t.rows_in_spot : t.rows, spots = t.spots * (t.rows / rows_in_spot);
  const int64_t step = t.turned ? spots * t.sums : 1;
  auto index = [&](int64_t row) { return ((p.group * rows_in_spot + row % rows_in_spot) * spots + p.spot + row / rows_in_spot) * t.sums + sum; };
  const int64_t begin = index(row);
  if (!t.turned && begin % 2 == 0) {
    for (int c = 0; c < width; c += kBlock) {
      FOURBIT_EACH(v) write(w.words[0] + c + v * kVector, draw(r.key, begin + c, v));
    }
    return;
  }
  if (t.turned && begin % 2 == 0 && step % 2 == 0 && (!t.rows_in_spot || (rows_in_spot % kVector == 0 && t.sums % 2 == 0))) {
    const uint64_t stride = static_cast<uint64_t>(step / 2) * kGolden;
    Pairs first, second;
    for (int j = 0; j < kVector / 2; ++j) {
      first[j] = r.key + static_cast<uint64_t>(j) * stride;
      second[j] = first[j] + kVector / 2 * stride;
    }
    for (int c = 0; c < width; c += kVector) {
      const int64_t at = t.rows_in_spot ? index(row + c) : begin + c * step;
      const uint64_t from = static_cast<uint64_t>(at / 2 + 1) * kGolden;
      Words low, high;
      word_halves(mix(first + from), mix(second + from), low, high);
      write(w.words[0] + c, to_floats((Ints)(low >> 8)));
      write(w.words[1] + c, to_floats((Ints)(high >> 8)));
    }
    return;
  }
  for (int two = 0; two < (t.turned ? 2 : 1); ++two)
    for (int c = 0; c < width; ++c) {
      const uint64_t at = static_cast<uint64_t>((t.turned ? index(row + c) : begin + c) + two);
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

template <typename O, int rule, int each>
__attribute__((noinline)) void round_line(const RoundTiles& r, bool streams, const float* x, int count, int shift, const float* inverse,
                                          const float* block, const float* words, int64_t at) {
  const FloatGrid grid = r.grid;  // of its own: bytes that are written might be those of r, as far as the compiler knows
  const float per_unit = r.per_unit;
  const int8_t* positions = r.positions;
  const int8_t zero = static_cast<int8_t>(r.zero);
  uint8_t* packed = r.codes ? nullptr : r.packed;
  int8_t* codes = r.codes;
  O* out = static_cast<O*>(r.out);
  for (int c = 0; c < count; c += kBlock) {
    const int here = min_of(count - c, static_cast<int>(kBlock));
    Floats y[kPerBlock];
    FOURBIT_EACH(v) {
      const int column = c + v * kVector;
      y[v] = rounded<rule>(read(x + column) * scales_at<each>(inverse, c, v, shift), words + column, grid);
    }
    if (packed || codes) {
      Ints n[kPerBlock];
      FOURBIT_EACH(v) n[v] = nearest_integers(y[v] * per_unit);
      alignas(64) int8_t q[kBlock];
      write_bytes(q, n);
      if (positions) to_positions(q, positions, zero);
      if (packed) pack_codes(q, packed + (at + c) / 2);
      else std::memcpy(codes + at + c, q, static_cast<size_t>(here));
    }
    if (!out) continue;
    FOURBIT_EACH(v) y[v] *= scales_at<each>(block, c, v, shift);
    if (streams && here == kBlock) {
      stream_exactly(out + at + c, y);
      continue;
    }
    Target<O> target(out + at + c, here);
    write_exactly(target.block(), y);
    target.finish();
  }
}

// The bits of a line that is not turned, whose tiles have these scales.
__attribute__((noinline)) void mask_line(const RoundTiles& r, const float* x, int count, int shift, const float* scales, int64_t at) {
  for (int c = 0; c < count; c += kBlock) {
    uint64_t inside = 0;
    FOURBIT_EACH(v) {
      const int column = c + v * kVector;
      inside |= bits_of(compare<kLessEqual>(as_floats(magnitudes(read(x + column))), scales[column >> shift] * r.grid.max), v);
    }
    const int here = min_of(count - c, static_cast<int>(kBlock));
    inside &= first_bits(here);
    std::memcpy(r.mask + (at + c) / 8, &inside, static_cast<size_t>(here) / 8);
  }
}

using RoundLine = void (*)(const RoundTiles&, bool, const float*, int, int, const float*, const float*, const float*, int64_t);

template <typename O, int rule>
RoundLine line_of(int each) {
  if (each == 1) return round_line<O, rule, 1>;
  return each == 16 ? round_line<O, rule, 16> : each == 32 ? round_line<O, rule, 32> : round_line<O, rule, 64>;
}

template <typename O>
RoundLine line_for(const RoundTiles& r, int each) {
  return r.rule == 0 ? line_of<O, 0>(each) : line_of<O, 1>(each);
}

// Whether the result is more than caches hold, and all its blocks begin on a boundary of a vector.
bool is_streamed(const RoundTiles& r) {
  constexpr int64_t kLeast = 1 << 25;  // bytes
  const Tiles& t = r.tiles;
  const int64_t size = r.out_dtype == kBFloat16 ? 2 : 4, n = t.groups * t.rows * t.spots * t.sums;
  bool fits = n * size >= kLeast && reinterpret_cast<uintptr_t>(r.out) % 64 == 0;
  for (int axis = 0; axis < 4; ++axis) fits = fits && (r.out_steps[axis] == 1 || r.out_steps[axis] * size % 64 == 0);
  return r.out && fits;
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

// Asks for the memory of a panel's codes, which lie apart.
void ask_for(const RoundTiles& r, const Place& p, int64_t at, int64_t step) {
  if (!r.packed || r.codes) return;
  for (int i = 0; i < p.lines; ++i)
    for (int c = 0; c < p.columns; c += 128) __builtin_prefetch(r.packed + (at + i * step + c) / 2, 1);
}

void round_panels(int64_t begin, int64_t end, int thread, void* task) {
  Task& k = *static_cast<Task*>(task);
  const RoundTiles r = *k.r;
  const Panels& panels = k.panels;
  const Tiles& t = r.tiles;
  Work w;
  for (int j = 0; t.signs && j < max_of(t.rotation, kVector); ++j) w.signs[j] = t.signs[j % t.rotation];
  const RoundLine round = r.out_dtype == kBFloat16 ? line_for<uint16_t>(r, panels.tile_columns) : line_for<float>(r, panels.tile_columns);
  const bool streams = is_streamed(r);
  const int across = panels.tiles_across(), shift = __builtin_ctz(static_cast<unsigned>(panels.tile_columns));
  Ints top{};
  for (int64_t panel = begin / k.size; panel < (end + k.size - 1) / k.size; ++panel) {
    const Place p = panels.at(panel);
    const int64_t step = r.out_steps[t.turned ? 3 : 1];
    const int64_t at = p.group * r.out_steps[0] + p.spot * r.out_steps[2] + p.line * step + p.column;
    if (panels.lines > 1 && !k.measures) ask_for(r, p, at, step);
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
    if (r.clip_rms > 0.0) measure_squares(panels, p, w, r.clip_rms);
    scale_tiles(r, 0, num, w, w.block, w.inverse);
    if (r.num_targets > 1) choose(r, panels, p, num, w);
    write_scales(r, panels, p, w);
    for (int i = 0; i < p.lines; ++i) {
      const int row = i / panels.tile_lines * across, two = t.turned ? i & 1 : 0;
      if (r.rule && !two) draw_lines(r, panels, p, i, w);
      round(r, streams, w.line[i], p.columns, shift, w.inverse + row, w.block + row, w.words[two], at + i * step);
      if (r.mask) mask_line(r, w.line[i], p.columns, shift, w.whole + row, at + i * step);
    }
  }
  if (streams) stream_end();
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

template <typename O, int each>
__attribute__((noinline)) void unpack_line(const UnpackTiles& u, int count, int shift, const float* block, int64_t at) {
  for (int c = 0; c < count; c += kBlock) {
    const int here = min_of(count - c, static_cast<int>(kBlock));
    alignas(64) int8_t q[kBlock];
    codes_at(u, at + c, here, q);
    Floats y[kPerBlock];
    FOURBIT_EACH(v) {
      const Ints n = read_signed(q + v * kVector);
      y[v] = (u.positions ? look_up_16(u.positions, n) : to_floats(n)) * scales_at<each>(block, c, v, shift);
    }
    Target<O> target(static_cast<O*>(u.out) + at + c, here);
    if (u.exact) write_exactly(target.block(), y);
    else write(target.block(), y);
    target.finish();
  }
}

using UnpackLine = void (*)(const UnpackTiles&, int, int, const float*, int64_t);

template <typename O>
UnpackLine unpack_line_of(int each) {
  return each == 1 ? unpack_line<O, 1> : each == 16 ? unpack_line<O, 16> : each == 32 ? unpack_line<O, 32> : unpack_line<O, 64>;
}

void unpack_panels(int64_t begin, int64_t end, int, void* task) {
  const Unpacking& k = *static_cast<const Unpacking*>(task);
  const UnpackTiles u = *k.u;
  const Panels& panels = k.panels;
  const Tiles& t = u.tiles;
  alignas(64) float block[kMostTiles];
  const UnpackLine line = u.out_dtype == kBFloat16 ? unpack_line_of<uint16_t>(panels.tile_columns) : unpack_line_of<float>(panels.tile_columns);
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
