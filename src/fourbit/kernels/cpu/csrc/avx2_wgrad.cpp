// The gradient of a convolution's weight from small integers, exact: any channels, any stride, all tensors channels_last. The sum
// runs over pixels, which are interleaved for that: those of a step lie side by side. See tiles.h.
#include "common.h"

#if defined(__AVX2__)
#include "tiles.h"

namespace fourbit {
namespace {

constexpr int64_t kNear = 24 << 10;  // bytes of images that are read again and again

// Sums that one thread has of some panels: [panel][output channel][tap][16].
template <typename Sum>
struct Sums {
  int64_t first = 0, last = 0;
  std::vector<Sum> of;
};

struct Wgrad {
  const ConvWgrad& c;
  Way way;
  int64_t terms, steps;           // pixels in a step, steps in a row of g
  int64_t tiles, height, panels;  // of output channels, and how many each has; of input channels
  int64_t x_rows, x_columns;      // of a frame
  int64_t together, groups;       // images that are worked on together
  std::vector<uint8_t> g;         // [image][tile][row][step][kRows]
  std::vector<int64_t> extra;     // what the offset of x puts into the sums of every output channel

  explicit Wgrad(const ConvWgrad& c)
      : c(c), way(way_of(c.of, false)), terms(way.bytes ? 4 : 2), steps(ceil_div(c.out_width, terms)),
        tiles(ceil_div(c.out_channels, kRows)), height(ceil_div(c.out_channels, tiles)),
        panels(ceil_div(c.in_channels, kColumns)), x_rows((c.out_height - 1) * c.stride_height + c.kernel_height),
        x_columns((steps * terms - 1) * c.stride_width + c.kernel_width) {
    tiles = ceil_div(c.out_channels, height);
    const int64_t fitting = least(kNear / x_image(), way.terms / (c.out_height * c.out_width));
    together = least(most_of(fitting, 1), c.num);
    groups = ceil_div(c.num, together);
  }
  int64_t taps() const { return c.kernel_height * c.kernel_width; }
  int64_t panel_sums() const { return c.out_channels * taps() * kColumns; }
  int64_t g_row() const { return steps * kRows * 4; }
  int64_t g_tile() const { return c.out_height * g_row() + 64; }  // so that tiles do not meet in the same places of the cache
  int64_t g_image() const { return tiles * g_tile(); }
  int64_t x_row() const { return x_columns * kStepBytes; }
  int64_t x_image() const { return x_rows * x_row(); }
};

// Tiles of g, the pixels of a step side by side.
template <class Kind>
void pack_g(Wgrad& t) {
  t.g.resize(static_cast<size_t>(t.c.num * t.g_image()));
  parallel_always(t.c.num * t.c.out_height, [](int64_t begin, int64_t end, int, void* p) {
    Wgrad& t = *static_cast<Wgrad*>(p);
    const ConvWgrad& c = t.c;
    const int64_t line = (ceil_div(c.out_channels, kColumns) + 1) * kStepBytes;
    std::vector<uint8_t> lines(static_cast<size_t>(t.steps * line));
    with_numbers(c.g, c.of.dtype, [&](auto* g) {
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t step = 0; step < t.steps; ++step) {
          decltype(g) pixels[Kind::kTerms];
          for (int64_t i = 0; i < Kind::kTerms; ++i) {
            const int64_t x = step * Kind::kTerms + i;
            pixels[i] = x < c.out_width ? g + (row * c.out_width + x) * c.out_channels : nullptr;
          }
          interleave_rows<Kind>(pixels, 1.0f / c.of.unit, c.out_channels, lines.data() + step * line);
        }
        const int64_t image = row / c.out_height, y = row % c.out_height;
        scatter_steps(lines.data(), line, t.steps, t.tiles, t.height, t.g_tile(),
                      t.g.data() + image * t.g_image() + y * t.g_row());
      }
    });
  }, &t);
  t.extra.assign(static_cast<size_t>(t.c.out_channels), 0);
  if (!t.way.right_offset) return;
  for (int64_t co = 0; co < t.c.out_channels; ++co) {
    int64_t sum = 0;
    for (int64_t n = 0; n < t.c.num; ++n) {
      const auto* g = reinterpret_cast<const int8_t*>(t.g.data()) + n * t.g_image() + co / t.height * t.g_tile() +
                      co % t.height * 4;
      for (int64_t at = 0; at < t.c.out_height * t.g_row(); at += kRows * 4)
        for (int i = 0; i < Kind::kTerms; ++i) sum += g[at + i];
    }
    t.extra[static_cast<size_t>(co)] = sum * t.way.right_offset;
  }
}

// Sixteen input channels of one image, in a frame of zeros: for every pixel that begins a step, it and the others of the step.
template <class Kind>
void pack_x(const Wgrad& t, int64_t n, int64_t panel, uint8_t* out) {
  const ConvWgrad& c = t.c;
  const int64_t channel = panel * kColumns, count = c.in_channels - channel;
  for (int64_t row = 0; row < t.x_rows; ++row) {
    const int64_t y = row - c.pad_height;
    const int8_t* from = c.x + ((n * c.height + y) * c.width) * c.in_channels + channel;
    const bool is_met = row % c.stride_height < c.kernel_height;
    for (int64_t column = 0; column < t.x_columns; ++column, out += kStepBytes) {
      if (!is_met || column % (Kind::kTerms * c.stride_width) >= c.kernel_width) continue;
      decltype(as_terms(__m128i{}, 0, Kind{})) terms[Kind::kTerms];
#pragma GCC unroll 4
      for (int i = 0; i < Kind::kTerms; ++i) {
        const int64_t x = column - c.pad_width + i * c.stride_width;
        const bool inside = y >= 0 && y < c.height && x >= 0 && x < c.width;
        terms[i] = as_terms(inside ? sixteen(from + x * c.in_channels, count) : _mm_setzero_si128(), t.way.right_offset, Kind{});
      }
      interleave(terms, out, Kind{});
    }
  }
}

// Adds the sums of `count` images from n on, whose channels of one panel are in x.
template <class Kind, typename Sum>
void add_images(const Wgrad& t, int64_t n, int64_t count, const uint8_t* x, Sum* sums) {
  const ConvWgrad& c = t.c;
  // Rows of g whose sum 32 bits hold, and whose part of x is near.
  const int64_t near = kNear / (c.stride_height * t.x_row());
  const int64_t fitting = most_of(least(least(t.way.terms / c.out_width, near), c.out_height), 1);
  int32_t found[kRows * kColumns];
  Walk walk{t.way.steps, t.steps, kRows * 4, t.terms * c.stride_width * kStepBytes};
  walk.a_run = t.g_row();
  walk.b_run = c.stride_height * t.x_row();
  walk.a_block = t.g_image();
  walk.b_block = t.x_image();
  walk.blocks = count;
  for (int64_t y = 0; y < c.out_height; y += fitting) {
    walk.runs = least(fitting, c.out_height - y);
    for (int64_t tile = 0; tile < t.tiles; ++tile) {
      const int64_t first = tile * t.height, num = least(t.height, c.out_channels - first);
      const uint8_t* g = t.g.data() + n * t.g_image() + tile * t.g_tile() + y * t.g_row();
      const uint8_t* rows[kRows];
      for (int64_t r = 0; r < num; ++r) rows[r] = g + r * 4;
      for (int64_t tap = 0; tap < t.taps(); ++tap) {
        const int64_t ky = tap / c.kernel_width, kx = tap % c.kernel_width;
        sum_tile<Kind>(num, rows, x + (y * c.stride_height + ky) * t.x_row() + kx * kStepBytes, walk, found);
        for (int64_t r = 0; r < num; ++r) {
          Sum* to = sums + ((first + r) * t.taps() + tap) * kColumns;
          for (int i = 0; i < kColumns; ++i) to[i] += found[r * kColumns + i];
        }
      }
    }
  }
}

// The threads share the panels, and the images where there are fewer panels than threads.
template <class Kind, typename Sum>
void wgrad_as(Wgrad& t) {
  pack_g<Kind>(t);
  struct Job { const Wgrad& t; std::vector<Sums<Sum>> sums; } job{t, {}};
  job.sums.resize(kMaxThreads);
  const int pieces = parallel_always(t.panels * t.groups, [](int64_t begin, int64_t end, int thread, void* p) {
    Job& job = *static_cast<Job*>(p);
    const Wgrad& t = job.t;
    Sums<Sum>& sums = job.sums[static_cast<size_t>(thread)];
    sums.first = begin / t.groups;
    sums.last = ceil_div(end, t.groups);
    sums.of.resize(static_cast<size_t>((sums.last - sums.first) * t.panel_sums()));
    std::vector<uint8_t> x(static_cast<size_t>(t.together * t.x_image()));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / t.groups, n = i % t.groups * t.together, count = least(t.together, t.c.num - n);
      for (int64_t image = 0; image < count; ++image) pack_x<Kind>(t, n + image, panel, x.data() + image * t.x_image());
      add_images<Kind>(t, n, count, x.data(), sums.of.data() + (panel - sums.first) * t.panel_sums());
    }
  }, &job);
  job.sums.resize(static_cast<size_t>(pieces));
  // [panel][output channel][tap][16] to [output channel][tap][input channel]
  parallel_always(t.c.out_channels, [](int64_t begin, int64_t end, int, void* p) {
    const Job& job = *static_cast<const Job*>(p);
    const Wgrad& t = job.t;
    for (int64_t panel = 0; panel < t.panels; ++panel)
      for (int64_t co = begin; co < end; ++co)
        for (int64_t tap = 0; tap < t.taps(); ++tap) {
          int64_t total[kColumns] = {};
          for (const Sums<Sum>& sums : job.sums) {
            if (panel < sums.first || panel >= sums.last) continue;
            const Sum* from = sums.of.data() + (((panel - sums.first) * t.c.out_channels + co) * t.taps() + tap) * kColumns;
            for (int i = 0; i < kColumns; ++i) total[i] += from[i];
          }
          const int64_t channel = panel * kColumns;
          float* to = t.c.dw + (co * t.taps() + tap) * t.c.in_channels + channel;
          for (int64_t i = 0; i < kColumns && channel + i < t.c.in_channels; ++i)
            to[i] = static_cast<float>(total[i] - t.extra[static_cast<size_t>(co)]) * t.c.of.unit;
        }
  }, &job);
}

template <class Kind>
void wgrad_as(Wgrad& t) {
  if (t.c.num * t.c.out_height * t.c.out_width <= t.way.terms) wgrad_as<Kind, int32_t>(t);
  else wgrad_as<Kind, int64_t>(t);
}

bool wgrad(const ConvWgrad* c) {
  if (!has_ranges(c->of) || c->num < 1 || c->out_height < 1 || c->out_width < 1 || c->in_channels < 1 || c->out_channels < 1)
    return false;
  Wgrad t(*c);
  if (c->out_width > t.way.terms) return false;
  if (t.way.bytes) wgrad_as<In8<false>>(t);
  else wgrad_as<In16>(t);
  return true;
}

}  // namespace

namespace FOURBIT_ISA {
bool conv_wgrad(const ConvWgrad* c) { return wgrad(c); }
}  // namespace FOURBIT_ISA

}  // namespace fourbit

#endif
