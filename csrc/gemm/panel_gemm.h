// Products with a quantized weight where no blocked product of our own applies: fp64, shapes without whole blocks, and
// dtypes that the BLAS multiplies faster.
//
//   up to 8 tokens, whole blocks    W is read once and looked up into fp32 sums (Kernels::dot, dot_transposed)
//   otherwise                       panels of W are dequantized into scratch memory and handed to the BLAS
//
// A panel is 4 MiB: rows [low, high) of W for y = x Wᵀ, columns [first, first + width) for dx = dy W, in both cases all
// of k. Every element of the result is one product of the BLAS, added to what was there:
//
//   for each panel      y[:, low:high] += x · dequantize(W[low:high, :])ᵀ
//                       dx[:, first:first + width] += dy · dequantize(W[:, first:first + width])
//
// Threading: at::parallel_for decodes a panel, and the BLAS has its own threads. Decoding has no sums; the direct
// products sum each element of the result in one task. How the BLAS uses threads is up to it.
#pragma once

#include "cpu/packed_weight.h"
#include "gemm/tensors.h"

namespace lorasb {

// y [M, m] += x [M, n] Wᵀ, or y [M, n] += x [M, m] W if `plain`. Both are contiguous and of one dtype: fp32, bf16 or
// fp64.
void panel_gemm_add(const Packed& w, const Tensor& x, Tensor& y, bool plain);

// y [M, m] = x Wᵀ + v Bᵀ + bias, or x W + v A if `plain`, all in x's dtype: by bf16_gemm in one sum where that is
// supported, else the adapter's part by torch, to which the base's is added.
Tensor base_and_adapter(const Packed& w, const Tensor& x, const Tensor& v, const Tensor& factor,
                        const OptionalTensor& bias, bool plain);

// True if M tokens in a dtype are multiplied by the blocked product in fp32 (fp32_gemm.h), and not by the two above.
bool takes_fp32_gemm(const Packed& w, at::ScalarType dtype, int64_t M);

}  // namespace lorasb
