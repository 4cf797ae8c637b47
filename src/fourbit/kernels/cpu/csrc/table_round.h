// Rounding to any grid of up to 256 numbers, by its table.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace {

// A search tree over sorted edges, level by level, so that the path through it is the number of edges below what is sought:
// level d is 2^d edges. Places without an edge hold NaN, which nothing is above.
struct Edges {
  static constexpr int kDepth = 8, kSmallDepth = 4;  // of more, and of no more than 15 edges
  float tree[kDepth][128];
  Edges(const float* edges, int num) {
    const int depth = num < 16 ? kSmallDepth : kDepth;
    for (int d = 0; d < depth; ++d)
      for (int i = 0; i < 1 << d || i < 8; ++i) {
        const int at = ((2 * i + 1) << (depth - 1 - d)) - 1;
        tree[d][i] = i < 1 << d && at < num ? edges[at] : std::numeric_limits<float>::quiet_NaN();
      }
  }
};

struct TableTask {
  const TableRound* r;
  Edges edges;
  float low[16] = {}, high[16] = {};  // the levels, and the next ones, if there are no more than 16
  bool exact = true;                  // whether bfloat16 holds the levels
  Largest largest;
  explicit TableTask(const TableRound* r) : r(r), edges(r->rule == 1 ? r->levels + 1 : r->boundaries, r->num_levels - 1) {
    for (int i = 0; i < r->num_levels && r->num_levels <= 16; ++i) {
      low[i] = r->levels[i];
      high[i] = r->levels[min_of(i + 1, r->num_levels - 1)];
    }
    for (int i = 0; i < r->num_levels; ++i) exact &= !(as_bits(r->levels[i]) & 0xFFFF);
  }
};

// How many edges are below s, or also equal to it.
template <bool small, bool equal>
FOURBIT_INLINE Ints count_edges(const Edges& edges, Floats s) {
  Ints path{};
  auto descend = [&](Floats edge) { path = path + path - (equal ? s >= edge : s > edge); };  // true is -1
#pragma GCC unroll 4
  for (int d = 0; d < Edges::kSmallDepth; ++d) descend(look_up_8(edges.tree[d], path));
#pragma GCC unroll 4
  for (int d = Edges::kSmallDepth; !small && d < Edges::kDepth; ++d) descend(look_up(edges.tree[d], path));
  return path;
}

// The lower neighbour, or the upper one where the word says so. A number of the grid is its own lower neighbour, and stays.
template <bool small>
FOURBIT_INLINE Floats table_stochastic(const TableTask& t, Floats s, Floats u) {
  const float* levels = t.r->levels;
  const int last = t.r->num_levels - 1;
  const Ints index = count_edges<small, true>(t.edges, s);
  const Floats inside = clamp(s, levels[0], levels[last]);
  const Floats low = small ? look_up_16(t.low, index) : look_up(levels, index);
  const Floats high = small ? look_up_16(t.high, index) : look_up(levels, smaller(index + 1, all_ints(last)));
  return goes_up(u, inside - low, high - low) ? high : low;
}

template <bool small>
FOURBIT_INLINE Floats table_nearest(const TableTask& t, Floats s) {
  const Ints index = count_edges<small, false>(t.edges, s);
  const Floats y = small ? look_up_16(t.low, index) : look_up(t.r->levels, index);
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

// A block of numbers, in place; NaN stays NaN. A function of its own, because there are six, for each of the dtypes.
template <bool small, int rule>
__attribute__((noinline)) void table_block(const TableTask& t, int64_t begin, Floats* x) {
  const TableRound& r = *t.r;
  FOURBIT_EACH(v) {
    const Floats s = x[v];
    Floats y = rule == 1 ? table_stochastic<small>(t, s, draw(r.key, begin, v)) : table_nearest<small>(t, s);
    if (rule == 2) y = as_floats(magnitudes(s)) < r.smallest ? table_underflow(t, s, draw(r.key, begin, v)) : y;
    x[v] = s == s ? y : s;
  }
}

using TableBlock = void (*)(const TableTask&, int64_t begin, Floats* x);

template <bool small>
TableBlock table_block_for(int rule) {
  return rule == 0 ? table_block<small, 0> : rule == 1 ? table_block<small, 1> : table_block<small, 2>;
}

FOURBIT_INLINE void write(int8_t* out, const Floats (&y)[kPerBlock]) { write_exactly(out, y); }

template <typename T, typename O>
float table_typed(const TableRound* r) {
  TableTask task(r);
  const int pieces = parallel(r->n, kBlock, [](int64_t begin, int64_t end, int thread, void* p) {
    TableTask& t = *static_cast<TableTask*>(p);
    const TableRound& r = *t.r;
    const TableBlock round = r.num_levels <= 16 ? table_block_for<true>(r.rule) : table_block_for<false>(r.rule);
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
      round(t, i, y);
      if (t.exact) write_exactly(target.block(), y);
      else write(target.block(), y);
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
