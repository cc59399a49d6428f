// The adapted linear over a quantized weight: y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias, W never being dense as a whole.
//
//   x [..., n], dy [..., m]   fp64, fp32, bf16 or fp16     A [r, n], B [m, r], bias [m]   in x's dtype
//   R = `core` [r, r]         fp32                         `quant`, `layout`              as of unpack
//   s = `scaling`             divided by 1 - dropout under dropout, which is of the adapter's x alone
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace lorasb {

// y [..., m] and u = x Aᵀ [M, r].
std::tuple<at::Tensor, at::Tensor> linear(const at::Tensor& x, at::TensorList quant, at::IntArrayRef layout,
                                          const at::Tensor& a, const at::Tensor& core, const at::Tensor& b,
                                          const std::optional<at::Tensor>& bias, double scaling, double dropout,
                                          const std::optional<at::Tensor>& seed);

// y alone, without gradients: what generation calls. No A, R and B is no adapter. `layout` is that of the storage, and
// autocast is applied here. Python's part of a call costs as much as the product of one token, so that all checks are
// in this function.
at::Tensor serve(const at::Tensor& x, at::TensorList quant, at::IntArrayRef layout, int64_t rows, int64_t columns,
                 const std::optional<at::Tensor>& a, const std::optional<at::Tensor>& core,
                 const std::optional<at::Tensor>& b, const std::optional<at::Tensor>& bias, double scaling);

// dx = dy W + (s·t R) A with t = dy B, and dR = s·tᵀ u; what is not needed is returned empty.
std::tuple<at::Tensor, at::Tensor> linear_backward(const at::Tensor& dy, at::TensorList quant, at::IntArrayRef layout,
                                                   const at::Tensor& a, const at::Tensor& core, const at::Tensor& b,
                                                   const at::Tensor& u, double scaling, double dropout,
                                                   const std::optional<at::Tensor>& seed, bool need_dx,
                                                   bool need_dcore);

}  // namespace lorasb
