// Products of matrices of small integers, exact: gradients are integers too, in units of their smallest magnitude. See tiles.h.
#include "common.h"

#if defined(__AVX2__)
#include "tiles.h"

namespace fourbit {
namespace {

constexpr int64_t kBlockSteps = 512;   // of a long sum, which are worked on together
constexpr int64_t kBlockRows = 120;    // likewise

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
  int64_t step_terms;
  std::vector<uint8_t> own_a, own_panels;
  std::vector<int32_t> row_sums;         // where the columns have an offset
  const uint8_t* a = nullptr;            // [rows][steps], or [tiles][steps][kRows] if turned
  const uint8_t* b = nullptr;            // panels: steps, then the sums of the columns
  int64_t row_blocks = 0, column_blocks = 0;
  double clipped[kMaxThreads] = {};

  explicit Task(const MatMul& t)
      : t(t), way(way_of(t)), panels(ceil_div(t.columns, kColumns)), tiles(ceil_div(t.rows, kRows)),
        height(ceil_div(t.rows, most_of(tiles, 1))) {
    step_terms = way.bytes ? 4 : 2;
    steps = ceil_div(t.depth, step_terms);
    if (height > 0) tiles = ceil_div(t.rows, height);
  }
  int64_t panel_bytes() const { return (steps + 1) * kStepBytes; }
};

template <class Kind>
void pack_right(const Task& task, int64_t begin, int64_t end, uint8_t* panels) {
  const MatMul& t = task.t;
  for (int64_t j = begin; j < end; ++j) {
    uint8_t* out = panels + j * task.panel_bytes();
    const int64_t column = j * kColumns, count = t.columns - column;
    int32_t sums[kColumns] = {};
    int32_t* wanted = task.way.left_offset ? sums : nullptr;
    if (t.integers) {
      pack_columns<Kind>(t.b + column * t.depth, t.depth, t.depth, count, out, wanted);
    } else {
      auto row = [&](int64_t k) { return t.b + k * t.columns + column; };
      pack_panel<Kind>(row, t.depth, count, task.way.right_offset, out, wanted);
    }
    for (int32_t& sum : sums) sum *= task.way.left_offset;
    std::memcpy(out + task.steps * kStepBytes, sums, sizeof sums);
  }
}

template <class Kind>
void pack_panels(const Task& task, uint8_t* out) {
  struct Job { const Task* task; uint8_t* out; } job{&task, out};
  parallel_always(task.panels, [](int64_t begin, int64_t end, int, void* p) {
    const Job& job = *static_cast<Job*>(p);
    pack_right<Kind>(*job.task, begin, end, job.out);
  }, &job);
}

// Rows as they lie, the sum's terms being neighbours.
template <class Kind>
void take_rows(Task& task) {
  using Number = typename Kind::Number;
  const MatMul& t = task.t;
  if (sizeof(Number) == 1 && t.of.dtype == kUInt8 && task.way.left_offset == 0 && t.depth % Kind::kTerms == 0) {
    task.a = reinterpret_cast<const uint8_t*>(t.a);
    return;
  }
  task.own_a.resize(static_cast<size_t>(t.rows * task.steps * 4));
  parallel(t.rows * t.depth, t.depth, [](int64_t begin, int64_t end, int, void* p) {
    Task& task = *static_cast<Task*>(p);
    const MatMul& t = task.t;
    with_numbers(t.a, t.of.dtype, [&](auto* a) {
      for (int64_t row = begin / t.depth; row < end / t.depth; ++row) {
        auto* out = reinterpret_cast<Number*>(task.own_a.data() + row * task.steps * 4);
        convert_row(a + row * t.depth, 1.0f / t.of.unit, task.way.left_offset, t.depth, out);
      }
    });
  }, &task);
  task.a = task.own_a.data();
}

// The rows of the transpose of `a`, in tiles.
template <class Kind>
void take_turned(Task& task) {
  task.own_a.resize(static_cast<size_t>(task.tiles * task.steps * kRows * 4));
  parallel_always(task.steps, [](int64_t begin, int64_t end, int, void* p) {
    Task& task = *static_cast<Task*>(p);
    const MatMul& t = task.t;
    std::vector<uint8_t> line(static_cast<size_t>((ceil_div(t.rows, kColumns) + 1) * kStepBytes));
    with_numbers(t.a, t.of.dtype, [&](auto* a) {
      for (int64_t step = begin; step < end; ++step) {
        decltype(a) rows[Kind::kTerms];
        for (int i = 0; i < Kind::kTerms; ++i) {
          const int64_t k = step * Kind::kTerms + i;
          rows[i] = k < t.depth ? a + k * t.rows : nullptr;
        }
        interleave_rows<Kind>(rows, 1.0f / t.of.unit, t.rows, line.data());
        for (int64_t tile = 0; tile < task.tiles; ++tile)
          std::memcpy(task.own_a.data() + (tile * task.steps + step) * kRows * 4, line.data() + tile * task.height * 4,
                      kRows * 4);
      }
    });
  }, &task);
  task.a = task.own_a.data();
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

// Scales, rounds, masks and writes a tile, whose rows lie `stride` sums apart.
template <typename Sum>
void finish_tile(const Task& task, const Sum* sums, int64_t stride, int64_t tile, int64_t panel, __m256& removed) {
  const MatMul& t = task.t;
  const int64_t column = panel * kColumns, first = tile * task.height, last = least(first + task.height, t.rows);
  int32_t extra[kColumns] = {};
  if (task.way.left_offset)
    std::memcpy(extra, task.b + panel * task.panel_bytes() + task.steps * kStepBytes, sizeof extra);
  for (int64_t row = first; row < last; ++row, sums += stride) {
    if (task.way.right_offset)
      for (int32_t& e : extra) e = task.row_sums[static_cast<size_t>(row)];
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
  const int64_t block = std::is_same<Sum, double>::value ? most_of(least(kBlockSteps, task.way.terms / Kind::kTerms), 1)
                                                         : kBlockSteps;
  const int64_t width = (j_end - j_begin) * kColumns;
  std::vector<Sum> all(static_cast<size_t>(task.steps > block ? (last - first) * task.height * width : 0));
  int32_t sums[kRows * kColumns];
  for (int64_t k = 0; k < task.steps; k += block) {
    Walk walk{task.way.steps, least(block, task.steps - k), t.turned ? kRows * 4 : 4, kStepBytes};
    for (int64_t j = j_begin; j < j_end; ++j) {
      const uint8_t* right = task.b + j * task.panel_bytes() + k * kStepBytes;
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t row = tile * task.height, count = least(task.height, t.rows - row);
        const uint8_t* rows[kRows];
        for (int64_t r = 0; r < count; ++r)
          rows[r] = t.turned ? task.a + (tile * task.steps + k) * kRows * 4 + r * 4 : task.a + ((row + r) * task.steps + k) * 4;
        sum_tile<Kind>(count, rows, right, walk, sums);
        if (all.empty()) {
          finish_tile(task, sums, kColumns, tile, j, removed);
          continue;
        }
        Sum* to = all.data() + (tile - first) * task.height * width + (j - j_begin) * kColumns;
        for (int64_t r = 0; r < count; ++r)
          for (int64_t c = 0; c < kColumns; ++c) to[r * width + c] += static_cast<Sum>(sums[r * kColumns + c]);
        if (k + block >= task.steps) finish_tile(task, to, width, tile, j, removed);
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
  task.b = reinterpret_cast<const uint8_t*>(t.panels);
  if (!task.b) {
    task.own_panels.resize(static_cast<size_t>(task.panels * task.panel_bytes()));
    pack_panels<Kind>(task, task.own_panels.data());
    task.b = task.own_panels.data();
  }
  if (t.turned) take_turned<Kind>(task);
  else take_rows<Kind>(task);
  const int64_t width = least(most_of(task.panels / 16, 4), 32);  // panels of a block
  task.row_blocks = ceil_div(t.rows, kBlockRows);
  task.column_blocks = ceil_div(task.panels, width);
  parallel_always(task.row_blocks * task.column_blocks, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& task = *static_cast<Task*>(p);
    double clipped = 0.0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i / task.column_blocks, c = i % task.column_blocks;
      const int64_t first = task.tiles * r / task.row_blocks, last = task.tiles * (r + 1) / task.row_blocks;
      const int64_t j = task.panels * c / task.column_blocks, j_end = task.panels * (c + 1) / task.column_blocks;
      __m256 removed = _mm256_setzero_ps();
      if (task.t.depth > task.way.terms) part<Kind, double>(task, first, last, j, j_end, removed);
      else part<Kind, int32_t>(task, first, last, j, j_end, removed);
      clipped += sum_of(removed);
    }
    task.clipped[thread] = clipped;
  }, &task);
}

bool multiply(MatMul* t) {
  if (!has_ranges(t->of) || (t->integers && t->turned)) return false;
  Task task(*t);
  if (!task.way.bytes) multiply_as<Words>(task);
  else if (t->turned) multiply_as<Bytes<false>>(task);
  else multiply_as<Bytes<true>>(task);
  t->clipped = 0.0;
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
  if (!task.way.bytes) pack_panels<Words>(task, panels);
  else if (t->turned) pack_panels<Bytes<false>>(task, panels);
  else pack_panels<Bytes<true>>(task, panels);
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
