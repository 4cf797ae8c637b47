// Products of matrices of small integers, exact: gradients are integers too, in units of their smallest magnitude. See tiles.h.
#include "common.h"

#if defined(__AVX2__)
#include "tiles.h"

namespace fourbit {
namespace {

constexpr int64_t kBlockSteps = 256;  // about so many of a long sum are worked on together: a panel of them is in the first cache
constexpr int64_t kBlockRows = 120;   // likewise, in the second
constexpr int64_t kNeighbours = 4;    // panels whose columns share a line of the cache: packed together

// The rows are the unsigned bytes, except where the sum runs over their columns.
Way way_of(const MatMul& t) {
  Way way = way_of(t.of, !t.turned);
  if (way.bytes && t.depth > way.terms) {
    way = Way();
    way.terms = kInt32 / most_of(most_of(-t.of.a_min, t.of.a_max) * most_of(-t.of.b_min, t.of.b_max), 1);
  }
  return way;
}

struct Task {
  const MatMul& t;
  Way way;
  int64_t steps, panels, tiles, height;  // of the sum; of columns; of rows, and how many rows each has
  int64_t block = 0, blocks;             // steps that are worked on together
  int64_t row_parts = 0, column_parts = 0;
  Room<uint8_t> own_a;
  std::vector<int32_t> row_sums;         // where the columns have an offset
  const uint8_t* a = nullptr;            // [blocks][rows][pitch], or [tiles][steps][kRows] if turned
  double clipped[kMaxThreads] = {};

  explicit Task(const MatMul& t)
      : t(t), way(way_of(t)), panels(ceil_div(t.columns, kColumns)), tiles(ceil_div(t.rows, kRows)),
        height(ceil_div(t.rows, most_of(tiles, 1))) {
    const int64_t terms = way.bytes ? 4 : 2;
    steps = ceil_div(t.depth, terms);
    blocks = steps <= kBlockSteps + kBlockSteps / 2 ? 1 : ceil_div(steps, kBlockSteps);
    block = most_of(ceil_div(steps, blocks), 1);
    if (t.depth > way.terms) block = most_of(least(block, way.terms / terms), 1);
    blocks = ceil_div(steps, block);
    if (height > 0) tiles = ceil_div(t.rows, height);
  }
  // Bytes from row to row: a line more than they have, so that rows do not meet in the same places of the cache.
  int64_t pitch() const { return block * 4 + 64; }
  int64_t panel_bytes() const { return (steps + 1) * kStepBytes; }
};

// Steps k .. k + count of some panels, `stride` bytes from one to the next; adds to the sums of their columns, if they are wanted.
template <class Kind>
void pack_right(const Task& task, int64_t panel, int64_t panels, int64_t k, int64_t count, uint8_t* out, int64_t stride,
                int32_t* sums) {
  const MatMul& t = task.t;
  const int64_t first = k * Kind::kTerms, depth = least(count * Kind::kTerms, t.depth - first);
  const bool wanted = task.way.left_offset != 0;
  const int64_t together = t.integers ? 1 : kNeighbours;
  for (int64_t j = 0; j < panels; j += together) {
    const int64_t column = (panel + j) * kColumns, columns = t.columns - column;
    uint8_t* to = out + j * stride;
    int32_t* of_columns = wanted ? sums + j * kColumns : nullptr;
    if (t.integers) {
      pack_columns<Kind>(t.b + column * t.depth + first, t.depth, depth, columns, to, of_columns);
    } else {
      auto row = [&](int64_t i) { return t.b + (first + i) * t.columns + column; };
      pack_panels_of<Kind>(row, depth, least(together, panels - j), columns, task.way.right_offset, to, stride, of_columns);
    }
  }
}

// Whole panels, each with what the offset of the rows puts into the sums of its columns.
template <class Kind>
void pack_panels(const Task& task, uint8_t* out) {
  struct Job { const Task* task; uint8_t* out; } job{&task, out};
  parallel_always(ceil_div(task.panels, kNeighbours), [](int64_t begin, int64_t end, int, void* p) {
    const Job& job = *static_cast<Job*>(p);
    const Task& task = *job.task;
    const int64_t last = least(end * kNeighbours, task.panels);
    for (int64_t j = begin * kNeighbours; j < last; j += kNeighbours) {
      uint8_t* out = job.out + j * task.panel_bytes();
      const int64_t num = least(kNeighbours, last - j);
      int32_t sums[kNeighbours * kColumns] = {};
      pack_right<Kind>(task, j, num, 0, task.steps, out, task.panel_bytes(), sums);
      for (int32_t& sum : sums) sum *= task.way.left_offset;
      for (int64_t i = 0; i < num; ++i)
        std::memcpy(out + i * task.panel_bytes() + task.steps * kStepBytes, sums + i * kColumns, kStepBytes);
    }
  }, &job);
}

// Rows whose terms are neighbours.
template <class Kind>
void take_rows(Task& task) {
  const MatMul& t = task.t;
  task.own_a = room_for<uint8_t>(ceil_div(task.steps, task.block) * t.rows * task.pitch());
  parallel(t.rows * t.depth, t.depth, [](int64_t begin, int64_t end, int, void* p) {
    Task& task = *static_cast<Task*>(p);
    const MatMul& t = task.t;
    const int64_t terms = task.block * Kind::kTerms;
    with_numbers(t.a, t.of.dtype, [&](auto* a) {
      for (int64_t row = begin / t.depth; row < end / t.depth; ++row)
        for (int64_t k = 0; k < t.depth; k += terms) {
          auto* out = reinterpret_cast<typename Kind::Number*>(task.own_a.get() + (k / terms * t.rows + row) * task.pitch());
          const int64_t count = least(terms, t.depth - k);
          convert_row(a + row * t.depth + k, 1.0f / t.of.unit, task.way.left_offset, count, out);
          std::memset(out + count, 0, Kind::kTerms * sizeof *out);  // the rest of the last step
        }
    });
  }, &task);
  task.a = task.own_a.get();
}

// The rows of the transpose of `a`, in tiles.
template <class Kind>
void take_turned(Task& task) {
  task.own_a = room_for<uint8_t>(task.tiles * task.steps * kRows * 4);
  parallel_always(task.steps, [](int64_t begin, int64_t end, int, void* p) {
    Task& task = *static_cast<Task*>(p);
    const MatMul& t = task.t;
    constexpr int64_t kTogether = 8;  // steps that lie side by side in a tile
    const int64_t line = (ceil_div(t.rows, kColumns) + 1) * kStepBytes;
    std::vector<uint8_t> lines(static_cast<size_t>(kTogether * line));
    with_numbers(t.a, t.of.dtype, [&](auto* a) {
      for (int64_t first = begin; first < end; first += kTogether) {
        const int64_t count = least(kTogether, end - first);
        for (int64_t step = 0; step < count; ++step) {
          decltype(a) rows[Kind::kTerms];
          for (int i = 0; i < Kind::kTerms; ++i) {
            const int64_t k = (first + step) * Kind::kTerms + i;
            rows[i] = k < t.depth ? a + k * t.rows : nullptr;
          }
          interleave_rows<Kind>(rows, 1.0f / t.of.unit, t.rows, lines.data() + step * line);
        }
        scatter_steps(lines.data(), line, count, task.tiles, task.height, task.steps * kRows * 4,
                      task.own_a.get() + first * kRows * 4);
      }
    });
  }, &task);
  task.a = task.own_a.get();
  if (!task.way.right_offset) return;
  task.row_sums.resize(static_cast<size_t>(task.t.rows));
  for (int64_t row = 0; row < task.t.rows; ++row) {
    const auto* x = reinterpret_cast<const int8_t*>(task.a) + row / task.height * task.steps * kRows * 4 + row % task.height * 4;
    int32_t sum = 0;
    for (int64_t step = 0; step < task.steps; ++step, x += kRows * 4)
      for (int i = 0; i < Kind::kTerms; ++i) sum += x[i];
    task.row_sums[static_cast<size_t>(row)] = sum * task.way.right_offset;
  }
}

// Eight results from element e on, lane by lane: what the mask removes goes into `removed`, by the sign of the code.
FOURBIT_INLINE __m256 keep_inside(const MatMul& t, __m256 y, int64_t e, __m256& removed) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i inside = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(t.mask[e / 8]), bits), bits);
  if (t.packed && t.mask[e / 8] != 0xFF) {
    const int64_t in_block = e % kBlock;
    const uint8_t* bytes = t.packed + e / kBlock * (kBlock / 2) + in_block % (kBlock / 2);
    __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    code = in_block < kBlock / 2 ? _mm256_and_si256(code, _mm256_set1_epi32(15)) : _mm256_srli_epi32(code, 4);
    const __m256i eight = _mm256_set1_epi32(8);
    if (t.is_signed) code = _mm256_sub_epi32(_mm256_xor_si256(code, eight), eight);
    const __m256 out = _mm256_castsi256_ps(_mm256_andnot_si256(inside, _mm256_castps_si256(y)));
    const __m256i zero = _mm256_setzero_si256();
    const __m256 up = _mm256_castsi256_ps(_mm256_cmpgt_epi32(code, zero));
    const __m256 down = _mm256_castsi256_ps(_mm256_cmpgt_epi32(zero, code));
    removed = _mm256_add_ps(removed, _mm256_sub_ps(_mm256_and_ps(out, up), _mm256_and_ps(out, down)));
  }
  return _mm256_and_ps(y, _mm256_castsi256_ps(inside));
}

FOURBIT_INLINE __m256 finish_eight(const MatMul& t, __m256 sum) {
  const __m256 scale = _mm256_set1_ps(t.scale), post = _mm256_set1_ps(t.post);
  const __m256 s = _mm256_mul_ps(_mm256_mul_ps(sum, _mm256_set1_ps(t.of.unit)), scale);
  if (!t.rounds) return _mm256_mul_ps(s, post);
  const __m256 nearest = _mm256_blendv_ps(nearest_eight(s, t.grid), s, _mm256_cmp_ps(s, s, _CMP_UNORD_Q));
  return _mm256_mul_ps(nearest, post);
}

// Scales, rounds, masks and writes a tile, whose rows lie `stride` sums apart; `extra`: what the offset of the rows put in.
template <typename Sum>
void finish_tile(const Task& task, const Sum* sums, int64_t stride, int64_t tile, int64_t panel, const int32_t* extra,
                 __m256& removed) {
  const MatMul& t = task.t;
  const int64_t column = panel * kColumns, first = tile * task.height, last = least(first + task.height, t.rows);
  int32_t of_row[kColumns];
  for (int64_t row = first; row < last; ++row, sums += stride) {
    if (task.way.right_offset) {
      for (int32_t& e : of_row) e = task.row_sums[static_cast<size_t>(row)];
      extra = of_row;
    }
    const int64_t at = row * t.columns + column;
    __m256 low = finish_eight(t, as_floats(sums, extra)), high = finish_eight(t, as_floats(sums + 8, extra + 8));
    if (t.mask) {
      low = keep_inside(t, low, at, removed);
      high = keep_inside(t, high, at + 8, removed);
    }
    store_floats(low, high, t.columns - column, t.out + at);
  }
}

// Some tiles of rows times some panels of columns. `Sum`: of what is added up over the blocks of a long sum.
template <class Kind, typename Sum>
void part(const Task& task, int64_t first, int64_t last, int64_t j_begin, int64_t j_end, __m256& removed) {
  const MatMul& t = task.t;
  const auto* panels = reinterpret_cast<const uint8_t*>(t.panels);
  const int64_t block = task.block, num = j_end - j_begin, width = num * kColumns, near = most_of(kBlockRows / task.height, 1);
  std::vector<Sum> all(static_cast<size_t>(task.blocks > 1 ? (last - first) * task.height * width : 0));
  const int64_t stride = block * kStepBytes;
  const auto own = room_for<uint8_t>(panels ? 0 : num * stride);
  // Rows of results that lie whole pages apart drive each other's lines out of the cache before they are complete.
  const bool meets = t.columns * 4 % 4096 == 0;
  std::vector<int32_t> extra(static_cast<size_t>(width));
  if (panels)
    for (int64_t i = 0; i < num; ++i)
      std::memcpy(extra.data() + i * kColumns, panels + (j_begin + i + 1) * task.panel_bytes() - kStepBytes, kStepBytes);
  int32_t sums[kRows * kColumns];
  for (int64_t k = 0; k < task.steps; k += block) {
    const int64_t steps = least(block, task.steps - k);
    const bool is_last = k + block >= task.steps;
    if (!panels) pack_right<Kind>(task, j_begin, num, k, steps, own.get(), stride, extra.data());
    if (is_last && !panels)
      for (int32_t& e : extra) e *= task.way.left_offset;
    const Walk walk{task.way.steps, steps, t.turned ? kRows * 4 : 4, kStepBytes};
    for (int64_t begin = first; begin < last; begin += near)
      for (int64_t i = 0; i < num; ++i) {
        const uint8_t* right = panels ? panels + (j_begin + i) * task.panel_bytes() + k * kStepBytes
                                      : own.get() + i * stride;
        for (int64_t tile = begin; tile < least(begin + near, last); ++tile) {
          const int64_t row = tile * task.height, count = least(task.height, t.rows - row);
          const uint8_t* rows[kRows];
          for (int64_t r = 0; r < count; ++r)
            rows[r] = t.turned ? task.a + (tile * task.steps + k) * kRows * 4 + r * 4
                               : task.a + (k / block * t.rows + row + r) * task.pitch();
          if (is_last && meets)  // the results' memory comes while the sum is made
            for (int64_t r = 0; r < count; ++r)
              __builtin_prefetch(t.out + (row + r) * t.columns + (j_begin + i) * kColumns, 1);
          sum_tile<Kind>(count, rows, right, walk, sums);
          if (all.empty()) {
            finish_tile(task, sums, kColumns, tile, j_begin + i, extra.data() + i * kColumns, removed);
            continue;
          }
          Sum* to = all.data() + (tile - first) * task.height * width + i * kColumns;
          for (int64_t r = 0; r < count; ++r)
            for (int64_t c = 0; c < kColumns; ++c) to[r * width + c] += static_cast<Sum>(sums[r * kColumns + c]);
          if (is_last) finish_tile(task, to, width, tile, j_begin + i, extra.data() + i * kColumns, removed);
        }
      }
  }
}

double sum_of(__m256 x) {
  float lanes[8];
  _mm256_storeu_ps(lanes, x);
  double sum = 0.0;
  for (float lane : lanes) sum += static_cast<double>(lane);
  return sum;
}

template <class Kind>
void multiply_as(Task& task) {
  const MatMul& t = task.t;
  if (t.turned) take_turned<Kind>(task);
  else take_rows<Kind>(task);
  // Each part packs its panels, which then should meet many rows; but there must be parts enough for the threads.
  constexpr int64_t kParts = 8;
  task.column_parts = ceil_div(task.panels, least(most_of(task.panels / 16, 4), 32));
  const int64_t fewest = task.blocks > 1 ? ceil_div(t.rows, 4 * kBlockRows) : 1;
  task.row_parts = most_of(fewest, least(ceil_div(kParts, task.column_parts), ceil_div(t.rows, kBlockRows)));
  parallel_always(task.row_parts * task.column_parts, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& task = *static_cast<Task*>(p);
    double clipped = 0.0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / task.column_parts, c = i % task.column_parts;
      const int64_t first = task.tiles * r / task.row_parts, last = task.tiles * (r + 1) / task.row_parts;
      const int64_t j = task.panels * c / task.column_parts, j_end = task.panels * (c + 1) / task.column_parts;
      __m256 removed = _mm256_setzero_ps();
      if (task.t.depth > task.way.terms) part<Kind, double>(task, first, last, j, j_end, removed);
      else part<Kind, int32_t>(task, first, last, j, j_end, removed);
      clipped += sum_of(removed);
    }
    task.clipped[thread] = clipped;
  }, &task);
}

bool multiply(MatMul* t) {
  if (!has_ranges(t->of) || (t->integers && t->turned) || t->b16) return false;
  t->clipped = 0.0;
  if (!t->rows || !t->columns) return true;  // nothing to share among the threads
  Task task(*t);
  if (!task.way.bytes) multiply_as<In16>(task);
  else if (t->turned) multiply_as<In8<false>>(task);
  else multiply_as<In8<true>>(task);
  for (double clipped : task.clipped) t->clipped += t->packed ? clipped : 0.0;
  return true;
}

int64_t panel_count(const MatMul* t) {
  if (!has_ranges(t->of)) return 0;
  const Task task(*t);
  return task.panels * task.panel_bytes() / 4;
}

bool pack_panels(const MatMul* t, uint32_t* out) {
  if (!has_ranges(t->of)) return false;
  const Task task(*t);
  auto* panels = reinterpret_cast<uint8_t*>(out);
  if (!task.way.bytes) pack_panels<In16>(task, panels);
  else if (t->turned) pack_panels<In8<false>>(task, panels);
  else pack_panels<In8<true>>(task, panels);
  return true;
}

}  // namespace

namespace FOURBIT_ISA {
bool conv_fprop(const ConvFprop*);
bool conv_wgrad(const ConvWgrad*);
bool conv_dgrad(const ConvDgrad*);
}  // namespace FOURBIT_ISA

const Products FOURBIT_JOIN(FOURBIT_ISA, _products) = {
    true, multiply, panel_count, pack_panels, FOURBIT_ISA::conv_fprop, FOURBIT_ISA::conv_wgrad, FOURBIT_ISA::conv_dgrad};

}  // namespace fourbit

#else

namespace fourbit {
const Products FOURBIT_JOIN(FOURBIT_ISA, _products) = {};
}  // namespace fourbit

#endif
