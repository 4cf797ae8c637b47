// Gradients of convolutions where the channels come in sixteens, with stride 1: bfloat16 by integers with float32 sums, which the
// general library does at half speed for the few channels of small images. Needs the dot product of AVX512-BF16.
//
// All tensors are channels_last. A pair is two bfloat16 numbers in 32 bits, as the instruction wants them: of two neighbouring
// pixels for wgrad, which sums over pixels, and of two neighbouring channels for dgrad, which sums over channels.
#include "common.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include <vector>

#include "numbers.h"

namespace fourbit {
namespace {

constexpr int kLanes = 16;  // channels per vector

inline __m512i widen(const uint16_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Sixteen codes as bfloat16, one per 32 bits. Integers of 8 bits are exact.
inline __m512i widen(const int8_t* p) {
  const __m512i n = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(n)), 16);
}

inline __m512bh bits(__m512i x) { return reinterpret_cast<__m512bh&>(x); }

inline __m512bh broadcast(const uint32_t* p) { return bits(_mm512_set1_epi32(static_cast<int32_t>(*p))); }

// Pairs of pixels (x, x + 1) of one row, for x = first, first + step, ..: out[i][c]. Pixels outside the row are zero.
template <typename T>
void pair_pixels(const T* row, int64_t width, int64_t channels, int64_t first, int64_t step, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t x = first + i * step;
    for (int64_t c = 0; c < channels; c += kLanes) {
      const bool left = x >= 0 && x < width, right = x + 1 >= 0 && x + 1 < width;
      const __m512i a = left ? widen(row + x * channels + c) : _mm512_setzero_si512();
      const __m512i b = right ? widen(row + (x + 1) * channels + c) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + i * channels + c, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
    }
  }
}

// Sums of one image for `kN` neighbouring kernel columns and eight input channels: acc[k][c] over 16 output channels.
template <int kN>
inline void accumulate_image(const ConvWgrad& t, const uint32_t* x, const uint32_t* g, int64_t x_row, int64_t g_row, float* dw,
                             int64_t dw_column) {
  __m512 acc[kN][8];
  for (int k = 0; k < kN; ++k)
    for (int c = 0; c < 8; ++c) acc[k][c] = _mm512_loadu_ps(dw + k * dw_column + c * kLanes);
  const int64_t pairs = (t.out_width + 1) / 2;
  for (int64_t y = 0; y < t.out_height; ++y) {
    const uint32_t* xs = x + y * x_row;
    const uint32_t* gs = g + y * g_row;
    for (int64_t p = 0; p < pairs; ++p) {
      const __m512bh v = bits(_mm512_loadu_si512(gs));
#pragma GCC unroll 8
      for (int k = 0; k < kN; ++k)
#pragma GCC unroll 8
        for (int c = 0; c < 8; ++c) acc[k][c] = _mm512_dpbf16_ps(acc[k][c], v, broadcast(xs + k * t.in_channels + c));
      xs += 2 * t.in_channels;
      gs += t.out_channels;
    }
  }
  for (int k = 0; k < kN; ++k)
    for (int c = 0; c < 8; ++c) _mm512_storeu_ps(dw + k * dw_column + c * kLanes, acc[k][c]);
}

// dw[co block][ky][kx][ci][16] of a range of images.
void wgrad_images(const ConvWgrad& t, int64_t begin, int64_t end, float* dw) {
  const int64_t padded_height = t.out_height + t.kernel_height - 1, padded_width = t.out_width + t.kernel_width;
  const int64_t pairs = (t.out_width + 1) / 2;
  const int64_t x_row = padded_width * t.in_channels, g_row = pairs * t.out_channels;
  std::vector<uint32_t> x(static_cast<size_t>(padded_height * x_row)), g(static_cast<size_t>(t.out_height * g_row));
  const int64_t dw_column = t.in_channels * kLanes;
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t y = 0; y < padded_height; ++y) {
      const int64_t row = y - t.pad_height;
      const bool inside = row >= 0 && row < t.height;
      const int8_t* from = t.x + (n * t.height + (inside ? row : 0)) * t.width * t.in_channels;
      pair_pixels(from, inside ? t.width : 0, t.in_channels, -t.pad_width, 1, padded_width, x.data() + y * x_row);
    }
    for (int64_t y = 0; y < t.out_height; ++y)
      pair_pixels(static_cast<const uint16_t*>(t.g) + (n * t.out_height + y) * t.out_width * t.out_channels, t.out_width, t.out_channels, 0, 2, pairs,
                  g.data() + y * g_row);
    float* block = dw;
    for (int64_t co = 0; co < t.out_channels; co += kLanes)
      for (int64_t ky = 0; ky < t.kernel_height; ++ky, block += t.kernel_width * dw_column)
        for (int64_t ci = 0; ci < t.in_channels; ci += 8) {
          int64_t kx = 0;
          auto run = [&](auto columns) {
            constexpr int kN = decltype(columns)::value;
            for (; kx + kN <= t.kernel_width; kx += kN)
              accumulate_image<kN>(t, x.data() + ky * x_row + kx * t.in_channels + ci, g.data() + co, x_row, g_row,
                                   block + kx * dw_column + ci * kLanes, dw_column);
          };
          run(std::integral_constant<int, 3>{});
          run(std::integral_constant<int, 1>{});
        }
  }
}

// ---- dgrad ----

// One tile: kP pixels of a row times kB blocks of 16 input channels.
template <int kP, int kB>
inline void dgrad_tile(const ConvDgrad& t, const uint16_t* g, int64_t g_row, const uint32_t* w, int64_t ci, int64_t out) {
  __m512 acc[kP][kB];
  for (int p = 0; p < kP; ++p)
    for (int b = 0; b < kB; ++b) acc[p][b] = _mm512_setzero_ps();
  for (int64_t ky = 0; ky < t.kernel_height; ++ky)
    for (int64_t kx = 0; kx < t.kernel_width; ++kx) {
      const uint32_t* gs = reinterpret_cast<const uint32_t*>(g + ky * g_row + kx * t.out_channels);
      const uint32_t* ws = w + (ky * t.kernel_width + kx) * (t.out_channels / 2) * t.in_channels + ci;
      for (int64_t co = 0; co < t.out_channels / 2; ++co) {
        __m512bh v[kB];
#pragma GCC unroll 4
        for (int b = 0; b < kB; ++b) v[b] = bits(_mm512_loadu_si512(ws + co * t.in_channels + b * kLanes));
#pragma GCC unroll 16
        for (int p = 0; p < kP; ++p) {
          const __m512bh pair = broadcast(gs + p * (t.out_channels / 2) + co);
#pragma GCC unroll 4
          for (int b = 0; b < kB; ++b) acc[p][b] = _mm512_dpbf16_ps(acc[p][b], v[b], pair);
        }
      }
    }
  for (int p = 0; p < kP; ++p)
    for (int b = 0; b < kB; ++b) {
      const int64_t at = out + p * t.in_channels + b * kLanes;
      if (t.out_dtype == kBFloat16) {
        const __m256bh rounded = _mm512_cvtneps_pbh(acc[p][b]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(t.out) + at),
                            reinterpret_cast<const __m256i&>(rounded));
      } else {
        _mm512_storeu_ps(static_cast<float*>(t.out) + at, acc[p][b]);
      }
    }
}

template <int kB>
void dgrad_row(const ConvDgrad& t, const uint16_t* g, int64_t g_row, const uint32_t* w, int64_t ci, int64_t out) {
  int64_t x = 0;
  constexpr int kWide = kB == 1 ? 16 : 8;
  for (; x + kWide <= t.width; x += kWide)
    dgrad_tile<kWide, kB>(t, g + x * t.out_channels, g_row, w, ci, out + x * t.in_channels);
  for (; x + 4 <= t.width; x += 4) dgrad_tile<4, kB>(t, g + x * t.out_channels, g_row, w, ci, out + x * t.in_channels);
  for (; x < t.width; ++x) dgrad_tile<1, kB>(t, g + x * t.out_channels, g_row, w, ci, out + x * t.in_channels);
}

}  // namespace

bool dot_product_wgrad(const ConvWgrad* t) {
  if (t->stride_height != 1 || t->stride_width != 1) return false;
  const size_t size = static_cast<size_t>(t->out_channels * t->kernel_height * t->kernel_width * t->in_channels);
  struct Task { const ConvWgrad* t; std::vector<std::vector<float>> sums; size_t size; } task{t, {}, size};
  task.sums.resize(kMaxThreads);
  const int pieces = parallel_always(t->num, [](int64_t begin, int64_t end, int thread, void* p) {
    Task& task = *static_cast<Task*>(p);
    auto& sums = task.sums[static_cast<size_t>(thread)];
    sums.assign(task.size, 0.0f);
    wgrad_images(*task.t, begin, end, sums.data());
  }, &task);
  // [co block][ky][kx][ci][16] to [co][ky][kx][ci]
  const int64_t inner = t->kernel_height * t->kernel_width * t->in_channels;
  for (int64_t co = 0; co < t->out_channels; ++co)
    for (int64_t i = 0; i < inner; ++i) {
      const size_t from = static_cast<size_t>((co / kLanes * inner + i) * kLanes + co % kLanes);
      float sum = 0.0f;
      for (int piece = 0; piece < pieces; ++piece)
        if (!task.sums[static_cast<size_t>(piece)].empty()) sum += task.sums[static_cast<size_t>(piece)][from];
      t->dw[co * inner + i] = sum;
    }
  return true;
}

bool dot_product_dgrad(const ConvDgrad* t) {
  if (t->stride_height != 1 || t->stride_width != 1) return false;
  // Weights as pairs of output channels, the kernel turned round: w[ky][kx][co / 2][ci].
  const int64_t kh = t->kernel_height, kw = t->kernel_width, ci = t->in_channels, co = t->out_channels;
  std::vector<uint32_t> w(static_cast<size_t>(kh * kw * co / 2 * ci));
  for (int64_t ky = 0; ky < kh; ++ky)
    for (int64_t kx = 0; kx < kw; ++kx)
      for (int64_t o = 0; o < co; o += 2)
        for (int64_t i = 0; i < ci; ++i) {
          auto half = [&](int64_t channel) {
            const float value = t->w[((channel * kh + (kh - 1 - ky)) * kw + (kw - 1 - kx)) * ci + i];
            uint32_t pattern;
            std::memcpy(&pattern, &value, 4);
            return pattern >> 16;
          };
          w[static_cast<size_t>(((ky * kw + kx) * (co / 2) + o / 2) * ci + i)] = half(o) | (half(o + 1) << 16);
        }
  struct Task { const ConvDgrad* t; const uint32_t* w; } task{t, w.data()};
  parallel_always(t->num, [](int64_t begin, int64_t end, int, void* p) {
    const Task& task = *static_cast<Task*>(p);
    const ConvDgrad& t = *task.t;
    // Row y of the result meets rows y - (kernel_height - 1 - pad) .. of g.
    const int64_t top = t.kernel_height - 1 - t.pad_height, left = t.kernel_width - 1 - t.pad_width;
    const int64_t rows = t.height + t.kernel_height - 1, columns = t.width + t.kernel_width - 1;
    const int64_t g_row = columns * t.out_channels;
    std::vector<uint16_t> g(static_cast<size_t>(rows * g_row));
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t y = 0; y < t.out_height; ++y) {
        if (y + top < 0 || y + top >= rows) continue;
        std::memcpy(g.data() + (y + top) * g_row + left * t.out_channels,
                    static_cast<const uint16_t*>(t.g) + (n * t.out_height + y) * t.out_width * t.out_channels,
                    static_cast<size_t>(t.out_width * t.out_channels) * 2);
      }
      for (int64_t y = 0; y < t.height; ++y) {
        const int64_t out = (n * t.height + y) * t.width * t.in_channels;
        int64_t ci = 0;
        for (; ci + 2 * kLanes <= t.in_channels; ci += 2 * kLanes)
          dgrad_row<2>(t, g.data() + y * g_row, g_row, task.w, ci, out + ci);
        if (ci < t.in_channels) dgrad_row<1>(t, g.data() + y * g_row, g_row, task.w, ci, out + ci);
      }
    }
  }, &task);
  return true;
}

}  // namespace fourbit

#endif
