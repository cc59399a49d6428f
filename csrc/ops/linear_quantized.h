// The adapted linear over a quantized weight: y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias, without ever making all of W dense.
//
//   x [..., n], dy [..., m]   fp64, fp32, bf16 or fp16     A [r, n], B [m, r], bias [m]   in x's dtype
//   R = `core` [r, r]         fp32                         `quant`, `layout`              as in unpack
//   s = `scaling`             divided by 1 - probability under dropout, which applies only to the adapter's x
#pragma once

#include "gemm/tensors.h"

namespace lorasb {

// y [..., m] and u = x Aᵀ [M, r].
TensorPair linear(const Tensor& x, at::TensorList quant, at::IntArrayRef layout, const Tensor& a, const Tensor& core,
                  const Tensor& b, const OptionalTensor& bias, double scaling, double probability,
                  const OptionalTensor& seed);

// Only y, without gradients, for generation. No A, R and B means no adapter. `layout` is the storage's. Python's part
// of a call takes as long as the product of one token, so all checks are in this function.
Tensor serve(const Tensor& x, at::TensorList quant, at::IntArrayRef layout, int64_t rows, int64_t columns,
             const OptionalTensor& a, const OptionalTensor& core, const OptionalTensor& b, const OptionalTensor& bias,
             double scaling);

// dx = dy W + (s·t R) A with t = dy B, and dR = s·tᵀ u; what is not needed is returned empty.
TensorPair linear_backward(const Tensor& dy, at::TensorList quant, at::IntArrayRef layout, const Tensor& a,
                           const Tensor& core, const Tensor& b, const Tensor& u, double scaling, double probability,
                           const OptionalTensor& seed, bool need_dx, bool need_dcore);

}  // namespace lorasb
