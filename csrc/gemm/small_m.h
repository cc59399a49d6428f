// The complete adapted linear for a few tokens in bf16 with a quantized weight (AVX512-BF16 and AMX). With one to eight
// tokens, the time is spent on reading W from memory and starting threads, hence:
//
//   forward    y = x Wᵀ + v Bᵀ + bias        two parallel loops: u = x Aᵀ over rows of A; y over rows of W: base,
//                                            adapter and bias in one pass, sums in fp32 that are rounded once
//   backward   dx = dy W + (t core) A        two parallel loops: t = dy B over parts of rows of B; dx over columns of W
//
// W's look-ups feed the products directly: no micro-panel is worth packing. Forward walks over 16 rows of W at a time,
// and x is arranged once in the order in which look-ups yield a row's elements (cpu/bf16_small_m_avx512.h). Backward
// walks over all rows of W for some 512 columns, whose even and odd sums [2][width / 2] stay in a first-level cache.
//
// Threading: a task has its own rows of W (forward) or columns of W (backward), and so complete sums. t, which has few
// columns, is summed over parts of 256 rows whose sums are added in order (add_row_parts).
#pragma once

#include "cpu/packed_weight.h"
#include "gemm/tensors.h"

namespace lorasb {

// True if the functions below support x, or dy.
bool small_m_supported(const Packed& w, const Tensor& x, bool backward);

// y [M, m] = x [M, n] Wᵀ + v Bᵀ + bias and u = x Aᵀ [M, r], with v = u coreᵀ.
TensorPair small_m_forward(const Packed& w, const Tensor& x, const Tensor& a, const Tensor& core, const Tensor& b,
                           const OptionalTensor& bias);

// dx [M, n] = dy [M, m] W + (t core) A, and t = dy B [M, r] in fp32; dx has no rows if it is not needed.
TensorPair small_m_backward(const Packed& w, const Tensor& dy, const Tensor& a, const Tensor& core, const Tensor& b,
                            bool need_dx);

}  // namespace lorasb
