// The blocked product in bf16 of many tokens with a quantized weight, base and adapter in one sum:
//
//   y = x Wᵀ + v Bᵀ + bias        dx = dy W + c A
//
// W is decoded to bf16, a block at a time, into micro-panels that stay in cache; each is multiplied by all tokens
// before the next one is decoded. AVX512-BF16 or AMX multiplies, sums are in fp32, and y is rounded once.
//
// BLIS terms: C [m, n] = A [m, k] B [k, n] with tokens as A. Tokens are packed once before the product.
//
//   for each range of n                                a thread's own micro-panels of B
//     for i in steps of mc                             up to 512 tokens: their sums [mc, nc] stay in cache
//       for j in steps of nc                           128 columns (AMX: 192)
//         for each term                                W, then the adapter's factor
//           for k0 in steps of kc                      512 (AMX: 256)
//             decode B [kc, nc] into micro-panels
//             for ii in steps of mr                    8 tokens (AMX: 32)
//               for jj in steps of nr                  32: micro-kernel, mr x nr sums in registers
//         y = sums + bias, rounded
//
// The layouts of micro-panels are in cpu/bf16_microkernel.h. Up to max_unscaled_tokens, y needs half of the decoding:
// micro-panels hold rounded entries of the table without their scales, one micro-panel at a time (nc = 32, kc = 256),
// and the scales are applied to the sums of each block. dx has no such path.
//
// Threading: columns of C are cut, never k or a sum, and kc is a constant: bits do not depend on the number of threads.
#pragma once

#include "cpu/matrix_view.h"
#include "cpu/packed_weight.h"
#include "gemm/tensors.h"

namespace lorasb {

// True if the functions below take M tokens in this dtype.
bool bf16_gemm_supported(const Packed& w, at::ScalarType dtype, int64_t M);

// y [M, m] = x [M, n] Wᵀ + v [M, r] B [m, r]ᵀ + bias; `plain`: dx [M, n] = dy [M, m] W + c [M, r] A [r, n].
Tensor bf16_gemm(const Packed& w, const Tensor& x, const Tensor& v, const Tensor& factor, const OptionalTensor& bias,
                 bool plain);

// dx [M, n] += dy [M, m] W, added in fp32 and rounded once.
void bf16_gemm_add(const Packed& w, const Tensor& dy, Tensor& dx);

// y [M, columns] in bf16 = sums + bias, if the processor multiplies bf16. Reads up to kBf16Nr past the last sum.
void round_rows(MatrixView sums, int64_t M, int64_t columns, const uint16_t* bias, MutableBf16View y);

}  // namespace lorasb
