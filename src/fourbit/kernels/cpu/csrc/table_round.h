// Rounding to any grid of up to 256 numbers, by its table.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace {

// A search tree over sorted edges, level by level, so that the path through it is the number of edges below what is sought:
// level d is 2^d edges. Places without an edge hold NaN, which nothing is above.
struct Edges {
  static constexpr int kMostLevels = 8, kSmallLevels = 4;
  int depth;
  float tree[kMostLevels][128];
  Edges(const float* edges, int num) : depth(num < 16 ? kSmallLevels : kMostLevels) {
    for (int d = 0; d < depth; ++d)
      for (int i = 0; i < 1 << d || i < 8; ++i) {
        const int at = ((2 * i + 1) << (depth - 1 - d)) - 1;
        tree[d][i] = i < 1 << d && at < num ? edges[at] : std::numeric_limits<float>::quiet_NaN();
      }
  }
};

// How many edges are below s, or also equal to it.
template <bool equal>
FOURBIT_INLINE Ints count_edges(const Edges& edges, Floats s) {
  Ints path{};
  auto descend = [&](Floats edge) { path = path + path - (equal ? s >= edge : s > edge); };  // true is -1
#pragma GCC unroll 4
  for (int d = 0; d < Edges::kSmallLevels; ++d) descend(look_up_8(edges.tree[d], path));
  for (int d = Edges::kSmallLevels; d < edges.depth; ++d) descend(look_up(edges.tree[d], path));
  return path;
}

struct TableTask {
  const TableRound* r;
  Edges edges;
  bool small;                 // whether `levels` has all of them
  float levels[16] = {};
  Largest largest;
  explicit TableTask(const TableRound* r)
      : r(r), edges(r->rule == 1 ? r->levels + 1 : r->boundaries, r->num_levels - 1), small(r->num_levels <= 16) {
    for (int i = 0; small && i < r->num_levels; ++i) levels[i] = r->levels[i];
  }
  FOURBIT_INLINE Floats level(Ints index) const { return small ? look_up_16(levels, index) : look_up(r->levels, index); }
};

FOURBIT_INLINE Floats table_stochastic(const TableTask& t, Floats s, Floats u) {
  const int last = t.r->num_levels - 1;
  const Ints index = count_edges<true>(t.edges, s);
  const Floats inside = clamp(s, t.r->levels[0], t.r->levels[last]), low = t.level(index);
  const Floats next = t.level(smaller(index + 1, all_ints(last)));
  const Floats high = low >= inside ? low : next;
  return goes_up(u, inside - low, high - low) ? high : low;
}

FOURBIT_INLINE Floats table_nearest(const TableTask& t, Floats s) {
  const Floats y = t.level(count_edges<false>(t.edges, s));
  const float overflow = t.r->overflow;
  return overflow == overflow ? overflowed(s, y, overflow) : y;
}

// Below the smallest magnitude: 0 or a neighbour of it.
FOURBIT_INLINE Floats table_underflow(const TableTask& t, Floats s, Floats u) {
  const TableRound& r = *t.r;
  const int last = r.num_levels - 1, below = max_of(r.zero - 1, 0);
  const Ints is_negative = s < 0.0f;
  const Floats low = is_negative ? all_floats(r.levels[below]) : all_floats(r.levels[r.zero]);
  const Floats high = is_negative ? all_floats(r.levels[r.zero == 0 ? below : below + 1])
                                  : all_floats(r.levels[min_of(r.zero + 1, last)]);
  return goes_up(u, clamp(s, r.levels[0], r.levels[last]) - low, high - low) ? high : low;
}

// Integers for a carrier of 8 bits, NaN as 0.
FOURBIT_INLINE void write(int8_t* out, const Floats (&y)[kPerBlock]) {
  Ints n[kPerBlock];
  FOURBIT_EACH(v) n[v] = __builtin_convertvector(y[v] == y[v] ? y[v] : Floats{}, Ints);
  write_bytes(out, n);
}

template <typename T, typename O>
float table_typed(const TableRound* r) {
  TableTask task(r);
  const int pieces = parallel(r->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    TableTask& t = *static_cast<TableTask*>(p);
    const TableRound& r = *t.r;
    Ints top{};
    each_block(begin, end, [&](int64_t i, int count) {
      T room[kBlock];
      const T* x = whole(static_cast<const T*>(r.x) + i, count, room);
      Target<O> target(static_cast<O*>(r.out) + i, count);
      Floats y[kPerBlock];
      FOURBIT_EACH(v) {
        const Floats number = read(x + v * kVector), s = number * r.inv_scale;
        raise(top, number);
        if (r.rule == 1) {
          y[v] = table_stochastic(t, s, draw(r.key, i, v));
        } else {
          y[v] = table_nearest(t, s);
          if (r.rule == 2) {
            const Floats drawn = table_underflow(t, s, draw(r.key, i, v));
            y[v] = as_floats(magnitudes(s)) < r.smallest ? drawn : y[v];
          }
        }
        y[v] = s == s ? y[v] : s;
      }
      write(target.block(), y);
      target.finish();
    });
    t.largest.of[thread] = largest_of(top);
  }, &task);
  return task.largest.get(pieces);
}

template <typename T>
float table_out(const TableRound* r) {
  if (r->out_dtype == kBFloat16) return table_typed<T, uint16_t>(r);
  if (r->out_dtype == kFloat32) return table_typed<T, float>(r);
  return table_typed<T, int8_t>(r);
}

float table_round(const TableRound* r) {
  return r->dtype == kBFloat16 ? table_out<uint16_t>(r) : table_out<float>(r);
}

}  // namespace
}  // namespace fourbit
