// Products of a matrix in bfloat16 and one of small integers or bfloat16, with float32 sums: for small integers what two products
// of int8 halves cost, without their results of twice the size. Needs the dot-product instruction of AVX512-BF16; without it there is nothing here.
//
// A panel is kRows rows of the left matrix, or kColumns columns of the right one, as pairs of neighbours along the sum: two
// bfloat16 numbers in 32 bits. What is missing to a whole panel or pair is zero.
#include "common.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include <vector>

#include "numbers.h"

namespace fourbit {
namespace {

constexpr int kLanes = 16, kRows = 12, kVectors = 2, kColumns = kVectors * kLanes;
constexpr int64_t kCache = 1 << 18;  // bytes of the right matrix's panels that are worked on together
constexpr int64_t kChunk = 256;      // pairs of a long sum that are worked on together

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline __m512bh bits(__m512i x) { return reinterpret_cast<__m512bh&>(x); }

// Up to sixteen integers as bfloat16, one per 32 bits: exact.
inline __m512i widen(const int8_t* p, __mmask16 which) {
  const __m512i n = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(which, p));
  return _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(n)), 16);
}

inline __m512i widen(const uint16_t* p, __mmask16 which) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, p));
}

inline __mmask16 first(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1);
}

// `count` columns of rows 2 i and 2 i + 1 of x [depth, stride], with `width` of them per pair of rows in `out`.
template <typename T>
void pack_columns(const T* x, int64_t depth, int64_t stride, int64_t count, int64_t width, uint32_t* out) {
  for (int64_t k = 0; k < depth; k += 2, x += 2 * stride, out += width)
    for (int64_t c = 0; c < width; c += kLanes) {
      const __mmask16 which = first(count - c), into = first(width - c);
      const __m512i low = widen(x + c, which);
      const __m512i high = k + 1 < depth ? widen(x + stride + c, which) : _mm512_setzero_si512();
      _mm512_mask_storeu_epi32(out + c, into, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// `count` rows of x [.., stride], `depth` of each.
void pack_rows(const uint16_t* x, int64_t stride, int64_t depth, int64_t count, uint32_t* out) {
  for (int64_t row = 0; row < kRows; ++row) {
    const uint16_t* from = x + row * stride;
    uint32_t* to = out + row;
    if (row >= count) {
      for (int64_t k = 0; k < depth; k += 2, to += kRows) *to = 0;
      continue;
    }
    int64_t k = 0;
    for (; k + 1 < depth; k += 2, to += kRows) std::memcpy(to, from + k, 4);
    if (k < depth) *to = from[k];
  }
}

// Sixteen results from element e on: what the mask removes goes into `removed`, by the sign of the code.
inline __m512 keep_inside(const MatMul& t, __m512 y, int64_t e, __m512& removed) {
  uint16_t inside;
  std::memcpy(&inside, t.mask + e / 8, 2);
  if (t.packed && inside != 0xFFFF) {
    const int64_t in_block = e % kBlock;
    const __m128i bytes = _mm_loadu_si128(
        reinterpret_cast<const __m128i*>(t.packed + e / kBlock * (kBlock / 2) + in_block % (kBlock / 2)));
    __m512i code = _mm512_cvtepu8_epi32(bytes);
    code = in_block < kBlock / 2 ? _mm512_and_si512(code, _mm512_set1_epi32(15)) : _mm512_srli_epi32(code, 4);
    if (t.is_signed) code = _mm512_sub_epi32(_mm512_xor_si512(code, _mm512_set1_epi32(8)), _mm512_set1_epi32(8));
    const __mmask16 outside = static_cast<__mmask16>(~inside), up = _mm512_cmpgt_epi32_mask(code, _mm512_setzero_si512());
    const __mmask16 down = _mm512_cmplt_epi32_mask(code, _mm512_setzero_si512());
    removed = _mm512_mask_add_ps(removed, up & outside, removed, y);
    removed = _mm512_mask_sub_ps(removed, down & outside, removed, y);
  }
  return _mm512_maskz_mov_ps(inside, y);
}

// One tile's sums over some pairs, [kRows][kColumns], of the first Rows rows; `more`: beside those that are there.
template <int Rows>
void add_rows(const uint32_t* a, const uint32_t* b, int64_t pairs, bool more, float* sums) {
  __m512 acc[Rows][kVectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = more ? _mm512_loadu_ps(sums + r * kColumns + v * kLanes) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, a += kRows, b += kColumns) {
    __m512bh right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = bits(_mm512_loadu_si512(b + v * kLanes));
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const __m512bh left = bits(_mm512_set1_epi32(static_cast<int32_t>(a[r])));
      for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], right[v], left);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(sums + r * kColumns + v * kLanes, acc[r][v]);
}

void add_tile(int64_t rows, const uint32_t* a, const uint32_t* b, int64_t pairs, bool more, float* sums) {
  if (rows <= 4) add_rows<4>(a, b, pairs, more, sums);
  else if (rows <= 8) add_rows<8>(a, b, pairs, more, sums);
  else if (rows <= 10) add_rows<10>(a, b, pairs, more, sums);
  else add_rows<kRows>(a, b, pairs, more, sums);
}

// Scales, rounds, masks and writes a tile. Returns the sum of what was removed.
double finish_tile(const MatMul& t, float* sums, int64_t row, int64_t height, int64_t column) {
  const float scale = t.scale, post = t.post;
  const FloatGrid g = t.grid;
  const __mmask16 low = first(t.columns - column), high = first(t.columns - column - kLanes);
  __m512 removed = _mm512_setzero_ps();
  for (int64_t r = 0; r < height && row + r < t.rows; ++r) {
    float* y = sums + r * kColumns;
    for (int j = 0; j < kColumns; j += kVector) {
      const Floats s = read(y + j) * scale;
      write(y + j, (t.rounds ? float_nearest(s, g) : s) * post);
    }
    const int64_t at = (row + r) * t.columns + column;
    __m512 left = _mm512_loadu_ps(y), right = _mm512_loadu_ps(y + kLanes);
    if (t.mask) {
      left = keep_inside(t, left, at, removed);
      if (high) right = keep_inside(t, right, at + kLanes, removed);
    }
    _mm512_mask_storeu_ps(t.out + at, low, left);
    if (high) _mm512_mask_storeu_ps(t.out + at + kLanes, high, right);
  }
  return t.packed ? static_cast<double>(_mm512_reduce_add_ps(removed)) : 0.0;
}

struct Task {
  const MatMul* t;
  int64_t pairs, panels, across;  // pairs along the sum, panels of rows and of columns
  int64_t height;                 // rows that a panel has, kRows or fewer, so that all have about as many
  std::vector<uint32_t> a;
  bool by_rows = false;
  std::vector<std::vector<float>> sums;  // by thread
  double clipped[kMaxThreads] = {};
  explicit Task(const MatMul* t)
      : t(t), pairs(ceil_div(t->depth, 2)), panels(ceil_div(t->rows, kRows)), across(ceil_div(t->columns, kColumns)), height(panels ? ceil_div(t->rows, panels) : kRows) {}
  double total() const {
    double sum = 0.0;
    for (double clipped : clipped) sum += clipped;
    return sum;
  }
};

// Panels of rows, `depth` of the sum from `begin` on.
void pack_left(const Task& task, int64_t panel, int64_t begin, int64_t depth, uint32_t* out) {
  const MatMul& t = *task.t;
  const int64_t row = panel * task.height, left = t.rows - row, count = left < 0 ? 0 : left < task.height ? left : task.height;
  if (t.turned) pack_columns(t.a + begin * t.rows + row, depth, t.rows, count, kRows, out);
  else pack_rows(t.a + row * t.depth + begin, t.depth, depth, count, out);
}

constexpr int64_t kMostTurned = (int64_t{1} << 31) / kLanes - 1;  // numbers of a row whose neighbours' places 32 bits hold

// Columns that lie as rows: `count` of x [.., stride], `depth` of each.
void pack_turned_columns(const uint16_t* x, int64_t depth, int64_t stride, int64_t count, uint32_t* out) {
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i lines = _mm512_mullo_epi32(steps, _mm512_set1_epi32(static_cast<int32_t>(stride)));
  for (int64_t k = 0; k < depth; k += 2, out += kColumns)
    for (int64_t c = 0; c < kColumns; c += kLanes) {
      const uint16_t* from = x + c * stride + k;
      const __mmask16 which = first(count - c);
      __m512i pairs;
      if (k + 1 < depth) {
        pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), which, lines, from, 2);
      } else {
        uint32_t last[kLanes] = {};
        for (int64_t i = 0; i < kLanes && c + i < count; ++i) last[i] = from[i * stride];
        pairs = _mm512_loadu_si512(last);
      }
      _mm512_storeu_si512(out + c, pairs);
    }
}

void pack_right(const MatMul& t, int64_t panel, int64_t begin, int64_t depth, uint32_t* out) {
  const int64_t column = panel * kColumns, at = begin * t.columns + column, count = t.columns - column;
  if (!t.b16) pack_columns(t.b + at, depth, t.columns, count, kColumns, out);
  else if (t.b_turned) pack_turned_columns(t.b16 + column * t.depth + begin, depth, t.depth, count, out);
  else pack_columns(t.b16 + at, depth, t.columns, count, kColumns, out);
}

// Panels r_begin .. r_end of rows times panels j_begin .. j_end of columns.
double part(const Task& task, int64_t r_begin, int64_t r_end, int64_t j_begin, int64_t j_end) {
  const MatMul& t = *task.t;
  const int64_t size = task.pairs * kColumns, fitting = kCache / (size * 4);
  const int64_t together = fitting < 1 ? 1 : fitting > 16 ? 16 : fitting;
  std::vector<uint32_t> b(static_cast<size_t>(t.panels ? 0 : together * size));
  std::vector<uint32_t> own(static_cast<size_t>(task.by_rows ? task.pairs * kRows : 0));
  float sums[kRows * kColumns];
  double clipped = 0.0;
  for (int64_t j = j_begin; j < j_end; j += together) {
    const int64_t num = j_end - j < together ? j_end - j : together;
    for (int64_t i = 0; i < num && !t.panels; ++i) pack_right(t, j + i, 0, t.depth, b.data() + i * size);
    const uint32_t* right = t.panels ? t.panels + j * size : b.data();
    for (int64_t r = r_begin; r < r_end; ++r) {
      if (task.by_rows) pack_left(task, r, 0, t.depth, own.data());
      const uint32_t* a = task.by_rows ? own.data() : task.a.data() + r * task.pairs * kRows;
      for (int64_t i = 0; i < num; ++i) {
        add_tile(task.height, a, right + i * size, task.pairs, false, sums);
        clipped += finish_tile(t, sums, r * task.height, task.height, (j + i) * kColumns);
      }
    }
  }
  return clipped;
}

// The threads share the rows where there are few columns, and each packs its own; otherwise the columns.
void multiply_parts(Task& task) {
  task.by_rows = task.across < 16 && task.panels > task.across;
  task.a.resize(static_cast<size_t>(task.by_rows ? 0 : task.panels * task.pairs * kRows));
  if (!task.by_rows)
    parallel_always(task.panels, [](int64_t begin, int64_t end, int, void* p) {
      Task& task = *static_cast<Task*>(p);
      for (int64_t i = begin; i < end; ++i)
        pack_left(task, i, 0, task.t->depth, task.a.data() + i * task.pairs * kRows);
    }, &task);
  parallel_always(task.by_rows ? task.panels : task.across, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& task = *static_cast<Task*>(p);
    task.clipped[thread] =
        task.by_rows ? part(task, begin, end, 0, task.across) : part(task, 0, task.panels, begin, end);
  }, &task);
}

constexpr int64_t kMostSums = int64_t{1} << 22;  // of which every thread has a copy of its own, 16 MiB

// Long sums of few results: the threads share the sum. So its order, and the last bit of an inexact one, depends on their number.
void multiply_long(Task& task) {
  const size_t size = static_cast<size_t>(task.panels * task.across * kRows * kColumns);
  task.sums.resize(kMaxThreads);
  task.sums[0].resize(size);  // also where the first thread has nothing to do
  const int pieces = parallel_always(ceil_div(task.pairs, kChunk), [](int64_t begin, int64_t end, int thread, void* p) {
    Task& task = *static_cast<Task*>(p);
    const MatMul& t = *task.t;
    auto& sums = task.sums[static_cast<size_t>(thread)];
    sums.resize(static_cast<size_t>(task.panels * task.across * kRows * kColumns));
    std::vector<uint32_t> a(static_cast<size_t>(task.panels * kChunk * kRows));
    std::vector<uint32_t> b(static_cast<size_t>(task.across * kChunk * kColumns));
    for (int64_t k = begin * kChunk; k < end * kChunk && k < task.pairs; k += kChunk) {
      const int64_t depth = t.depth - 2 * k < 2 * kChunk ? t.depth - 2 * k : 2 * kChunk, pairs = ceil_div(depth, 2);
      for (int64_t r = 0; r < task.panels; ++r) pack_left(task, r, 2 * k, depth, a.data() + r * kChunk * kRows);
      for (int64_t j = 0; j < task.across; ++j) pack_right(t, j, 2 * k, depth, b.data() + j * kChunk * kColumns);
      for (int64_t r = 0; r < task.panels; ++r)
        for (int64_t j = 0; j < task.across; ++j)
          add_tile(task.height, a.data() + r * kChunk * kRows, b.data() + j * kChunk * kColumns, pairs, k > begin * kChunk,
                   sums.data() + (r * task.across + j) * kRows * kColumns);
    }
  }, &task);
  for (int i = 1; i < pieces; ++i) {
    const auto& other = task.sums[static_cast<size_t>(i)];
    for (size_t e = 0; e < other.size(); ++e) task.sums[0][e] += other[e];
  }
  for (int64_t r = 0; r < task.panels; ++r)
    for (int64_t j = 0; j < task.across; ++j)
      task.clipped[0] += finish_tile(*task.t, task.sums[0].data() + (r * task.across + j) * kRows * kColumns, r * task.height,
                                     task.height, j * kColumns);
}

// The same for two matrices of 8-bit integers, the right one as its transpose [columns, depth], always in panels: four
// neighbours along the sum in 32 bits, then the sum of every column. The left ones are taken as unsigned: signed numbers get 128
// more, and the columns' sums are taken out again.
constexpr int kFour = 4;

inline int64_t quads(int64_t depth) { return ceil_div(depth, kFour); }

void pack_quads(const MatMul& t, int64_t panel, uint32_t* out) {
  const int8_t* w = t.b + panel * kColumns * t.depth;
  const int64_t count = t.columns - panel * kColumns, groups = quads(t.depth);
  int32_t sums[kColumns] = {};
  std::memset(out, 0, static_cast<size_t>((groups + 1) * kColumns) * 4);
  for (int64_t c = 0; c < kColumns && c < count; ++c) {
    const int8_t* row = w + c * t.depth;
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t left = t.depth - k * kFour;
      std::memcpy(out + k * kColumns + c, row + k * kFour, static_cast<size_t>(left < kFour ? left : kFour));
    }
    for (int64_t k = 0; k < t.depth; ++k) sums[c] += row[k];
  }
  std::memcpy(out + groups * kColumns, sums, sizeof(sums));
}

template <int Rows>
void multiply_quads(const uint32_t* a, const uint32_t* b, int64_t groups, int32_t offset, float* sums) {
  __m512i acc[Rows][kVectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_setzero_si512();
  for (int64_t k = 0; k < groups; ++k, a += kRows, b += kColumns) {
    __m512i right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = _mm512_loadu_si512(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const __m512i left = _mm512_set1_epi32(static_cast<int32_t>(a[r]));
      for (int v = 0; v < kVectors; ++v) acc[r][v] = _mm512_dpbusd_epi32(acc[r][v], left, right[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    const __m512i more = _mm512_mullo_epi32(_mm512_loadu_si512(b + v * kLanes), _mm512_set1_epi32(offset));
    for (int r = 0; r < Rows; ++r)
      _mm512_storeu_ps(sums + r * kColumns + v * kLanes, _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][v], more)));
  }
}

void multiply_integers(Task& task) {
  const MatMul& t = *task.t;
  const int64_t groups = quads(t.depth);
  task.a.assign(static_cast<size_t>(task.panels * groups * kRows), 0);
  const uint8_t flip = t.is_unsigned ? 0 : 128;
  const uint8_t* x = reinterpret_cast<const uint8_t*>(t.a);
  for (int64_t row = 0; row < t.rows; ++row) {
    uint8_t* to = reinterpret_cast<uint8_t*>(task.a.data() + row / task.height * groups * kRows + row % task.height);
    for (int64_t k = 0; k < t.depth; ++k)
      to[k / kFour * kRows * 4 + k % kFour] = static_cast<uint8_t>(x[row * t.depth + k] ^ flip);
  }
  parallel_always(task.across, [](int64_t begin, int64_t end, int, void* p) {
    const Task& task = *static_cast<Task*>(p);
    const MatMul& t = *task.t;
    const int64_t groups = quads(t.depth);
    const int32_t offset = t.is_unsigned ? 0 : 128;
    float sums[kRows * kColumns];
    for (int64_t j = begin; j < end; ++j) {
      const uint32_t* right = t.panels + j * (groups + 1) * kColumns;
      for (int64_t r = 0; r < task.panels; ++r) {
        const uint32_t* left = task.a.data() + r * groups * kRows;
        if (task.height <= 4) multiply_quads<4>(left, right, groups, offset, sums);
        else if (task.height <= 8) multiply_quads<8>(left, right, groups, offset, sums);
        else if (task.height <= 10) multiply_quads<10>(left, right, groups, offset, sums);
        else multiply_quads<kRows>(left, right, groups, offset, sums);
        finish_tile(t, sums, r * task.height, task.height, j * kColumns);
      }
    }
  }, &task);
}

bool multiply(MatMul* t) {
  if (t->b16 && t->b_turned && t->depth > kMostTurned) return false;
  if (t->integers) {
    if (!t->panels) return false;
    Task task(t);
    multiply_integers(task);
    return true;
  }
  Task task(t);
  const int64_t widest = t->rows > t->columns ? t->rows : t->columns;
  const bool few = t->rows * t->columns <= kMostSums;
  if (few && !t->panels && t->depth >= 4096 && t->depth >= 4 * widest) multiply_long(task);
  else multiply_parts(task);
  t->clipped = task.total();
  return true;
}

int64_t panel_count(const MatMul* t) {
  return ceil_div(t->columns, kColumns) * kColumns * (t->integers ? quads(t->depth) + 1 : ceil_div(t->depth, 2));
}

bool pack_panels(const MatMul* t, uint32_t* out) {
  struct Job { const MatMul* t; uint32_t* out; } job{t, out};
  parallel_always(ceil_div(t->columns, kColumns), [](int64_t begin, int64_t end, int, void* p) {
    const Job& job = *static_cast<Job*>(p);
    const int64_t size = ceil_div(job.t->depth, 2) * kColumns;
    for (int64_t j = begin; j < end; ++j)
      if (job.t->integers) pack_quads(*job.t, j, job.out + j * (quads(job.t->depth) + 1) * kColumns);
      else pack_right(*job.t, j, 0, job.t->depth, job.out + j * size);
  }, &job);
  return true;
}

}  // namespace

bool dot_product_wgrad(const ConvWgrad*);
bool dot_product_dgrad(const ConvDgrad*);

// Gradients whose ranges are given are integers of 8 bits: those have twice the rate of bfloat16.
static bool wgrad(const ConvWgrad* t) {
  const auto integers = avx512_vnni_products.conv_wgrad;
  return t->of.unit > 0.0f ? integers && integers(t) : dot_product_wgrad(t);
}

static bool dgrad(const ConvDgrad* t) {
  const auto integers = avx512_vnni_products.conv_dgrad;
  return t->of.unit > 0.0f ? integers && integers(t) : dot_product_dgrad(t);
}

static bool fprop(const ConvFprop* t) {
  const auto integers = avx512_vnni_products.conv_fprop;
  return integers && integers(t);
}

const Products dot_product_products = {false, multiply, panel_count, pack_panels, fprop, wgrad, dgrad};

}  // namespace fourbit

#else

namespace fourbit {
const Products dot_product_products = {};
}  // namespace fourbit

#endif
