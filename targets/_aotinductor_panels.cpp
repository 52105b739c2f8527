// What panel_linear does in a package of AOTInductor: pasted into the code that Inductor writes, in namespace scope.
//
// A panel is eight outputs side by side, so that each of the eight lanes of a vector is one output's sum:
//
//   int8   [panels, in / 4, 8 outputs, 4 inputs]     signed
//   int4   [panels, in / 8, 8 outputs, 4 inputs]     input k + t in the low half, k + 4 + t in the high, each plus 8
//   scale  [panels, groups or 1, 8], zero_point the same, signed, as int8
//
// Values are rounded to 8 bits block by block, the largest of a block being 127, where `rounds` says so; otherwise integers
// become float32. Of the two bodies for x86 the one with vpdpbusd runs where the processor has it; no vector is longer than 256 bits.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Inductor compiles the code that it stands in with few optimizations; loops over lanes and rows must be unrolled.
#pragma GCC push_options
#pragma GCC optimize("O3")
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
  int64_t panel_bytes() const { return in * bits; }
  int64_t group(int64_t at) const { return groups == 1 ? 0 : at; }
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

#if defined(__x86_64__)
#define CALQUE_AVX2 __attribute__((target("avx2,fma")))
#define CALQUE_VNNI __attribute__((target("avx2,fma,avx512vl,avx512vnni")))

// acc + u · s, u without a sign and of at most 7 bits for AVX2, whose sums of two have 16.
#define CALQUE_DOT_AVX2(acc, u, s) \
  _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)))
#define CALQUE_DOT_VNNI(acc, u, s) _mm256_dpbusd_epi32(acc, u, s)
// acc + w · x of signed weights, but for 128 · x where the weights lose their sign.
#define CALQUE_SIGNED_AVX2(acc, w, x) CALQUE_DOT_AVX2(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
#define CALQUE_SIGNED_VNNI(acc, w, x) CALQUE_DOT_VNNI(acc, _mm256_xor_si256(w, _mm256_set1_epi8(-128)), x)
#define CALQUE_LOST_AVX2 0
#define CALQUE_LOST_VNNI 128

#define CALQUE_FOUR(at) _mm256_set1_epi32(four(at))
__attribute__((always_inline)) inline int32_t four(const int8_t* at) {
  int32_t all;
  std::memcpy(&all, at, 4);
  return all;
}

#define CALQUE_BODY(ISA)                                                                                            \
  template <int R, int BITS>                                                                                        \
  CALQUE_##ISA void rounded_##ISA(const Product& p, int64_t panel, int64_t row) {                                   \
    const uint8_t* q = p.q + panel * p.panel_bytes();                                                               \
    const __m256i low = _mm256_set1_epi8(15);                                                                       \
    const int lost = BITS == 4 ? 8 : CALQUE_LOST_##ISA;                                                             \
    __m256 acc[R];                                                                                                  \
    for (int r = 0; r < R; ++r) acc[r] = _mm256_setzero_ps();                                                       \
    for (int64_t b = 0; b < p.blocks; ++b) {                                                                        \
      const int64_t at = (panel * p.groups + p.group(b)) * 8;                                                       \
      const int8_t* x = p.rounded + row * p.in + b * p.block;                                                       \
      __m256i even[R], odd[R];                                                                                      \
      for (int r = 0; r < R; ++r) {                                                                                 \
        even[r] = _mm256_set1_epi32(-lost * p.sums[(row + r) * p.blocks + b]);                                      \
        odd[r] = _mm256_setzero_si256();                                                                            \
      }                                                                                                             \
      for (int64_t k = 0; k < p.block; k += 8, q += BITS * 8) {                                                     \
        __m256i first, second;                                                                                      \
        first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));                                            \
        if (BITS == 4) {                                                                                            \
          second = _mm256_and_si256(_mm256_srli_epi16(first, 4), low);                                              \
          first = _mm256_and_si256(first, low);                                                                     \
        } else {                                                                                                    \
          second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32));                                    \
        }                                                                                                           \
        for (int r = 0; r < R; ++r) {                                                                               \
          const __m256i a = CALQUE_FOUR(x + r * p.in + k), c = CALQUE_FOUR(x + r * p.in + k + 4);                   \
          if (BITS == 4) {                                                                                          \
            even[r] = CALQUE_DOT_##ISA(even[r], first, a);                                                          \
            odd[r] = CALQUE_DOT_##ISA(odd[r], second, c);                                                           \
          } else {                                                                                                  \
            even[r] = CALQUE_SIGNED_##ISA(even[r], first, a);                                                       \
            odd[r] = CALQUE_SIGNED_##ISA(odd[r], second, c);                                                        \
          }                                                                                                         \
        }                                                                                                           \
      }                                                                                                             \
      const __m256 scale = _mm256_loadu_ps(p.scale + at);                                                           \
      for (int r = 0; r < R; ++r) {                                                                                 \
        const int64_t one = (row + r) * p.blocks + b;                                                               \
        __m256i sum = _mm256_add_epi32(even[r], odd[r]);                                                            \
        if (p.zero) {                                                                                               \
          const __m128i zeros = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p.zero + at));                     \
          sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(_mm256_cvtepi8_epi32(zeros), _mm256_set1_epi32(p.sums[one]))); \
        }                                                                                                           \
        acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale, _mm256_set1_ps(p.steps[one])), acc[r]); \
      }                                                                                                             \
    }                                                                                                               \
    for (int r = 0; r < R; ++r) {                                                                                   \
      float lanes[8];                                                                                               \
      _mm256_storeu_ps(lanes, acc[r]);                                                                              \
      store(p, panel, row + r, lanes);                                                                              \
    }                                                                                                               \
  }                                                                                                                 \
  template <int BITS>                                                                                               \
  CALQUE_##ISA void rounded_panel_##ISA(const Product& p, int64_t panel) {                                          \
    int64_t row = 0;                                                                                                \
    for (; row + 4 <= p.rows; row += 4) rounded_##ISA<4, BITS>(p, panel, row);                                      \
    for (; row + 2 <= p.rows; row += 2) rounded_##ISA<2, BITS>(p, panel, row);                                      \
    for (; row < p.rows; ++row) rounded_##ISA<1, BITS>(p, panel, row);                                              \
  }

CALQUE_BODY(AVX2)
CALQUE_BODY(VNNI)

// Four inputs of eight outputs, which lie in one vector, times values that are not rounded.
template <int R>
CALQUE_AVX2 inline void four_inputs(__m256i w, int minus, const float* x, int64_t stride, __m256* sums) {
  const __m256 zero = _mm256_set1_ps(static_cast<float>(minus));
  for (int t = 0; t < 4; ++t) {
    const __m256i one = _mm256_srai_epi32(_mm256_sllv_epi32(w, _mm256_set1_epi32(24 - 8 * t)), 24);
    const __m256 number = _mm256_sub_ps(_mm256_cvtepi32_ps(one), zero);
    for (int r = 0; r < R; ++r) sums[r] = _mm256_fmadd_ps(number, _mm256_set1_ps(x[r * stride + t]), sums[r]);
  }
}

// total + sums, which are of few: of a whole row float32 would lose digits that a proof asks for.
CALQUE_AVX2 inline void widen(__m256 sums, __m256d* total) {
  total[0] = _mm256_add_pd(total[0], _mm256_cvtps_pd(_mm256_castps256_ps128(sums)));
  total[1] = _mm256_add_pd(total[1], _mm256_cvtps_pd(_mm256_extractf128_ps(sums, 1)));
}
CALQUE_AVX2 inline __m256 narrowed(const __m256d* total) {
  return _mm256_set_m128(_mm256_cvtpd_ps(total[1]), _mm256_cvtpd_ps(total[0]));
}

template <int R, int BITS>
CALQUE_AVX2 void exact_rows(const Product& p, int64_t panel, int64_t row) {
  const uint8_t* q = p.q + panel * p.panel_bytes();
  const __m256i low = _mm256_set1_epi8(15);
  __m256d acc[R][2];
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_pd();
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t at = (panel * p.groups + p.group(b)) * 8;
    const float* x = p.x + row * p.in + b * p.block;
    __m256 sums[R], alone[R];
    __m256d whole[R][2];
    for (int r = 0; r < R; ++r) {
      sums[r] = alone[r] = _mm256_setzero_ps();
      whole[r][0] = whole[r][1] = _mm256_setzero_pd();
    }
    for (int64_t k = 0; k < p.block; k += 8, q += BITS * 8) {
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
      if (BITS == 4) {
        four_inputs<R>(_mm256_and_si256(first, low), 8, x + k, p.in, sums);
        four_inputs<R>(_mm256_and_si256(_mm256_srli_epi16(first, 4), low), 8, x + k + 4, p.in, sums);
      } else {
        four_inputs<R>(first, 0, x + k, p.in, sums);
        four_inputs<R>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32)), 0, x + k + 4, p.in, sums);
      }
      if (p.zero) {
        for (int r = 0; r < R; ++r) {
          for (int t = 0; t < 8; ++t) alone[r] = _mm256_add_ps(alone[r], _mm256_set1_ps(x[r * p.in + k + t]));
        }
      }
      for (int r = 0; r < R; ++r) {
        widen(sums[r], whole[r]);
        sums[r] = _mm256_setzero_ps();
      }
    }
    for (int r = 0; r < R; ++r) sums[r] = narrowed(whole[r]);
    if (p.zero) {
      const __m128i zeros = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p.zero + at));
      const __m256 zero = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(zeros));
      for (int r = 0; r < R; ++r) sums[r] = _mm256_fnmadd_ps(zero, alone[r], sums[r]);
    }
    for (int r = 0; r < R; ++r) widen(_mm256_mul_ps(sums[r], _mm256_loadu_ps(p.scale + at)), acc[r]);
  }
  for (int r = 0; r < R; ++r) {
    float lanes[8];
    _mm256_storeu_ps(lanes, narrowed(acc[r]));
    store(p, panel, row + r, lanes);
  }
}

template <int BITS>
CALQUE_AVX2 void exact_panel(const Product& p, int64_t panel) {
  int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) exact_rows<4, BITS>(p, panel, row);
  for (; row < p.rows; ++row) exact_rows<1, BITS>(p, panel, row);
}

// As `round_row`, eight at a time.
CALQUE_AVX2 inline void round_row_avx2(const float* x, int64_t blocks, int64_t block, int8_t* rounded, float* steps, int32_t* sums) {
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int64_t b = 0; b < blocks; ++b, x += block, rounded += block) {
    __m256 most = _mm256_setzero_ps(), odd = _mm256_setzero_ps();
    for (int64_t k = 0; k < block; k += 8) {
      const __m256 v = _mm256_loadu_ps(x + k);
      most = _mm256_max_ps(most, _mm256_and_ps(v, no_sign));
      odd = _mm256_add_ps(odd, _mm256_sub_ps(v, v));
    }
    float lanes[8], odds[8], largest = 0, strange = 0;
    _mm256_storeu_ps(lanes, most);
    _mm256_storeu_ps(odds, odd);
    for (int n = 0; n < 8; ++n) {
      largest = largest > lanes[n] ? largest : lanes[n];
      strange += odds[n];
    }
    const float step = largest / 127;
    sums[b] = 0;
    steps[b] = strange == 0 ? step : NAN;
    if (!(step > 0) || strange != 0) {
      std::memset(rounded, 0, block);
      continue;
    }
    const __m256 divisor = _mm256_set1_ps(step);
    __m256i total = _mm256_setzero_si256();
    for (int64_t k = 0; k < block; k += 8) {
      const __m256i whole = _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x + k), divisor));
      total = _mm256_add_epi32(total, whole);
      const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(rounded + k), _mm_packs_epi16(words, words));
    }
    int32_t parts[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(parts), total);
    for (int n = 0; n < 8; ++n) sums[b] += parts[n];
  }
}

inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
inline bool has_vnni() {
  static const bool has = has_avx2() && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return has;
}
#endif

using PanelFunction = void (*)(const Product&, int64_t);

inline PanelFunction panel_function(const Product& p) {
#if defined(__x86_64__)
  if (has_avx2()) {
    if (!p.rounded) return p.bits == 4 ? exact_panel<4> : exact_panel<8>;
    if (has_vnni()) return p.bits == 4 ? rounded_panel_VNNI<4> : rounded_panel_VNNI<8>;
    return p.bits == 4 ? rounded_panel_AVX2<4> : rounded_panel_AVX2<8>;
  }
#endif
  return plain_panel;
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
  const PanelFunction one = panel_function(p);
  const int64_t panels = (p.outputs + 7) / 8;
#pragma omp parallel for if (p.rows * p.in * p.outputs > 200000)
  for (int64_t panel = 0; panel < panels; ++panel) one(p, panel);
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
