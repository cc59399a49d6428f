// AVX2 with FMA and F16C (Haswell, Zen and newer): 16 registers of 8 lanes.
#include "cpu/kernel_table.h"

#ifdef LORASB_X86
#include <immintrin.h>

#include "cpu/target.h"

LORASB_TARGET_BEGIN("avx2,fma,f16c")

#include "cpu/transpose_avx2.h"

namespace lorasb {
namespace {

struct V {
  static constexpr int width = 8;
  static constexpr int micro_rows = 6;  // 12 accumulators, two registers of the weight and one token in 16 registers
  using reg = __m256;
  struct table {
    __m256 low, high;  // entries 0-7 and 8-15
  };

  static table load_table(const float* values) { return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}; }
  static reg set1(float value) { return _mm256_set1_ps(value); }
  static reg zero() { return _mm256_setzero_ps(); }
  static reg load(const float* src) { return _mm256_loadu_ps(src); }
  static void store(float* dst, reg value) { _mm256_storeu_ps(dst, value); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(reg a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
  // A table of 16 entries is two registers: both are looked up by the lower three bits, and bit 3, shifted to where a
  // sign is, chooses between them.
  static reg entry(__m256i nibbles, const table& values) {
    const __m256 below = _mm256_permutevar8x32_ps(values.low, nibbles);
    const __m256 above = _mm256_permutevar8x32_ps(values.high, nibbles);
    return _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(nibbles, 28)));
  }
  static void look_up(const uint8_t* bytes, const table& values, reg& high, reg& low) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
    high = entry(_mm256_srli_epi32(wide, 4), values);
    low = entry(_mm256_and_si256(wide, _mm256_set1_epi32(15)), values);
  }
  // first, second = high[0], low[0], high[1], low[1], ... Unpacking works within 128-bit halves, which are exchanged
  // after it.
  static void interleave(reg high, reg low, reg& first, reg& second) {
    const __m256 a = _mm256_unpacklo_ps(high, low), b = _mm256_unpackhi_ps(high, low);
    first = _mm256_permute2f128_ps(a, b, 0x20);
    second = _mm256_permute2f128_ps(a, b, 0x31);
  }
  static void interleave_f32(reg high, reg low, float* out) {
    reg first, second;
    interleave(high, low, first, second);
    _mm256_storeu_ps(out, first);
    _mm256_storeu_ps(out + 8, second);
  }
  static __m256i bf16_bits(reg a) {  // rounded, in the upper half of each lane
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  }
  static void interleave_bf16(reg high, reg low, uint16_t* out) {
    const __m256i even = _mm256_srli_epi32(bf16_bits(high), 16);
    const __m256i odd = _mm256_and_si256(bf16_bits(low), _mm256_set1_epi32(static_cast<int>(0xffff0000u)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_or_si256(even, odd));
  }
  static void interleave_f16(reg high, reg low, uint16_t* out) {
    reg first, second;
    interleave(high, low, first, second);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(first, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), _mm256_cvtps_ph(second, _MM_FROUND_TO_NEAREST_INT));
  }
  static reg round_bf16(reg a) {
    return _mm256_castsi256_ps(_mm256_and_si256(bf16_bits(a), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static reg round_f16(reg a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
  static reg load_bf16(const uint16_t* src) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static reg load_f16(const uint16_t* src) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
  }
  static void store_bf16(uint16_t* dst, reg a) {
    // A NaN keeps its upper bits and becomes a quiet one: rounding up could carry into the sign and give zero.
    const __m256i quiet = _mm256_or_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i bits = _mm256_srli_epi32(_mm256_blendv_epi8(bf16_bits(a), quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm256_castsi256_si128(packed));
  }
  static void store_f16(uint16_t* dst, reg a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace
}  // namespace lorasb

#include "cpu/fp32_vector_kernels.h"

namespace lorasb {

Kernels avx2_kernels() {
  Kernels k = common_kernels("AVX2");
  k.fp32_gemm_beats_blas = true;  // measured on two Zen 3 cores
  return k;
}

}  // namespace lorasb

LORASB_TARGET_END
#endif
