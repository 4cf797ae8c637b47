// The C ABI: picks the instruction set once, at load time, runs loops on the caller's OpenMP team, and lets no exception out.
#include <atomic>
#include <new>
#if defined(FOURBIT_X86)
#include <cpuid.h>
#endif

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
  std::atomic<bool> failed;  // of memory, in one of the threads: an exception must not leave the region
};

void piece(void* p) {
  Region& r = *static_cast<Region*>(p);
  const int threads = get_num_threads(), me = get_thread();
  const int64_t blocks = (r.n + r.grain - 1) / r.grain;
  for (int i = me; i < r.pieces; i += threads) {  // a runtime may grant fewer threads than were asked for
    const int64_t begin = blocks * i / r.pieces * r.grain;
    int64_t end = blocks * (i + 1) / r.pieces * r.grain;
    if (end > r.n) end = r.n;
    if (begin >= end) continue;
    try {
      r.range(begin, end, i, r.task);
    } catch (...) {
      r.failed = true;
    }
  }
}

// What the sources are compiled for (_build.py): each table needs every feature of its flags.
#if defined(FOURBIT_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Asked for by number: older compilers do not know the name.
bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kAvxVnni = 1u << 4;  // of eax, leaf 7, subleaf 1
  return avx_vnni_products.multiply && has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni);
}

bool has_avx512_vnni() {
  return avx512_vnni_products.multiply && has_avx512() && __builtin_cpu_supports("avx512vnni");
}

bool has_dot_product() {
  return dot_product_products.multiply && has_avx512_vnni() && __builtin_cpu_supports("avx512bf16");
}
#endif

bool has_portable() { return true; }

const Products no_products = {};

// From the plainest to the widest; each processor that has one has those before it, except that few have avx_vnni.
struct Isa {
  const char* name;
  const Table* table;
  const Products* products;
  bool (*is_there)();
};

constexpr Isa isas[] = {
    {"portable", &portable_table, &no_products, has_portable},
#if defined(FOURBIT_X86)
    {"avx2", &avx2_table, &avx2_products, has_avx2},
    {"avx_vnni", &avx2_table, &avx_vnni_products, has_avx_vnni},
    {"avx512", &avx512_table, &no_products, has_avx512},
    {"avx512_vnni", &avx512_table, &avx512_vnni_products, has_avx512_vnni},
    {"dot_product", &avx512_table, &dot_product_products, has_dot_product},
#endif
};

// The widest, if that is the fastest: Intel's processors multiply bfloat16 no faster than float32, so that what is rounded to
// it, or split into two int8 numbers, is faster there than products of bfloat16 by integers.
const Isa* fastest() {
  bool slow_bfloat16 = false;
#if defined(FOURBIT_X86)
  __builtin_cpu_init();
  slow_bfloat16 = __builtin_cpu_is("intel");
#endif
  const Isa* found = isas;
  for (const Isa& one : isas) {
    const bool pays = one.products->integers_only || !one.products->multiply || !slow_bfloat16;
    if (one.is_there() && pays) found = &one;
  }
  return found;
}

const Isa* isa = fastest();  // in use
const Table* table = isa->table;
thread_local bool out_of_memory = false;

// What `call` returns; 0 where it ran out of memory, which is noted. The kernels throw nothing else (std::vector).
template <typename F>
auto guarded(F call) noexcept -> decltype(call()) {
  try {
    return call();
  } catch (...) {
    out_of_memory = true;
    return decltype(call())();
  }
}

}  // namespace

namespace {

int run(int64_t n, int64_t grain, Range range, void* task, bool alone) {
  int threads = alone || !gomp_parallel || in_parallel() ? 1 : get_max_threads();
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads <= 1) {
    if (n > 0) range(0, n, 0, task);
    return 1;
  }
  Region region{n, grain, range, task, threads, {false}};
  gomp_parallel(piece, &region, static_cast<unsigned>(threads), 0);
  if (region.failed) throw std::bad_alloc();
  return threads;
}

}  // namespace

int parallel(int64_t n, int64_t grain, Range range, void* task) { return run(n, grain, range, task, n < kSerialBelow); }

int parallel_always(int64_t n, Range range, void* task) { return run(n, 1, range, task, false); }

}  // namespace fourbit

using namespace fourbit;

FOURBIT_API uint64_t fourbit_abi() { return FOURBIT_ABI; }

FOURBIT_API void fourbit_set_threads(void* parallel, void* thread, void* max_threads, void* num_threads, void* inside) {
  gomp_parallel = reinterpret_cast<GompParallel>(parallel);
  get_thread = reinterpret_cast<GetInt>(thread);
  get_max_threads = reinterpret_cast<GetInt>(max_threads);
  get_num_threads = reinterpret_cast<GetInt>(num_threads);
  in_parallel = reinterpret_cast<GetInt>(inside);
}

FOURBIT_API const char* fourbit_isa() { return isa->name; }

FOURBIT_API int32_t fourbit_use_isa(const char* name) {
  for (const Isa& one : isas) {
    if (std::strcmp(name, one.name) || !one.is_there()) continue;
    isa = &one;
    table = one.table;
    return 1;
  }
  return 0;
}

FOURBIT_API int32_t fourbit_products() {
  if (!isa->products->multiply) return 0;
  return isa->products->integers_only ? 1 : 2;
}

FOURBIT_API int32_t fourbit_out_of_memory() {
  const bool found = out_of_memory;
  out_of_memory = false;
  return found;
}

#define FOURBIT_GUARDED(result, name, argument, body) \
  FOURBIT_API result fourbit_##name(argument t) { return guarded([&]() -> result { return body; }); }

FOURBIT_GUARDED(float, clip, const Clip*, table->clip(t))
FOURBIT_GUARDED(float, log_round, const LogRound*, table->log_round(t))
FOURBIT_GUARDED(float, float_round, const FloatRound*, table->float_round(t))
FOURBIT_GUARDED(float, table_round, const TableRound*, table->table_round(t))
FOURBIT_GUARDED(void, unpack, const Unpack*, table->unpack(t))
FOURBIT_GUARDED(double, epilogue, const Epilogue*, table->epilogue(t))
FOURBIT_GUARDED(void, split, const Split*, table->split(t))
FOURBIT_GUARDED(void, norm_statistics, const NormStatistics*, table->norm_statistics(t))
FOURBIT_GUARDED(float, norm_apply, const NormApply*, table->norm_apply(t))
FOURBIT_GUARDED(float, norm_backward, NormBackward*, table->norm_backward(t))
FOURBIT_GUARDED(void, accumulate, const Accumulate*, table->accumulate(t))
FOURBIT_GUARDED(void, lstm_forward, const LstmForward*, table->lstm_forward(t))
FOURBIT_GUARDED(void, lstm_backward, const LstmBackward*, table->lstm_backward(t))
FOURBIT_GUARDED(float, round_tiles, RoundTiles*, table->round_tiles(t))
FOURBIT_GUARDED(void, unpack_tiles, const UnpackTiles*, table->unpack_tiles(t))
#define FOURBIT_PRODUCT(result, name, argument) \
  FOURBIT_GUARDED(result, name, argument, isa->products->name ? isa->products->name(t) : 0)
FOURBIT_PRODUCT(int32_t, multiply, MatMul*)
FOURBIT_PRODUCT(int64_t, panel_count, const MatMul*)
FOURBIT_PRODUCT(int32_t, conv_fprop, const ConvFprop*)
FOURBIT_PRODUCT(int32_t, conv_wgrad, const ConvWgrad*)
FOURBIT_PRODUCT(int32_t, conv_dgrad, const ConvDgrad*)

FOURBIT_API int32_t fourbit_pack_panels(const MatMul* t, uint32_t* out) {
  return guarded([&]() -> int32_t { return isa->products->pack_panels && isa->products->pack_panels(t, out); });
}

FOURBIT_API void fourbit_moments(const void* x, int32_t dtype, int64_t n, Moments* out) {
  guarded([&] { *out = table->moments(x, dtype, n); });
}
