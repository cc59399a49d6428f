// Products of tiles and strips on AVX-512 with bf16; included inside a target region.
#include "cpu/bf16_packing_avx512.h"

namespace lorasb {
namespace {

// One step of a tile against one of a strip.
template <int kRows>
inline void add_step(const uint16_t* tile, const uint16_t* strip, __m512 (*found)[2]) {
#pragma GCC unroll 4
  for (int p = 0; p < kStripDepth / 2; ++p) {
    const __m512bh first = as_bf16(_mm512_loadu_si512(strip + p * kPairWords));
    const __m512bh second = as_bf16(_mm512_loadu_si512(strip + p * kPairWords + 32));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      int pair;
      __builtin_memcpy(&pair, tile + i * kStripDepth + 2 * p, 4);
      const __m512bh xs = as_bf16(_mm512_set1_epi32(pair));
      found[i][0] = _mm512_dpbf16_ps(found[i][0], xs, first);
      found[i][1] = _mm512_dpbf16_ps(found[i][1], xs, second);
    }
  }
}

template <int kRows>
void multiply_rows(const uint16_t* tile, const uint16_t* strip, int64_t steps, bool fresh, float* sums,
                   int64_t stride) {
  __m512 found[kRows][2];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) {
      found[i][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * stride + 16 * v);
    }
  }
  for (int64_t s = 0; s < steps; ++s, tile += kTileWords, strip += kStepWords) add_step<kRows>(tile, strip, found);
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(sums + i * stride + 16 * v, found[i][v]);
  }
}

void multiply_strip(const uint16_t* tile, int64_t rows, const uint16_t* strip, int64_t steps, bool fresh, float* sums,
                    int64_t stride) {
  using Multiply = void (*)(const uint16_t*, const uint16_t*, int64_t, bool, float*, int64_t);
  static constexpr Multiply kBy[kTileTokens] = {multiply_rows<1>, multiply_rows<2>, multiply_rows<3>, multiply_rows<4>,
                                                multiply_rows<5>, multiply_rows<6>, multiply_rows<7>, multiply_rows<8>};
  kBy[rows - 1](tile, strip, steps, fresh, sums, stride);
}

// The same over plain strips: each run of steps has a scale for every lane.
template <int kRows>
void multiply_scaled_rows(const uint16_t* tile, const uint16_t* strip, int64_t steps, int64_t run, const float* scales,
                          bool fresh, float* sums, int64_t stride) {
  __m512 found[kRows][2];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) {
      found[i][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * stride + 16 * v);
    }
  }
  for (int64_t begin = 0; begin < steps; begin += run, scales += kStripLanes) {
    __m512 part[kRows][2];
    for (int i = 0; i < kRows; ++i) part[i][0] = part[i][1] = _mm512_setzero_ps();
    for (int64_t s = 0; s < run; ++s, tile += kTileWords, strip += kStepWords) add_step<kRows>(tile, strip, part);
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < 2; ++v) {
        found[i][v] = _mm512_fmadd_ps(part[i][v], _mm512_loadu_ps(scales + 16 * v), found[i][v]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(sums + i * stride + 16 * v, found[i][v]);
  }
}

void multiply_scaled(const uint16_t* tile, int64_t rows, const uint16_t* strip, int64_t steps, int64_t run,
                     const float* scales, bool fresh, float* sums, int64_t stride) {
  using Multiply = void (*)(const uint16_t*, const uint16_t*, int64_t, int64_t, const float*, bool, float*, int64_t);
  static constexpr Multiply kBy[6] = {multiply_scaled_rows<1>, multiply_scaled_rows<2>, multiply_scaled_rows<3>,
                                      multiply_scaled_rows<4>, multiply_scaled_rows<5>, multiply_scaled_rows<6>};
  const int64_t part = rows <= 6 ? rows : 4;  // the sums of more do not fit into registers
  for (int64_t i = 0; i < rows; i += part) {
    const int64_t taken = rows - i < part ? rows - i : part;
    kBy[taken - 1](tile + i * kStripDepth, strip, steps, run, scales, fresh, sums + i * stride, stride);
  }
}

void finish_strip(const float* sums, int64_t stride, int64_t rows, int64_t count, bool apart, const uint16_t* bias,
                  bool add, uint16_t* y, int64_t y_stride) {
  const __mmask32 there = first_of_32(count);
  for (int64_t i = 0; i < rows; ++i) {
    __m512 low = _mm512_loadu_ps(sums + i * stride), high = _mm512_loadu_ps(sums + i * stride + 16);
    if (apart) V::interleave(low, high, low, high);
    const uint16_t* more = add ? y + i * y_stride : bias;
    if (more != nullptr) {
      const __m512i others = _mm512_maskz_loadu_epi16(there, more);
      low = _mm512_add_ps(low, widened(_mm512_castsi512_si256(others)));
      high = _mm512_add_ps(high, widened(_mm512_extracti64x4_epi64(others, 1)));
    }
    _mm512_mask_storeu_epi16(y + i * y_stride, there, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

const StripKernels& strip_kernels() {
  static const StripKernels kernels = {kTileTokens,
                                       64,
                                       {4, kStripChunk},
                                       nullptr,
                                       nullptr,
                                       token_tiles,
                                       strips_of_rows,
                                       strips_of_columns,
                                       dense_strips_of_rows,
                                       dense_strips_of_columns,
                                       plain_strips_of_rows,
                                       multiply_strip,
                                       multiply_scaled,
                                       finish_strip};
  return kernels;
}

}  // namespace
}  // namespace lorasb
