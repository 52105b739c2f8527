// What panel_linear does in a package of AOTInductor: pasted into the code that Inductor writes, in namespace scope.
//
// A panel is eight outputs side by side, so that each of the eight lanes of a vector is one output's sum:
//
//   int8   [panels, in / 4, 8 outputs, 4 inputs]     signed
//   int4   [panels, in / 8, 8 outputs, 4 inputs]     input k + t in the low half, k + 4 + t in the high, each plus 8
//   scale  [panels, groups or 1, 8], zero_point the same, signed, as int8
//
// Values are rounded to 8 bits block by block, the largest of a block being 127, where `rounds` says so; otherwise integers
// become float32.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// Inductor compiles the code that it stands in with few optimizations; loops over lanes and rows must be unrolled.
#pragma GCC push_options
#pragma GCC optimize("O3")
// What is called in a loop: even so gcc would not inline it of itself.
#define CALQUE_INLINE __attribute__((always_inline)) inline

namespace calque {

struct Product {
  const float* x;
  const uint8_t* q;
  const float* scale;
  const int8_t* zero;
  const float* bias;
  float* out;
  int64_t rows, in, outputs, bits, block, blocks, groups;
  const int8_t* rounded;  // [rows, in]
  const float* steps;     // [rows, blocks]
  const int32_t* sums;    // [rows, blocks]
  CALQUE_INLINE int64_t panel_bytes() const { return in * bits; }
  CALQUE_INLINE int64_t group(int64_t at) const { return groups == 1 ? 0 : at; }
};

// Rounds a row to 8 bits, to the nearest and to even: a block that holds something not finite gives NaN.
inline void round_row(const float* x, int64_t blocks, int64_t block, int8_t* rounded, float* steps, int32_t* sums) {
  for (int64_t b = 0; b < blocks; ++b, x += block, rounded += block) {
    float largest = 0, odd = 0;
    for (int64_t k = 0; k < block; ++k) {
      largest = std::fmax(largest, std::fabs(x[k]));
      odd += x[k] - x[k];
    }
    float step = largest / 127;
    int32_t sum = 0;
    for (int64_t k = 0; k < block; ++k) {
      rounded[k] = step > 0 && odd == 0 ? static_cast<int8_t>(std::nearbyint(x[k] / step)) : 0;
      sum += rounded[k];
    }
    steps[b] = odd == 0 ? step : NAN;
    sums[b] = sum;
  }
}

inline void store(const Product& p, int64_t panel, int64_t row, const float* lanes) {
  int64_t first = panel * 8, count = p.outputs - first < 8 ? p.outputs - first : 8;
  float* out = p.out + row * p.outputs + first;
  for (int64_t n = 0; n < count; ++n) out[n] = lanes[n] + (p.bias ? p.bias[first + n] : 0.0f);
}

// The integer of one output and input, as it is signed.
inline int integer(const Product& p, const uint8_t* q, int64_t n, int64_t k) {
  if (p.bits == 8) return static_cast<int8_t>(q[k / 4 * 32 + n * 4 + k % 4]);
  uint8_t byte = q[k / 8 * 32 + n * 4 + k % 4];
  return (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
}

// For processors that have no body of their own.
inline void plain_panel(const Product& p, int64_t panel) {
  const uint8_t* q = p.q + panel * p.panel_bytes();
  for (int64_t row = 0; row < p.rows; ++row) {
    float lanes[8] = {};
    for (int64_t b = 0; b < p.blocks; ++b) {
      int64_t at = (panel * p.groups + p.group(b)) * 8, from = b * p.block;
      for (int64_t n = 0; n < 8; ++n) {
        int zero = p.zero ? p.zero[at + n] : 0;
        int32_t whole = 0;
        float sum = 0;
        for (int64_t k = from; k < from + p.block; ++k) {
          int weight = integer(p, q, n, k) - zero;
          if (p.rounded) whole += weight * p.rounded[row * p.in + k];
          else sum += weight * p.x[row * p.in + k];
        }
        lanes[n] += (p.rounded ? whole * p.steps[row * p.blocks + b] : sum) * p.scale[at + n];
      }
    }
    store(p, panel, row, lanes);
  }
}

inline void plain_panels(const Product& p, int64_t panel, int64_t end) {
  for (; panel < end; ++panel) plain_panel(p, panel);
}

}  // namespace calque

#if defined(__x86_64__)
#include "_aotinductor_panels_x86.cpp"
#endif

namespace calque {

// Multiplies panels from one up to another, of which there are at most two.
using PanelFunction = void (*)(const Product&, int64_t, int64_t);

inline PanelFunction panel_function(const Product& p) {
#if defined(__x86_64__)
  if (has_avx2()) {
    if (!p.rounded) return p.bits == 4 ? exact_panels<4> : exact_panels<8>;
    if (!has_vnni()) return p.bits == 4 ? rounded_panels<4> : rounded_panels<8>;
    if (p.zero) return p.bits == 4 ? wide_panels<4, true> : wide_panels<8, true>;
    return p.bits == 4 ? wide_panels<4, false> : wide_panels<8, false>;
  }
#endif
  return plain_panels;
}

inline void multiply(Product p, bool rounds) {
  static thread_local std::vector<int8_t> rounded;
  static thread_local std::vector<float> steps;
  static thread_local std::vector<int32_t> sums;
  if (rounds) {
    rounded.resize(p.rows * p.in);
    steps.resize(p.rows * p.blocks);
    sums.resize(p.rows * p.blocks);
    auto round = round_row;
#if defined(__x86_64__)
    if (has_avx2()) round = round_row_avx2;
#endif
    for (int64_t row = 0; row < p.rows; ++row) {
      round(p.x + row * p.in, p.blocks, p.block, rounded.data() + row * p.in, steps.data() + row * p.blocks, sums.data() + row * p.blocks);
    }
    p.rounded = rounded.data();
    p.steps = steps.data();
    p.sums = sums.data();
  }
  const PanelFunction some = panel_function(p);
  const int64_t panels = (p.outputs + 7) / 8;
#pragma omp parallel for if (p.rows * p.in * p.outputs > 200000)
  for (int64_t panel = 0; panel < panels; panel += 2) some(p, panel, panel + 2 < panels ? panel + 2 : panels);
}

}  // namespace calque
#pragma GCC pop_options

extern "C" AOTITorchError aoti_torch_cpu_panel_linear(
    AtenTensorHandle x, AtenTensorHandle q, AtenTensorHandle scale, AtenTensorHandle* zero_point, AtenTensorHandle* bias,
    AtenTensorHandle* rounds, int64_t bits, int64_t block, int64_t outputs, AtenTensorHandle* made) {
  int64_t dim, numel, *sizes, *strides, groups;
  aoti_torch_get_dim(x, &dim);
  aoti_torch_get_numel(x, &numel);
  aoti_torch_get_sizes(x, &sizes);
  aoti_torch_get_strides(x, &strides);
  aoti_torch_get_size(scale, 1, &groups);
  std::vector<int64_t> shape(sizes, sizes + dim), steps(dim);
  const int64_t in = shape[dim - 1];
  int64_t step = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    if (shape[d] > 1 && strides[d] != step) return AOTI_TORCH_FAILURE;
    step *= shape[d];
  }
  shape[dim - 1] = outputs;
  step = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    steps[d] = step;
    step *= shape[d] > 1 ? shape[d] : 1;
  }
  AOTITorchError error = aoti_torch_empty_strided(
      dim, shape.data(), steps.data(), aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, made);
  if (error != AOTI_TORCH_SUCCESS) return error;
  auto at = [](AtenTensorHandle tensor) {
    void* data;
    aoti_torch_get_data_ptr(tensor, &data);
    return data;
  };
  calque::Product p{};
  p.x = static_cast<const float*>(at(x));
  p.q = static_cast<const uint8_t*>(at(q));
  p.scale = static_cast<const float*>(at(scale));
  p.zero = zero_point ? static_cast<const int8_t*>(at(*zero_point)) : nullptr;
  p.bias = bias ? static_cast<const float*>(at(*bias)) : nullptr;
  p.out = static_cast<float*>(at(*made));
  p.rows = in ? numel / in : 0;
  p.in = in;
  p.outputs = outputs;
  p.bits = bits;
  p.block = block;
  p.blocks = in / block;
  p.groups = groups;
  calque::multiply(p, rounds && *static_cast<const int8_t*>(at(*rounds)));
  return AOTI_TORCH_SUCCESS;
}
