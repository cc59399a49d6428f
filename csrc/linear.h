// The adapted linear over a quantised weight: y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias.
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

// dx = dy W + (s·t R) A with t = dy B, and dR = s·tᵀ u; what is not needed is returned empty.
std::tuple<at::Tensor, at::Tensor> linear_backward(const at::Tensor& dy, at::TensorList quant, at::IntArrayRef layout,
                                                   const at::Tensor& a, const at::Tensor& core, const at::Tensor& b,
                                                   const at::Tensor& u, double scaling, double dropout,
                                                   const std::optional<at::Tensor>& seed, bool need_dx,
                                                   bool need_dcore);

}  // namespace lorasb
