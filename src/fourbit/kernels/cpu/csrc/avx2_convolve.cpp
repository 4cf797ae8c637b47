// Convolutions of small integers forward, and the gradients of their inputs, exact: any channels, any stride, all tensors
// channels_last. See tiles.h.
//
// Nothing is unrolled into matrices. The images lie in frames of zeros, where a row of the kernel meets one contiguous run of
// channels: the rows of a tile are pixels of the result. With a stride, the gradient is one such product for every residue of the
// pixel's coordinates, with the part of the kernel that meets it.
#include "common.h"

#if defined(__AVX2__)
#include "tiles.h"

namespace fourbit {
namespace {

constexpr int64_t kCache = 96 << 10;  // bytes of images that are worked on together

// The pixels of the result with coordinates (step_y i + y, step_x j + x), and the part of the kernel that they meet.
struct Part {
  int64_t y, x, rows, columns;        // pixels of an image
  int64_t taps_y, taps_x;             // of the kernel
  int64_t first_y, first_x;           // in the frame: of the first pixel
  int64_t steps;                      // of a row of taps
  std::vector<uint8_t> panels;        // [panel][taps_y][steps], then the sums of the columns
  std::vector<int64_t> from, to;      // of every pixel of a group of images: bytes of the frame, pixels of the result
  int64_t panel_bytes() const { return (taps_y * steps + 1) * kStepBytes; }
};

struct Correlation {
  // of what is read, and its frame
  const void* x;
  Integers of;
  Way way;
  int64_t num, height, width, channels;
  int64_t frame_rows, frame_columns, top, left;
  int64_t move;  // pixels of the frame from one pixel of the result to the next (of a part)
  // of the result
  int64_t out_height, out_width, out_channels, step_y, step_x, move_y;
  std::vector<Part> parts;
  void* out;
  bool halves;
  float scale;
  FloatGrid grid;
  int64_t number_bytes, together;

  int64_t pixel_bytes() const { return channels * number_bytes; }
  int64_t row_bytes() const { return frame_columns * pixel_bytes(); }
  int64_t frame_bytes() const { return frame_rows * row_bytes(); }
  int64_t panels() const { return ceil_div(out_channels, kColumns); }
};

void place_pixels(const Correlation& t, Part& part) {
  for (int64_t n = 0; n < t.together; ++n)
    for (int64_t i = 0; i < part.rows; ++i)
      for (int64_t j = 0; j < part.columns; ++j) {
        part.from.push_back(n * t.frame_bytes() + (part.first_y + i * t.move_y) * t.row_bytes() +
                            (part.first_x + j * t.move) * t.pixel_bytes());
        part.to.push_back((n * t.out_height + part.y + i * t.step_y) * t.out_width + part.x + j * t.step_x);
      }
}

// Images n .. n + count into frames whose borders are there already.
template <typename Number>
void fill_frames(const Correlation& t, int64_t n, int64_t count, uint8_t* frames) {
  const int64_t rows = least(t.height, t.frame_rows - t.top);
  const int64_t columns = most_of(least(t.width, t.frame_columns - t.left), 0);
  with_numbers(t.x, t.of.dtype, [&](auto* x) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t y = 0; y < rows; ++y) {
        uint8_t* to = frames + i * t.frame_bytes() + (y + t.top) * t.row_bytes() + t.left * t.pixel_bytes();
        convert_row(x + ((n + i) * t.height + y) * t.width * t.channels, 1.0f / t.of.unit, t.way.left_offset,
                    columns * t.channels, reinterpret_cast<Number*>(to));
      }
  });
}

FOURBIT_INLINE void finish_pixel(const Correlation& t, const Half& h, const int32_t* sums, const int32_t* extra, int64_t pixel,
                                 int64_t channel) {
  const __m256 unit = _mm256_set1_ps(t.of.unit), scale = _mm256_set1_ps(t.scale);
  const __m256 low = _mm256_mul_ps(_mm256_mul_ps(as_floats(sums, extra), unit), scale);
  const __m256 high = _mm256_mul_ps(_mm256_mul_ps(as_floats(sums + 8, extra + 8), unit), scale);
  const int64_t at = pixel * t.out_channels + channel, count = t.out_channels - channel;
  if (!t.halves) return store_floats(low, high, count, static_cast<float*>(t.out) + at);
  auto* out = static_cast<uint16_t*>(t.out) + at;
  const __m256i codes = halves_of(low, high, h);
  if (count >= kColumns) return store_vector(out, codes);
  uint16_t some[kColumns];
  store_vector(some, codes);
  std::memcpy(out, some, static_cast<size_t>(count) * 2);
}

// Pixels first .. last of a part, of the group of images that begins with image n.
template <class Kind>
void correlate_part(const Correlation& t, const Part& part, const Half& h, const uint8_t* frames, int64_t n, int64_t first,
                    int64_t last) {
  Walk walk{t.way.steps, part.steps, 4, kStepBytes};
  walk.runs = part.taps_y;
  walk.a_run = t.row_bytes();
  walk.b_run = part.steps * kStepBytes;
  const int64_t base = n * t.out_height * t.out_width;
  int32_t sums[kRows * kColumns];
  for (int64_t panel = 0; panel < t.panels(); ++panel) {
    const uint8_t* right = part.panels.data() + panel * part.panel_bytes();
    int32_t extra[kColumns];
    std::memcpy(extra, right + part.taps_y * part.steps * kStepBytes, sizeof extra);
    for (int64_t pixel = first; pixel < last; pixel += kRows) {
      const int64_t count = least(last - pixel, kRows);
      const uint8_t* rows[kRows];
      for (int64_t r = 0; r < count; ++r) rows[r] = frames + part.from[static_cast<size_t>(pixel + r)];
      sum_tile<Kind>(count, rows, right, walk, sums);
      for (int64_t r = 0; r < count; ++r)
        finish_pixel(t, h, sums + r * kColumns, extra, base + part.to[static_cast<size_t>(pixel + r)], panel * kColumns);
    }
  }
}

// Pixels of a part in the first `row` rows of a group of images.
int64_t pixels_before(const Correlation& t, const Part& part, int64_t row) {
  const int64_t image = row / t.out_height, y = row % t.out_height;
  const int64_t rows = y <= part.y ? 0 : least(ceil_div(y - part.y, t.step_y), part.rows);
  return (image * part.rows + rows) * part.columns;
}

template <class Kind>
void correlate(Correlation& t) {
  t.number_bytes = static_cast<int64_t>(sizeof(typename Kind::Number));
  t.together = least(most_of(kCache / most_of(t.frame_bytes(), 1), 1), t.num);
  for (Part& part : t.parts) place_pixels(t, part);
  // The threads share the rows of all results.
  parallel_always(t.num * t.out_height, [](int64_t begin, int64_t end, int, void* p) {
    using Number = typename Kind::Number;
    const Correlation& t = *static_cast<const Correlation*>(p);
    const Half h(t.grid);
    // A step that begins with the last channels of a frame goes beyond them.
    std::vector<Number> frames(static_cast<size_t>(t.together * t.frame_bytes() / t.number_bytes + 16),
                               static_cast<Number>(t.way.left_offset));
    auto* bytes = reinterpret_cast<uint8_t*>(frames.data());
    for (int64_t n = begin / t.out_height; n * t.out_height < end; n += t.together) {
      const int64_t count = least(t.together, ceil_div(end, t.out_height) - n), row = n * t.out_height;
      fill_frames<Number>(t, n, count, bytes);
      for (const Part& part : t.parts)
        correlate_part<Kind>(t, part, h, bytes, n, pixels_before(t, part, most_of(begin - row, 0)),
                             pixels_before(t, part, least(end - row, count * t.out_height)));
    }
  }, &t);
}

// The panels of a part: pack(tap, channel, count, depth, out, sums) makes those steps of a panel that belong to one row of taps.
template <class Kind, class Pack>
void pack_part(const Correlation& t, Part& part, int64_t channels, Pack pack) {
  const int64_t depth = part.taps_x * channels;
  part.steps = ceil_div(depth, Kind::kTerms);
  part.panels.resize(static_cast<size_t>(t.panels() * part.panel_bytes()));
  struct Job { const Correlation* t; Part* part; int64_t depth; Pack* pack; } job{&t, &part, depth, &pack};
  parallel_always(t.panels(), [](int64_t begin, int64_t end, int, void* p) {
    const Job& job = *static_cast<Job*>(p);
    for (int64_t panel = begin; panel < end; ++panel) {
      uint8_t* out = job.part->panels.data() + panel * job.part->panel_bytes();
      int32_t sums[kColumns] = {};
      int32_t* wanted = job.t->way.left_offset ? sums : nullptr;
      const int64_t channel = panel * kColumns, count = job.t->out_channels - channel;
      for (int64_t tap = 0; tap < job.part->taps_y; ++tap, out += job.part->steps * kStepBytes)
        (*job.pack)(tap, channel, count, job.depth, out, wanted);
      for (int32_t& sum : sums) sum *= job.t->way.left_offset;
      std::memcpy(out, sums, sizeof sums);
    }
  }, &job);
}

template <class Kind>
bool fprop_as(const ConvFprop& c, Correlation& t) {
  Part part{};
  part.rows = c.out_height;
  part.columns = c.out_width;
  part.taps_y = c.kernel_height;
  part.taps_x = c.kernel_width;
  const int64_t run = c.kernel_width * c.in_channels, all = c.kernel_height * run;
  pack_part<Kind>(t, part, c.in_channels, [&](int64_t tap, int64_t channel, int64_t count, int64_t depth, uint8_t* out, int32_t* sums) {
    pack_columns<Kind>(c.w + channel * all + tap * run, all, depth, count, out, sums);
  });
  t.parts.push_back(std::move(part));
  correlate<Kind>(t);
  return true;
}

bool fprop(const ConvFprop* c) {
  Correlation t{};
  t.x = c->x;
  t.of = c->of;
  if (!has_ranges(t.of) || c->out_height < 1 || c->out_width < 1) return false;
  t.way = way_of(t.of, true);
  if (c->kernel_height * c->kernel_width * c->in_channels > t.way.terms) return false;
  t.num = c->num;
  t.height = c->height;
  t.width = c->width;
  t.channels = c->in_channels;
  t.frame_rows = (c->out_height - 1) * c->stride_height + c->kernel_height;
  t.frame_columns = (c->out_width - 1) * c->stride_width + c->kernel_width;
  t.top = c->pad_height;
  t.left = c->pad_width;
  t.move_y = c->stride_height;
  t.move = c->stride_width;
  t.out_height = c->out_height;
  t.out_width = c->out_width;
  t.out_channels = c->out_channels;
  t.step_y = t.step_x = 1;
  t.out = c->out;
  t.halves = c->halves != 0;
  t.scale = c->scale;
  t.grid = c->grid;
  return t.way.bytes ? fprop_as<In8<true>>(*c, t) : fprop_as<In16>(*c, t);
}

// One coordinate of the gradient of x: pixels residue, residue + stride, .. meet the taps last, last - stride, .. 0 or more, the first
// of them at pixel `first` of g (of which there may be less than 0).
struct Residue {
  int64_t pixels, taps, last, first;
  Residue(int64_t residue, int64_t size, int64_t kernel, int64_t pad, int64_t stride)
      : pixels(size > residue ? ceil_div(size - residue, stride) : 0), taps(0), last(-1), first(0) {
    for (int64_t tap = (residue + pad) % stride; tap < kernel; tap += stride, ++taps) last = tap;
    if (taps) first = (residue + pad - last) / stride;  // a multiple
  }
};

template <class Kind>
bool dgrad_as(const ConvDgrad& c, Correlation& t) {
  const int64_t ci = c.in_channels, co = c.out_channels;
  for (int64_t y = 0; y < c.stride_height; ++y)
    for (int64_t x = 0; x < c.stride_width; ++x) {
      const Residue down(y, c.height, c.kernel_height, c.pad_height, c.stride_height);
      const Residue across(x, c.width, c.kernel_width, c.pad_width, c.stride_width);
      if (!down.pixels || !across.pixels) continue;
      Part part{};
      part.y = y;
      part.x = x;
      part.rows = down.pixels;
      part.columns = across.pixels;
      part.taps_y = across.taps ? down.taps : 0;
      part.taps_x = across.taps;
      part.first_y = part.taps_y ? down.first + t.top : 0;
      part.first_x = part.taps_y ? across.first + t.left : 0;
      pack_part<Kind>(t, part, co, [&](int64_t tap, int64_t channel, int64_t count, int64_t depth, uint8_t* out, int32_t* sums) {
        const int64_t ky = down.last - tap * c.stride_height;
        auto row = [&](int64_t k) {
          const int64_t kx = across.last - k / co * c.stride_width;
          return c.w + ((k % co * c.kernel_height + ky) * c.kernel_width + kx) * ci + channel;
        };
        pack_panel<Kind>(row, depth, count, 0, out, sums);
      });
      t.parts.push_back(std::move(part));
    }
  correlate<Kind>(t);
  return true;
}

// How far before the first pixel of g a kernel begins.
int64_t before(int64_t kernel, int64_t pad, int64_t stride) { return ceil_div(most_of(kernel - 1 - pad, 0), stride); }

bool dgrad(const ConvDgrad* c) {
  Correlation t{};
  t.x = c->g;
  t.of = c->of;
  if (!has_ranges(t.of) || c->out_dtype != kFloat32 || c->out_height < 1 || c->out_width < 1) return false;
  t.way = way_of(t.of, true);
  if (c->kernel_height * c->kernel_width * c->out_channels > t.way.terms) return false;
  t.num = c->num;
  t.height = c->out_height;
  t.width = c->out_width;
  t.channels = c->out_channels;
  t.top = before(c->kernel_height, c->pad_height, c->stride_height);
  t.left = before(c->kernel_width, c->pad_width, c->stride_width);
  t.frame_rows = t.top + (c->height - 1 + c->pad_height) / c->stride_height + 1;
  t.frame_columns = t.left + (c->width - 1 + c->pad_width) / c->stride_width + 1;
  t.move_y = t.move = 1;
  t.out_height = c->height;
  t.out_width = c->width;
  t.out_channels = c->in_channels;
  t.step_y = c->stride_height;
  t.step_x = c->stride_width;
  t.out = c->out;
  t.scale = 1.0f;
  return t.way.bytes ? dgrad_as<In8<true>>(*c, t) : dgrad_as<In16>(*c, t);
}

}  // namespace

namespace FOURBIT_ISA {
bool conv_fprop(const ConvFprop* c) { return fprop(c); }
bool conv_dgrad(const ConvDgrad* c) { return dgrad(c); }
}  // namespace FOURBIT_ISA

}  // namespace fourbit

#endif
