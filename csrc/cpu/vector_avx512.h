// The vector type of AVX-512 and its packing of signs; included by each AVX-512 file, inside its target region.
#include "cpu/transpose_avx2.h"

namespace lorasb {
namespace {

struct V {
  static constexpr int width = 16;
  static constexpr int micro_rows = 12;  // 24 accumulators, two registers of the weight and some tokens in 32 registers
  using reg = __m512;
  using table = __m512;

  static table load_table(const float* values) { return _mm512_loadu_ps(values); }
  static reg set1(float value) { return _mm512_set1_ps(value); }
  static reg zero() { return _mm512_setzero_ps(); }
  static reg load(const float* src) { return _mm512_loadu_ps(src); }
  static void store(float* dst, reg value) { _mm512_storeu_ps(dst, value); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(reg a) { return _mm512_reduce_add_ps(a); }
  static void look_up(const uint8_t* bytes, table values, reg& high, reg& low) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    high = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), values);
    low = _mm512_permutexvar_ps(wide, values);  // only the low four bits count
  }
  static void interleave(reg even, reg odd, reg& lower, reg& upper) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    lower = _mm512_permutex2var_ps(even, first, odd);
    upper = _mm512_permutex2var_ps(even, second, odd);
  }
  static void interleave_f32(reg high, reg low, float* out) {
    interleave(high, low, high, low);
    _mm512_storeu_ps(out, high);
    _mm512_storeu_ps(out + 16, low);
  }
  static __m512i bf16_bits(reg a) {  // rounded, in the upper half of each lane
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  }
  static void interleave_bf16(reg high, reg low, uint16_t* out) {
#ifdef LORASB_HAS_BF16
    // The instruction rounds as the additions below do, but treats subnormals as zero: scales are ordinary here.
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(low, high);  // 16 of high, then 16 of low
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(order, both));
#else
    const __m512i even = _mm512_srli_epi32(bf16_bits(high), 16);
    const __m512i odd = _mm512_and_si512(bf16_bits(low), _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    _mm512_storeu_si512(out, _mm512_or_si512(even, odd));
#endif
  }
  static void interleave_f16(reg high, reg low, uint16_t* out) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
    const __m512i odd = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    _mm512_storeu_si512(out, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
  static reg round_bf16(reg a) {
    return _mm512_castsi512_ps(_mm512_and_si512(bf16_bits(a), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static reg round_f16(reg a) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
  static reg load_bf16(const uint16_t* src) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static reg load_f16(const uint16_t* src) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(src)));
  }
  static void store_bf16(uint16_t* dst, reg a) {
    // A NaN keeps its upper bits and becomes a quiet one: rounding up could carry into the sign and give zero.
    const __m512i quiet = _mm512_or_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x400000));
    const __m512i bits = _mm512_mask_mov_epi32(bf16_bits(a), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
  }
  static void store_f16(uint16_t* dst, reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
}  // namespace lorasb

#include "cpu/fp32_vector_kernels.h"

namespace lorasb {
namespace {

// Comparisons give the bits of sixteen entries at once. A value is not finite if its exponent has all bits set.
SignCounts pack_signs_avx512(const float* x, int64_t count, uint32_t* positive, uint32_t* nonzero) {
  __m512d squares = _mm512_setzero_pd(), others = _mm512_setzero_pd();
  SignCounts counts;
  int64_t j = 0;
  for (; j + 32 <= count; j += 32) {
    uint32_t above = 0, other = 0;
    for (int h = 0; h < 2; ++h) {
      const __m512 value = _mm512_loadu_ps(x + j + 16 * h);
      above |= static_cast<uint32_t>(_mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_GT_OQ)) << (16 * h);
      other |= static_cast<uint32_t>(_mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_UQ)) << (16 * h);
      const __m512i exponent = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7f800000));
      counts.not_finite += __builtin_popcount(_mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(0x7f800000)));
      const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(value));
      const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(value), 1)));
      squares = _mm512_fmadd_pd(low, low, squares);
      others = _mm512_fmadd_pd(high, high, others);
    }
    positive[j / 32] = above;
    nonzero[j / 32] = other;
    counts.zeros += 32 - __builtin_popcount(other);
  }
  counts.squares = _mm512_reduce_add_pd(_mm512_add_pd(squares, others));
  if (j < count) counts.add(pack_signs(x + j, count - j, positive + j / 32, nonzero + j / 32));
  return counts;
}

}  // namespace
}  // namespace lorasb
