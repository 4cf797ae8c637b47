// What every translation unit shares: element types, the thread team, the table of kernels of one instruction set, and the C ABI.
//
// Python reads the structures, Dtype and the functions behind FOURBIT_API from this file (_structures.py), so it keeps to a few
// forms: a field is `type name, name[2];` or one pointer; a structure with function pointers is not for Python.
//
// The library has a plain C ABI, depends on no header of torch and links no OpenMP runtime: the caller hands over the entry
// points of the runtime that torch has loaded (fourbit_set_threads), so that both share one team of threads.
#pragma once

#include <cstdint>
#include <cstring>

#define FOURBIT_JOIN2(a, b) a##b
#define FOURBIT_JOIN(a, b) FOURBIT_JOIN2(a, b)
#define FOURBIT_INLINE inline __attribute__((always_inline))
#define FOURBIT_API extern "C" __attribute__((visibility("default")))
#define FOURBIT_ALLOCATES  // marks functions of the C ABI that may run out of memory: see fourbit_out_of_memory

namespace fourbit {

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kUInt8 = 3, kInt32 = 4 };

// Elements per block: codes of elements i and i + 32 of a block share a byte (low and high nibble). Masks have one bit per
// element, in order, from the lowest bit of the first byte up.
constexpr int64_t kBlock = 64;

// A logarithmic grid: 0 and +-smallest * 2^(octaves i), powers of two, rounded up from `start` * 2^(octaves i) on; float32 bit
// patterns, whose lower halves are 0.
struct LogGrid {
  int32_t start, smallest, largest, octaves;  // octaves << 23
};

// A binary float format: magnitudes are multiples of a quantum that doubles with the exponent.
struct FloatGrid {
  int32_t mantissa_bits;
  int32_t lowest;     // smallest exponent of a normal number, biased as in float32
  float smallest;     // smallest magnitude if there are no subnormals, else 0
  float min, max;
  float overflow;     // magnitudes from here on become infinite; NaN: never
};

using Range = void (*)(int64_t begin, int64_t end, int thread, void* task);

// Runs range(begin, end, thread, task) over [0, n) in pieces that start at multiples of `grain`; returns the number of pieces.
int parallel(int64_t n, int64_t grain, Range range, void* task);
constexpr int kMaxThreads = 256;
// The same with a grain of 1, however small n is: for pieces that are large in themselves.
int parallel_always(int64_t n, Range range, void* task);

struct Clip {
  const void* x;
  int32_t dtype;
  int64_t n;
  float inv_scale, low, high;
  int32_t mask_rule;  // 0: none; 1: 0 <= x < bound; 2: |x| < bound; 3: |x| <= bound
  float bound;
  int8_t* codes;      // one byte per element, or null
  uint8_t* packed;    // 32 bytes per block, or null
  uint8_t* mask;      // 8 bytes per block, or null where mask_rule is 0
};

struct LogRound {
  const void* x;
  int32_t dtype;
  int64_t n;
  float inv_scale;
  int32_t num;        // grids, 1 or 2
  LogGrid grid[2];
  void* out[2];
  int32_t out_dtype;  // bfloat16, or int8, which must hold the grids
  uint64_t key[2];    // of the random words
  int32_t rule;       // 0: nearest; 1: stochastic; 2: stochastic below the smallest magnitude, nearest above
};

struct FloatRound {
  const void* x;
  int32_t dtype;
  int64_t n;
  float inv_scale;
  FloatGrid grid;
  void* out;
  int32_t out_dtype;
};

struct TableRound {
  const void* x;
  int32_t dtype;
  int64_t n;
  float inv_scale;
  const float* boundaries;  // a number becomes levels[count of boundaries below it]
  const float* levels;
  int32_t num_levels;
  float overflow;           // as in FloatGrid
  void* out;
  int32_t out_dtype;
  uint64_t key;
  int32_t rule;             // as in LogRound
  int32_t zero;             // for rule 2: levels[zero] is 0, and `smallest` the smallest magnitude
  float smallest;
};

struct Unpack {
  const uint8_t* packed;
  int64_t n;
  int32_t is_signed;
  void* out;
  int32_t out_dtype;
};

// An operand [groups, rows, spots, sums] whose tiles of tile_rows x tile_sums numbers (powers of two; sums 16 to 128) share a scale.
// `turned`: neighbours in memory are rows, otherwise sums. Blocks of `rotation` neighbours along the sums are multiplied by `signs`
// (null: 1), Sylvester's matrix and `factor`; the sums are whole blocks then, of which x has the first x_sums.
// With `rows_in_spot`, the one spot stands for many, whose rows come one spot after the other, so many of each: random words are those of
// [groups, rows_in_spot, rows / rows_in_spot, sums].
struct Tiles {
  const void* x;
  int32_t dtype;
  int64_t groups, rows, spots, sums, x_sums;
  int64_t rows_in_spot;      // or 0
  int64_t x_steps[4];   // between neighbours along each axis
  int32_t turned, tile_rows, tile_sums;
  int32_t rotation;     // 0: none
  const float* signs;
  float factor;
};

// x ~ decode / prescale * (block * q): q on `grid`, one block for each tile on scale_grid. See fourbit.quantizers.BlockScale.
struct RoundTiles {
  Tiles tiles;
  int32_t scale_rule;      // 0: floor; 1: ceil (both of powers of two); 2: nearest; 3: nearest power of two
  int32_t num_targets;     // 1 or 2
  float target[2];
  float factor[2];         // of one target: 1 / target; of two: target[0] / target
  double clip_rms;         // scales are of this multiple of the root mean square; 0: of the largest magnitude. Not turned
  float reach;             // two levels: the largest block scale times target[0]; 0: one level
  float prescale;
  FloatGrid scale_grid;
  const uint8_t* code_of;  // of scale formats, by the place of a number among those that are not negative; [255] is NaN's
  FloatGrid grid;
  float per_unit;          // 1 / smallest magnitude: numbers times it are integers below 16
  const int8_t* positions; // on the grid, from zero on, by that integer; null: the integers themselves are the codes
  int32_t zero;            // position of zero
  int32_t rule;            // 0: nearest; 1: stochastic
  uint64_t key;
  void* out;               // block * q, or null
  int32_t out_dtype;
  int64_t out_steps[4];
  uint8_t* packed;         // or null
  int8_t* codes;           // room for a byte per element, where lines of out are not whole blocks; or null
  uint8_t* mask;           // where a magnitude is at most its scale times grid.max; lines are whole bytes then; or null
  uint8_t* scale_codes;    // [groups, tiles of rows, spots, tiles of sums]
  float* each;             // decode * block / prescale, likewise
  float encode, decode, largest;  // results: 1 / decode, and max|x| (with two levels)
};

// Packed codes of an operand as numbers times the scales of their tiles.
struct UnpackTiles {
  Tiles tiles;             // without x
  const uint8_t* packed;
  int32_t is_signed;       // of integers
  const float* positions;  // 16 numbers by their codes; null: integers
  const uint8_t* scale_codes;
  const float* scale_of;   // 256 scales by their codes
  void* out;
  int32_t out_dtype;
  int32_t exact;           // whether out_dtype holds every number
  int64_t steps[4];        // of out
};

// What follows a matrix product: out = post * round(scale * y), zero where the mask is not set; y is float32, bfloat16,
// int32, or two int32 (256 * high + y). Returns the sum over masked elements of out (before masking) * sign(code).
struct Epilogue {
  const void* x;
  int32_t dtype;
  int64_t n;
  const int32_t* high;    // or null
  float scale;
  int32_t rounds;         // whether grid applies
  int32_t keep_infinite;  // infinities pass, instead of saturating
  FloatGrid grid;
  float post;
  const uint8_t* mask;    // or null
  const uint8_t* packed;  // of the codes; null where nobody asks for the sum
  int32_t is_signed;
  void* out;
  int32_t out_dtype;
};

// x * unit = 256 * high + low, integers; x is bfloat16.
struct Split {
  const uint16_t* x;
  int64_t n;
  float unit;
  int8_t* high;
  int8_t* low;
};

struct Moments {
  double sum_square, sum_abs;
  float amax;  // NaN where an element is NaN
};

// Batch normalization of [rows, channels] in two passes over memory. The first: v = round(scale y), its mean and variance per
// channel, the running statistics, and the affine map t = slope v + offset that normalizes.
struct NormStatistics {
  const float* y;
  int64_t rows;
  int32_t channels;
  float scale;
  int32_t rounds;         // whether grid applies
  int32_t coded;          // y is v in 16-bit codes of grid already, and lies in `kept`
  FloatGrid grid;
  void* kept;             // v: 16-bit codes of grid if `halves`, else float32 (may be y itself)
  int32_t halves;
  const float* gamma;     // or null
  const float* beta;      // or null
  float eps;
  float* running_mean;    // or null
  float* running_var;
  float momentum;
  float* mean;
  float* inv_std;
  float* slope;
  float* offset;
};

// The second: residual, activation, and the next layer's operand: t = slope v + offset (+ residual), out = act(t), codes of out.
// act: 0 none, 1 max(t, 0), with t <= cap. `clip` says how out becomes codes; its x, dtype and n do not count.
struct NormApply {
  const void* kept;
  int32_t halves;
  FloatGrid grid;         // of kept, if halves
  int64_t rows;
  int32_t channels;
  const float* slope;
  const float* offset;
  const float* residual;  // or null
  int32_t act;
  float cap;
  float* out;             // or null
  uint8_t* pass;          // where the gradient of out passes the activation, or null
  Clip clip;
  int32_t clips;          // whether clip applies
};

// The gradients of both. g = token_scale * token inside the mask, plus out_grad, where the activation lets it pass;
// sums per channel; then dy = a (g - mean g - (v - mean) / std^2 mean(g (v - mean))), rounded to one or two logarithmic grids,
// or as it is. `clipped` sums what the mask removed, times the sign of the code.
struct NormBackward {
  const void* token;      // gradient of the codes, or null
  int32_t token_dtype;
  float token_scale;
  const uint8_t* packed;
  int32_t is_signed;
  const uint8_t* mask;
  const float* out_grad;  // or null
  const uint8_t* pass;    // null: everything (act 0), or where mask or code is not 0
  int32_t act;
  int32_t cap_clips;      // whether what the activation caps is clipped as well
  const void* kept;
  int32_t halves;
  FloatGrid grid;
  int64_t rows;
  int32_t channels;
  const float* gamma;
  const float* mean;
  const float* inv_std;
  float* g;               // gradient of the residual, or null
  float* dgamma;
  float* dbeta;
  float inv_scale;        // of the grids
  int32_t num;            // grids; 0: dy as it is
  LogGrid log_grid[2];
  void* out[2];           // bfloat16; float32 where num is 0
  double clipped;
};

// out[group, row, lane] = sum over k of rows[group, row, k] * columns[group, k, lane], rounded after every addition, in chunks
// whose sums are added likewise. Lanes come in panels of `width`. Addition i of the result element e draws the random word with
// index i + e * (number of additions, made even); e = group * group_step + row * row_step + lane * lane_step.
struct Accumulate {
  const float* rows;     // [groups, num_rows, depth]
  const float* columns;  // [groups, panels, depth, width]
  float* out;            // [groups, num_rows, panels, width]
  int64_t groups, num_rows, panels, depth, chunk;
  int32_t width;         // 16, 32 or 64
  FloatGrid grid;
  int32_t stochastic;
  uint64_t key;
  int64_t group_step, row_step, lane_step;
};

// What kernels that multiply integers know of a product's operands: a / unit are integers from a_min to a_max, b are such from b_min
// to b_max.
struct Integers {
  int32_t dtype;  // of a: bfloat16, int8 or uint8
  float unit;
  int32_t a_min, a_max, b_min, b_max;
};

// A convolution of integers of 8 bits: [num, height, width, in_channels] to [num, out_height, out_width, out_channels]; sums are
// exact. The result is scale * sum, as 16-bit codes of grid (see Half) or in float32.
struct ConvFprop {
  const uint8_t* x;
  const int8_t* w;  // [out_channels, kernel_height, kernel_width, in_channels]
  void* out;
  int32_t halves;
  float scale;
  FloatGrid grid;
  int64_t num, height, width, in_channels, out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width, pad_height, pad_width, stride_height, stride_width;
  Integers of;  // x, signed or unsigned, and w
};

// Gradients of a convolution: [num, height, width, in_channels] to [num, out_height, out_width, out_channels]. x and w are integers
// of 8 bits, g is bfloat16; sums are float32. Kernels that multiply integers take g as `of` says, any channels and any stride;
// others stride 1 and channels in sixteens.
struct ConvWgrad {
  const int8_t* x;
  const void* g;
  float* dw;  // [out_channels, kernel_height, kernel_width, in_channels]
  int64_t num, height, width, in_channels, out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width, pad_height, pad_width, stride_height, stride_width;
  Integers of;  // g and the other
};

struct ConvDgrad {
  const void* g;
  const int8_t* w;  // as dw
  void* out;        // [num, height, width, in_channels], bfloat16 or float32
  int32_t out_dtype;
  int64_t num, height, width, in_channels, out_height, out_width, out_channels;
  int64_t kernel_height, kernel_width, pad_height, pad_width, stride_height, stride_width;
  Integers of;  // g and the other
};

// out = post * round(scale * a b), in float32: a is bfloat16 [rows, depth], or [depth, rows] if `turned`; b is [depth, columns],
// integers of 8 bits; or b16 instead, in bfloat16, for kernels that multiply such numbers, which take those below 2^-126 for zero.
// Masked and summed as by Epilogue: then the columns must come in sixteens.
struct MatMul {
  const uint16_t* a;
  int32_t turned;
  const int8_t* b;
  const uint16_t* b16;    // or null
  int32_t b_turned;       // b16 is [columns, depth]
  float* out;
  int64_t rows, columns, depth;
  float scale;
  int32_t rounds;  // whether grid applies
  FloatGrid grid;
  float post;
  const uint8_t* mask;    // or null
  const uint8_t* packed;  // or null
  int32_t is_signed;
  const uint32_t* panels;  // of b, as pack_panels left them, or null
  int32_t integers;        // a: 8-bit integers [rows, depth], b [columns, depth], and panels are there
  int32_t is_unsigned;     // a, then
  Integers of;             // kernels that multiply integers take a as it says, and need no panels
  double clipped;          // the sum
};

// The products of one instruction set, null where the compiler did not know it. false: not these arguments.
struct Products {
  bool integers_only;  // a and g are integers, as `of` says; otherwise `of` does not count
  bool (*multiply)(MatMul*);
  // For a right matrix that is multiplied several times: its panels, in so many numbers.
  int64_t (*panel_count)(const MatMul*);
  bool (*pack_panels)(const MatMul*, uint32_t* out);
  bool (*conv_fprop)(const ConvFprop*);
  bool (*conv_wgrad)(const ConvWgrad*);
  bool (*conv_dgrad)(const ConvDgrad*);
};

extern const Products avx2_products;
extern const Products avx_vnni_products;
extern const Products avx512_vnni_products;
extern const Products dot_product_products;

// Float32 rows of `size` units, gates [rows, 4 size] in the order i, f, g, o; every array contiguous.
struct LstmForward {
  const float* gates_x;
  const float* gates_h;
  const float* c;
  float* kept;   // the activated gates
  float* h;
  float* new_c;
  int64_t rows, size;
};

struct LstmBackward {
  const float* dh;
  const float* dc;
  const float* gates;  // as kept
  const float* c;
  const float* new_c;
  float* d_gates;
  float* dc_before;
  int64_t rows, size;
};

struct Table {
  float (*clip)(const Clip*);            // returns amax, NaN or infinity as in the data
  float (*log_round)(const LogRound*);
  float (*float_round)(const FloatRound*);
  float (*table_round)(const TableRound*);
  void (*unpack)(const Unpack*);
  double (*epilogue)(const Epilogue*);
  void (*split)(const Split*);
  Moments (*moments)(const void* x, int32_t dtype, int64_t n);
  void (*norm_statistics)(const NormStatistics*);
  float (*norm_apply)(const NormApply*);       // returns max|out|
  float (*norm_backward)(NormBackward*);       // returns max|dy|
  void (*accumulate)(const Accumulate*);
  void (*lstm_forward)(const LstmForward*);
  void (*lstm_backward)(const LstmBackward*);
  float (*round_tiles)(RoundTiles*);           // returns amax
  void (*unpack_tiles)(const UnpackTiles*);
};

void portable_accumulate(const Accumulate*);
void avx2_accumulate(const Accumulate*);
void avx512_accumulate(const Accumulate*);

extern const Table portable_table;
extern const Table avx2_table;
extern const Table avx512_table;

}  // namespace fourbit

// ---- the C ABI ----

// A number for the text of this header without its comments, computed by _build.py.
FOURBIT_API uint64_t fourbit_abi();
FOURBIT_API void fourbit_set_threads(void* parallel, void* thread, void* max_threads, void* num_threads, void* inside);
FOURBIT_API const char* fourbit_isa();
// Use the kernels of another instruction set, while no kernel runs; 0 if this machine or build has none of that name.
FOURBIT_API int32_t fourbit_use_isa(const char* name);
// What the products and convolutions below multiply with the instruction set in use, now: 0 nothing, 1 integers (and bfloat16
// numbers that are multiples of a unit), 2 integers, and bfloat16 by integers.
FOURBIT_API int32_t fourbit_products();
// Whether a call of this thread ran out of memory since the last question; what it returned then means nothing.
FOURBIT_API int32_t fourbit_out_of_memory();

FOURBIT_API float fourbit_clip(const fourbit::Clip*);
FOURBIT_API float fourbit_log_round(const fourbit::LogRound*);
FOURBIT_API float fourbit_float_round(const fourbit::FloatRound*);
FOURBIT_API float fourbit_table_round(const fourbit::TableRound*);
FOURBIT_API void fourbit_unpack(const fourbit::Unpack*);
FOURBIT_API double fourbit_epilogue(const fourbit::Epilogue*);
FOURBIT_API void fourbit_split(const fourbit::Split*);
FOURBIT_API void fourbit_moments(const void* x, int32_t dtype, int64_t n, fourbit::Moments* out);
FOURBIT_API FOURBIT_ALLOCATES void fourbit_norm_statistics(const fourbit::NormStatistics*);
FOURBIT_API FOURBIT_ALLOCATES float fourbit_norm_apply(const fourbit::NormApply*);
FOURBIT_API FOURBIT_ALLOCATES float fourbit_norm_backward(fourbit::NormBackward*);
FOURBIT_API void fourbit_accumulate(const fourbit::Accumulate*);
FOURBIT_API void fourbit_lstm_forward(const fourbit::LstmForward*);
FOURBIT_API void fourbit_lstm_backward(const fourbit::LstmBackward*);
FOURBIT_API FOURBIT_ALLOCATES float fourbit_round_tiles(fourbit::RoundTiles*);
FOURBIT_API void fourbit_unpack_tiles(const fourbit::UnpackTiles*);
// 0: not with the instruction set in use, or not these arguments.
FOURBIT_API FOURBIT_ALLOCATES int32_t fourbit_multiply(fourbit::MatMul*);
FOURBIT_API int64_t fourbit_panel_count(const fourbit::MatMul*);
FOURBIT_API FOURBIT_ALLOCATES int32_t fourbit_pack_panels(const fourbit::MatMul*, uint32_t* out);
FOURBIT_API FOURBIT_ALLOCATES int32_t fourbit_conv_fprop(const fourbit::ConvFprop*);
FOURBIT_API FOURBIT_ALLOCATES int32_t fourbit_conv_wgrad(const fourbit::ConvWgrad*);
FOURBIT_API FOURBIT_ALLOCATES int32_t fourbit_conv_dgrad(const fourbit::ConvDgrad*);
