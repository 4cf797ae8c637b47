// What an LSTM does between its products, in one pass over the gates: compiled once per instruction set. Loops are written so
// that compilers vectorize them; exp and tanh have a relative error of a few units in the last place.
#include "common.h"
#include "numbers.h"

namespace fourbit {
namespace FOURBIT_ISA {
namespace {

// exp(x) for |x| <= 87, clamped there; NaN stays NaN.
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it becomes an integer, in its lowest bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000u + 127u) << 23;  // a NaN makes any power of two of it, and p is NaN
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

inline float tanh_of(float x) {
  const float s = x * x;
  const float small = x + x * s * (-1.0f / 3.0f + s * (2.0f / 15.0f + s * (-17.0f / 315.0f + s * (62.0f / 2835.0f))));
  const float large = 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f);
  return s < 0.0625f ? small : large;
}

// One row: c' = f c + i g, h = o tanh(c').
void finish_row(const float* __restrict kept, const float* __restrict c, float* __restrict h, float* __restrict cell,
                int64_t size) {
  const float *i = kept, *f = kept + size, *g = kept + 2 * size, *o = kept + 3 * size;
  for (int64_t j = 0; j < size; ++j) {
    const float value = f[j] * c[j] + i[j] * g[j];
    cell[j] = value;
    h[j] = o[j] * tanh_of(value);
  }
}

// The gradient of the gates may take the place of the gates themselves: all four are read before one is written.
void backward_row(const float* gates, const float* __restrict dh, const float* __restrict dc, const float* __restrict c,
                  const float* __restrict cell, float* d_gates, float* __restrict before, int64_t size) {
#pragma GCC ivdep
  for (int64_t j = 0; j < size; ++j) {
    const float i = gates[j], f = gates[j + size], g = gates[j + 2 * size], o = gates[j + 3 * size];
    const float s = tanh_of(cell[j]);
    const float inner = dc[j] + dh[j] * o * (1.0f - s * s);
    d_gates[j] = inner * g * i * (1.0f - i);
    d_gates[j + size] = inner * c[j] * f * (1.0f - f);
    d_gates[j + 2 * size] = inner * i * (1.0f - g * g);
    d_gates[j + 3 * size] = dh[j] * s * o * (1.0f - o);
    before[j] = inner * f;
  }
}

}  // namespace

void lstm_forward(const LstmForward* task) {
  parallel(task->rows, 8, [](int64_t begin, int64_t end, int, void* p) {
    const LstmForward& t = *static_cast<const LstmForward*>(p);
    const int64_t size = t.size;
    for (int64_t row = begin; row < end; ++row) {
      const float* x = t.gates_x + row * 4 * size;
      const float* u = t.gates_h + row * 4 * size;
      const float* c = t.c + row * size;
      float* kept = t.kept + row * 4 * size;
      float* h = t.h + row * size;
      float* cell = t.new_c + row * size;
      for (int64_t j = 0; j < 2 * size; ++j) kept[j] = sigmoid_of(x[j] + u[j]);
      for (int64_t j = 2 * size; j < 3 * size; ++j) kept[j] = tanh_of(x[j] + u[j]);
      for (int64_t j = 3 * size; j < 4 * size; ++j) kept[j] = sigmoid_of(x[j] + u[j]);
      finish_row(kept, c, h, cell, size);
    }
  }, const_cast<LstmForward*>(task));
}

void lstm_backward(const LstmBackward* task) {
  parallel(task->rows, 8, [](int64_t begin, int64_t end, int, void* p) {
    const LstmBackward& t = *static_cast<const LstmBackward*>(p);
    const int64_t size = t.size;
    for (int64_t row = begin; row < end; ++row) {
      backward_row(t.gates + row * 4 * size, t.dh + row * size, t.dc + row * size, t.c + row * size, t.new_c + row * size,
                   t.d_gates + row * 4 * size, t.dc_before + row * size, size);
    }
  }, const_cast<LstmBackward*>(task));
}

}  // namespace FOURBIT_ISA
}  // namespace fourbit
