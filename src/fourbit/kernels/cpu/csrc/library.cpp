// The C ABI: picks the instruction set once, at load time, and runs loops on the caller's OpenMP team.
#include "common.h"

namespace fourbit {
namespace {

// libgomp's (and, for compatibility, LLVM's and Intel's) entry to a parallel region; null: run on the calling thread.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using GetInt = int (*)();
GompParallel gomp_parallel = nullptr;
GetInt get_thread = nullptr, get_max_threads = nullptr, get_num_threads = nullptr, in_parallel = nullptr;

constexpr int64_t kSerialBelow = 1 << 14;  // elements: below, waking the team costs more than it saves

struct Region {
  int64_t n, grain;
  Range range;
  void* task;
  int pieces;
};

void piece(void* p) {
  const Region& r = *static_cast<const Region*>(p);
  const int threads = get_num_threads(), me = get_thread();
  const int64_t blocks = (r.n + r.grain - 1) / r.grain;
  for (int i = me; i < r.pieces; i += threads) {  // a runtime may grant fewer threads than were asked for
    const int64_t begin = blocks * i / r.pieces * r.grain;
    int64_t end = blocks * (i + 1) / r.pieces * r.grain;
    if (end > r.n) end = r.n;
    if (begin < end) r.range(begin, end, i, r.task);
  }
}

const Table* choose() {
#if defined(FOURBIT_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return &avx512_table;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2_table;
#endif
  return &portable_table;
}

const Table* table = choose();

}  // namespace

namespace {

int run(int64_t n, int64_t grain, Range range, void* task, bool alone) {
  int threads = alone || !gomp_parallel || in_parallel() ? 1 : get_max_threads();
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads <= 1) {
    if (n > 0) range(0, n, 0, task);
    return 1;
  }
  Region region{n, grain, range, task, threads};
  gomp_parallel(piece, &region, static_cast<unsigned>(threads), 0);
  return threads;
}

bool has_dot_product() {
#if defined(FOURBIT_X86)
  return table == &avx512_table && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace

int parallel(int64_t n, int64_t grain, Range range, void* task) { return run(n, grain, range, task, n < kSerialBelow); }

int parallel_always(int64_t n, Range range, void* task) { return run(n, 1, range, task, false); }

}  // namespace fourbit

using namespace fourbit;

#define FOURBIT_API extern "C" __attribute__((visibility("default")))

FOURBIT_API int32_t fourbit_abi() { return 8; }

FOURBIT_API void fourbit_set_threads(void* parallel, void* thread, void* max_threads, void* num_threads, void* inside) {
  gomp_parallel = reinterpret_cast<GompParallel>(parallel);
  get_thread = reinterpret_cast<GetInt>(thread);
  get_max_threads = reinterpret_cast<GetInt>(max_threads);
  get_num_threads = reinterpret_cast<GetInt>(num_threads);
  in_parallel = reinterpret_cast<GetInt>(inside);
}

FOURBIT_API const char* fourbit_isa() {
#if defined(FOURBIT_X86)
  if (table == &avx512_table) return "avx512";
  if (table == &avx2_table) return "avx2";
#endif
  return "portable";
}

// For tests: use the kernels of another instruction set; 0 if this machine or build has none of that name.
FOURBIT_API int32_t fourbit_use_isa(const char* name) {
  if (!std::strcmp(name, "portable")) table = &portable_table;
#if defined(FOURBIT_X86)
  else if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2")) table = &avx2_table;
  else if (!std::strcmp(name, "avx512") && __builtin_cpu_supports("avx512bw")) table = &avx512_table;
#endif
  else return 0;
  return 1;
}

FOURBIT_API float fourbit_clip(const Clip* c) { return table->clip(c); }
FOURBIT_API float fourbit_log_round(const LogRound* r) { return table->log_round(r); }
FOURBIT_API float fourbit_float_round(const FloatRound* r) { return table->float_round(r); }
FOURBIT_API float fourbit_table_round(const TableRound* r) { return table->table_round(r); }
FOURBIT_API void fourbit_unpack(const Unpack* u) { table->unpack(u); }
FOURBIT_API double fourbit_epilogue(const Epilogue* e) { return table->epilogue(e); }
FOURBIT_API void fourbit_split(const Split* s) { table->split(s); }
FOURBIT_API int32_t fourbit_multiply(MatMul* t) { return has_dot_product() && multiply(t); }
FOURBIT_API int64_t fourbit_panel_count(const MatMul* t) { return has_dot_product() ? panel_count(t) : 0; }
FOURBIT_API void fourbit_pack_panels(const MatMul* t, uint32_t* out) { pack_panels(t, out); }
FOURBIT_API int32_t fourbit_conv_fprop(const ConvFprop* t) { return has_dot_product() && conv_fprop(t); }
FOURBIT_API int32_t fourbit_conv_wgrad(const ConvWgrad* t) { return has_dot_product() && conv_wgrad(t); }
FOURBIT_API int32_t fourbit_conv_dgrad(const ConvDgrad* t) { return has_dot_product() && conv_dgrad(t); }
FOURBIT_API void fourbit_norm_statistics(const NormStatistics* s) { table->norm_statistics(s); }
FOURBIT_API float fourbit_norm_apply(const NormApply* a) { return table->norm_apply(a); }
FOURBIT_API float fourbit_norm_backward(NormBackward* b) { return table->norm_backward(b); }
FOURBIT_API void fourbit_moments(const void* x, int32_t dtype, int64_t n, Moments* out) { *out = table->moments(x, dtype, n); }
FOURBIT_API void fourbit_accumulate(const Accumulate* a) { table->accumulate(a); }
FOURBIT_API void fourbit_lstm_forward(const LstmForward* t) { table->lstm_forward(t); }
FOURBIT_API void fourbit_lstm_backward(const LstmBackward* t) { table->lstm_backward(t); }
