// The micro-kernel of the blocked product on AVX-512 with bf16; included inside a target region.
//
// A tile is 8 tokens by 32 columns of C: 16 accumulators, two vectors of W and a broadcast pair of x. One step
// multiplies 16 pairs of k; each sum is one chain over the pairs in order.

namespace lorasb {
namespace {

constexpr int kBf16Mr = 8;                        // tokens of a tile
constexpr int kTokenStep = kBf16KStep * kBf16Mr;  // bf16 of one step of a micro-panel of tokens

// Multiplies a step of a micro-panel of tokens by one of W.
template <int kRows>
inline void add_step(const uint16_t* tokens, const uint16_t* weight, __m512 (*acc)[2]) {
#pragma GCC unroll 4
  for (int p = 0; p < kBf16KStep / 2; ++p) {
    const __m512bh first = as_bf16(_mm512_loadu_si512(weight + p * kPairSize));
    const __m512bh second = as_bf16(_mm512_loadu_si512(weight + p * kPairSize + 32));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      int pair;
      __builtin_memcpy(&pair, tokens + i * kBf16KStep + 2 * p, 4);
      const __m512bh xs = as_bf16(_mm512_set1_epi32(pair));
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], xs, first);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], xs, second);
    }
  }
}

template <int kRows>
void bf16_micro_kernel_rows(const uint16_t* tokens, PackedPanel weight, bool overwrite, MutableMatrixView c) {
  __m512 acc[kRows][2];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) {
      acc[i][v] = overwrite ? _mm512_setzero_ps() : _mm512_loadu_ps(c.data + i * c.ld + 16 * v);
    }
  }
  for (int64_t s = 0; s < weight.steps; ++s, tokens += kTokenStep, weight.data += kStepSize) {
    add_step<kRows>(tokens, weight.data, acc);
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c.data + i * c.ld + 16 * v, acc[i][v]);
  }
}

void bf16_micro_kernel(const uint16_t* tokens, int64_t rows, PackedPanel weight, bool overwrite, MutableMatrixView c) {
  by_rows<kBf16Mr>(rows,
                   [&](auto count) { bf16_micro_kernel_rows<decltype(count)::value>(tokens, weight, overwrite, c); });
}

// The same with an unscaled micro-panel: the sums of a block start at zero, and are multiplied by its scales when they
// are added to the tile. Two sets of accumulators are in registers.
template <int kRows>
void unscaled_micro_kernel_rows(const uint16_t* tokens, const UnscaledPanel& weight, bool overwrite,
                                MutableMatrixView c) {
  __m512 acc[kRows][2];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) {
      acc[i][v] = overwrite ? _mm512_setzero_ps() : _mm512_loadu_ps(c.data + i * c.ld + 16 * v);
    }
  }
  const uint16_t* panel = weight.panel.data;
  const float* scales = weight.scales;
  const int64_t steps = weight.panel.steps, steps_per_scale = weight.steps_per_scale;
  for (int64_t begin = 0; begin < steps; begin += steps_per_scale, scales += kBf16Nr) {
    __m512 block[kRows][2];
    for (int i = 0; i < kRows; ++i) block[i][0] = block[i][1] = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps_per_scale; ++s, tokens += kTokenStep, panel += kStepSize) {
      add_step<kRows>(tokens, panel, block);
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < 2; ++v) {
        acc[i][v] = _mm512_fmadd_ps(block[i][v], _mm512_loadu_ps(scales + 16 * v), acc[i][v]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c.data + i * c.ld + 16 * v, acc[i][v]);
  }
}

void unscaled_micro_kernel(const uint16_t* tokens, int64_t rows, const UnscaledPanel& weight, bool overwrite,
                           MutableMatrixView c) {
  const int64_t part = rows <= 6 ? rows : 4;  // with more rows, the two sets of accumulators do not fit into registers
  for (int64_t i = 0; i < rows; i += part) {
    by_rows<6>(rows - i < part ? rows - i : part, [&](auto count) {
      unscaled_micro_kernel_rows<decltype(count)::value>(tokens + i * kBf16KStep, weight, overwrite,
                                                         {c.data + i * c.ld, c.ld});
    });
  }
}

void store_bf16(MatrixView sums, int64_t rows, int64_t columns, const Epilogue& epilogue, MutableBf16View y) {
  const __mmask32 valid = first_of_32(columns);
  for (int64_t i = 0; i < rows; ++i) {
    __m512 low = _mm512_loadu_ps(sums.data + i * sums.ld), high = _mm512_loadu_ps(sums.data + i * sums.ld + 16);
    if (epilogue.split_columns) V::interleave(low, high, low, high);
    const uint16_t* added = epilogue.accumulate ? y.data + i * y.ld : epilogue.bias;
    if (added != nullptr) {
      const __m512i values = _mm512_maskz_loadu_epi16(valid, added);
      low = _mm512_add_ps(low, widened(_mm512_castsi512_si256(values)));
      high = _mm512_add_ps(high, widened(_mm512_extracti64x4_epi64(values, 1)));
    }
    _mm512_mask_storeu_epi16(y.data + i * y.ld, valid, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

Bf16GemmKernels bf16_gemm_kernels() {
  Bf16GemmKernels k{};
  k.mr = kBf16Mr;
  k.max_unscaled_tokens = 64;
  k.block = {4, kBf16MaxKc};  // 128 KiB of a second-level cache
  k.pack_tokens = pack_bf16_tokens;
  k.pack_transposed = pack_bf16_transposed;
  k.pack = pack_bf16;
  k.pack_transposed_unscaled = pack_bf16_transposed_unscaled;
  k.pack_dense_transposed = pack_bf16_dense_transposed;
  k.pack_dense = pack_bf16_dense;
  k.micro_kernel = bf16_micro_kernel;
  k.unscaled_micro_kernel = unscaled_micro_kernel;
  k.store = store_bf16;
  return k;
}

}  // namespace
}  // namespace lorasb
