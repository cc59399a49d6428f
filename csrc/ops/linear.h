// The adapted linear over a dense weight where torch's own products are slow: 16 bits on processors that do not
// multiply them, where W is widened to fp32 a packed panel at a time; fp32 where the blocked product was measured to be
// faster than the BLAS; and forward for few tokens in bf16 where the processor multiplies it. All sums are in fp32.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

namespace lorasb {

// True if these ops compute in a dtype. False for 16 bits where the processor multiplies them, and torch with it; the
// ops below do not ask, so that tests reach them everywhere.
bool serves(at::ScalarType dtype);

// y [..., m] and u = x Aᵀ [M, r]; of one member of lorasb::adapted_linear.
std::tuple<at::Tensor, at::Tensor> dense_linear(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                                const at::Tensor& a, const at::Tensor& core, const at::Tensor& b,
                                                const std::optional<at::Tensor>& bias, double scaling, double dropout,
                                                const std::optional<at::Tensor>& seed);

std::tuple<at::Tensor, at::Tensor> dense_linear_backward(const at::Tensor& dy, const std::optional<at::Tensor>& weight,
                                                         const at::Tensor& a, const at::Tensor& core,
                                                         const at::Tensor& b, const at::Tensor& u, double scaling,
                                                         double dropout, const std::optional<at::Tensor>& seed,
                                                         bool need_dx, bool need_dcore);

// As of lorasb::adapted_linear.
std::vector<at::Tensor> dense_group(const at::Tensor& x, at::TensorList weights, at::TensorList a, at::TensorList cores,
                                    at::TensorList b, at::TensorList biases, at::ArrayRef<double> scalings);

std::vector<at::Tensor> dense_group_backward(at::TensorList dys, at::TensorList weights, at::TensorList a,
                                             at::TensorList cores, at::TensorList b, at::TensorList us,
                                             at::ArrayRef<double> scalings, bool need_dx, bool need_dcore);

}  // namespace lorasb
