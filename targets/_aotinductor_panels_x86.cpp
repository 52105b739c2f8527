// The bodies of panel_linear for x86: for AVX2, and for AVX512-VNNI, two panels side by side in a vector. Which of them runs is decided
// by the processor, so that a package runs on both kinds. They give the same integers, and the same sums of them in the same order.
#include <immintrin.h>

#define CALQUE_AVX2 __attribute__((target("avx2,fma")))
#define CALQUE_VNNI __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")))

namespace calque {

inline bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
inline bool has_vnni() {
  static const bool has = has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  return has;
}

CALQUE_INLINE int32_t four(const int8_t* at) {
  int32_t all;
  std::memcpy(&all, at, 4);
  return all;
}

CALQUE_AVX2 CALQUE_INLINE __m256i bytes(const uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

// The zero points of eight outputs.
CALQUE_AVX2 CALQUE_INLINE __m256i zeros(const Product& p, int64_t at) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p.zero + at)));
}

// Some rows of one panel.
using RowsFunction = void (*)(const Product&, int64_t, int64_t);

template <RowsFunction FOUR, RowsFunction ONE>
CALQUE_AVX2 void each_panel(const Product& p, int64_t panel, int64_t end) {
  for (; panel < end; ++panel) {
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) FOUR(p, panel, row);
    for (; row < p.rows; ++row) ONE(p, panel, row);
  }
}

CALQUE_AVX2 CALQUE_INLINE void store(const Product& p, int64_t panel, int64_t row, __m256 sums) {
  const int64_t first = panel * 8;
  if (p.outputs - first < 8) {
    float lanes[8];
    _mm256_storeu_ps(lanes, sums);
    return store(p, panel, row, lanes);
  }
  if (p.bias) sums = _mm256_add_ps(sums, _mm256_loadu_ps(p.bias + first));
  _mm256_storeu_ps(p.out + row * p.outputs + first, sums);
}

// acc + u · s, u without a sign and of at most 7 bits: sums of two have 16.
CALQUE_AVX2 CALQUE_INLINE __m256i dot(__m256i acc, __m256i u, __m256i s) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}

template <int R, int BITS>
CALQUE_AVX2 void rounded_rows(const Product& p, int64_t panel, int64_t row) {
  const uint8_t* q = p.q + panel * p.panel_bytes();
  const __m256i low = _mm256_set1_epi8(15);
  __m256 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = _mm256_setzero_ps();
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int64_t at = (panel * p.groups + p.group(b)) * 8;
    const int8_t* x = p.rounded + row * p.in + b * p.block;
    __m256i even[R], odd[R];
    for (int r = 0; r < R; ++r) {
      even[r] = _mm256_set1_epi32(BITS == 4 ? -8 * p.sums[(row + r) * p.blocks + b] : 0);  // integers of 4 bits are 8 too large
      odd[r] = _mm256_setzero_si256();
    }
    for (int64_t k = 0; k < p.block; k += 8, q += BITS * 8) {
      const __m256i whole = bytes(q);
      const __m256i first = BITS == 4 ? _mm256_and_si256(whole, low) : whole;
      const __m256i second = BITS == 4 ? _mm256_and_si256(_mm256_srli_epi16(whole, 4), low) : bytes(q + 32);
      for (int r = 0; r < R; ++r) {
        __m256i a = _mm256_set1_epi32(four(x + r * p.in + k)), c = _mm256_set1_epi32(four(x + r * p.in + k + 4));
        if (BITS == 8) {
          a = _mm256_sign_epi8(a, first);
          c = _mm256_sign_epi8(c, second);
        }
        even[r] = dot(even[r], BITS == 8 ? _mm256_abs_epi8(first) : first, a);
        odd[r] = dot(odd[r], BITS == 8 ? _mm256_abs_epi8(second) : second, c);
      }
    }
    const __m256 scale = _mm256_loadu_ps(p.scale + at);
    for (int r = 0; r < R; ++r) {
      const int64_t one = (row + r) * p.blocks + b;
      __m256i sum = _mm256_add_epi32(even[r], odd[r]);
      if (p.zero) sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zeros(p, at), _mm256_set1_epi32(p.sums[one])));
      acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale, _mm256_set1_ps(p.steps[one])), acc[r]);
    }
  }
  for (int r = 0; r < R; ++r) store(p, panel, row + r, acc[r]);
}

template <int BITS>
constexpr auto rounded_panels = each_panel<rounded_rows<4, BITS>, rounded_rows<1, BITS>>;

CALQUE_VNNI CALQUE_INLINE __m512i beside(__m256i one, __m256i other) { return _mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1); }

// As `rounded_rows`, of two panels, the second of which may be the first. Weights lose their sign, and sums get back what that adds.
template <int R, int BITS, bool ZERO>
CALQUE_VNNI void wide_rows(const Product& p, int64_t panel, int64_t last, int64_t row) {
  const uint8_t *q = p.q + panel * p.panel_bytes(), *next = p.q + last * p.panel_bytes();
  const __m512i low = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128), lost = _mm512_set1_epi32(BITS == 4 ? -8 : -128);
  __m512 acc[R];
  for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_ps();
  for (int64_t b = 0; b < p.blocks; ++b) {
    const int8_t* x = p.rounded + row * p.in + b * p.block;
    __m512i sum[R][2];  // of few rows two sums each: one would wait for itself
    for (int r = 0; r < R; ++r) {
      sum[r][0] = _mm512_mullo_epi32(lost, _mm512_set1_epi32(p.sums[(row + r) * p.blocks + b]));
      if (R < 4) sum[r][1] = _mm512_setzero_si512();
    }
    for (int64_t k = 0; k < p.block; k += 8, q += BITS * 8, next += BITS * 8) {
      if (row == 0) {  // weights come from memory, and two ways at once are not foreseen by the processor: the next panels are named
        _mm_prefetch(reinterpret_cast<const char*>(q + 2 * p.panel_bytes()), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(next + 2 * p.panel_bytes()), _MM_HINT_T0);
      }
      __m512i first = beside(bytes(q), bytes(next)), second;
      if (BITS == 4) {
        second = _mm512_and_si512(_mm512_srli_epi16(first, 4), low);
        first = _mm512_and_si512(first, low);
      } else {
        second = _mm512_xor_si512(beside(bytes(q + 32), bytes(next + 32)), sign);
        first = _mm512_xor_si512(first, sign);
      }
      for (int r = 0; r < R; ++r) {
        sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], first, _mm512_set1_epi32(four(x + r * p.in + k)));
        sum[r][R < 4] = _mm512_dpbusd_epi32(sum[r][R < 4], second, _mm512_set1_epi32(four(x + r * p.in + k + 4)));
      }
    }
    const int64_t at = (panel * p.groups + p.group(b)) * 8, other = (last * p.groups + p.group(b)) * 8;
    const __m256 scales[2] = {_mm256_loadu_ps(p.scale + at), _mm256_loadu_ps(p.scale + other)};
    const __m512 scale = _mm512_castsi512_ps(beside(_mm256_castps_si256(scales[0]), _mm256_castps_si256(scales[1])));
    for (int r = 0; r < R; ++r) {
      const int64_t one = (row + r) * p.blocks + b;
      __m512i whole = R < 4 ? _mm512_add_epi32(sum[r][0], sum[r][1]) : sum[r][0];
      if (ZERO) {
        const __m512i zero = beside(zeros(p, at), zeros(p, other));
        whole = _mm512_sub_epi32(whole, _mm512_mullo_epi32(zero, _mm512_set1_epi32(p.sums[one])));
      }
      acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(scale, _mm512_set1_ps(p.steps[one])), acc[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    store(p, panel, row + r, _mm512_castps512_ps256(acc[r]));
    if (last > panel) store(p, last, row + r, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(acc[r]), 1)));
  }
}

template <int BITS, bool ZERO>
CALQUE_VNNI void wide_panels(const Product& p, int64_t panel, int64_t end) {
  int64_t row = 0;
  for (; row + 8 <= p.rows; row += 8) wide_rows<8, BITS, ZERO>(p, panel, end - 1, row);
  for (; row + 4 <= p.rows; row += 4) wide_rows<4, BITS, ZERO>(p, panel, end - 1, row);
  for (; row + 2 <= p.rows; row += 2) wide_rows<2, BITS, ZERO>(p, panel, end - 1, row);
  for (; row < p.rows; ++row) wide_rows<1, BITS, ZERO>(p, panel, end - 1, row);
}

// Four inputs of eight outputs, which lie in one vector, times values that are not rounded.
template <int R>
CALQUE_AVX2 CALQUE_INLINE void four_inputs(__m256i w, int minus, const float* x, int64_t stride, __m256* sums) {
  const __m256 zero = _mm256_set1_ps(static_cast<float>(minus));
  for (int t = 0; t < 4; ++t) {
    const __m256i one = _mm256_srai_epi32(_mm256_sllv_epi32(w, _mm256_set1_epi32(24 - 8 * t)), 24);
    const __m256 number = _mm256_sub_ps(_mm256_cvtepi32_ps(one), zero);
    for (int r = 0; r < R; ++r) sums[r] = _mm256_fmadd_ps(number, _mm256_set1_ps(x[r * stride + t]), sums[r]);
  }
}

// total + sums, which are of few: of a whole row float32 would lose digits that a proof asks for.
CALQUE_AVX2 CALQUE_INLINE void widen(__m256 sums, __m256d* total) {
  total[0] = _mm256_add_pd(total[0], _mm256_cvtps_pd(_mm256_castps256_ps128(sums)));
  total[1] = _mm256_add_pd(total[1], _mm256_cvtps_pd(_mm256_extractf128_ps(sums, 1)));
}
CALQUE_AVX2 CALQUE_INLINE __m256 narrowed(const __m256d* total) {
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
      const __m256i first = bytes(q);
      if (BITS == 4) {
        four_inputs<R>(_mm256_and_si256(first, low), 8, x + k, p.in, sums);
        four_inputs<R>(_mm256_and_si256(_mm256_srli_epi16(first, 4), low), 8, x + k + 4, p.in, sums);
      } else {
        four_inputs<R>(first, 0, x + k, p.in, sums);
        four_inputs<R>(bytes(q + 32), 0, x + k + 4, p.in, sums);
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
      const __m256 zero = _mm256_cvtepi32_ps(zeros(p, at));
      for (int r = 0; r < R; ++r) sums[r] = _mm256_fnmadd_ps(zero, alone[r], sums[r]);
    }
    for (int r = 0; r < R; ++r) widen(_mm256_mul_ps(sums[r], _mm256_loadu_ps(p.scale + at)), acc[r]);
  }
  for (int r = 0; r < R; ++r) store(p, panel, row + r, narrowed(acc[r]));
}

template <int BITS>
constexpr auto exact_panels = each_panel<exact_rows<4, BITS>, exact_rows<1, BITS>>;

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

}  // namespace calque
