// The whole op for a few tokens in bf16, where memory and the start of threads are what counts.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "cpu/packed_weight.h"

namespace lorasb {

// Whether the functions below take x, or dy.
bool takes_few_tokens(const Packed& w, const at::Tensor& x, bool backward);

// y [M, m] = x [M, n] Wᵀ + v Bᵀ + bias and u = x Aᵀ [M, r], with v = u core ᵀ.
std::tuple<at::Tensor, at::Tensor> few_tokens(const Packed& w, const at::Tensor& x, const at::Tensor& a,
                                              const at::Tensor& core, const at::Tensor& b,
                                              const std::optional<at::Tensor>& bias);

// dx [M, n] = dy [M, m] W + (t core) A, and t = dy B [M, r] in fp32.
std::tuple<at::Tensor, at::Tensor> few_tokens_backward(const Packed& w, const at::Tensor& dy, const at::Tensor& a,
                                                       const at::Tensor& core, const at::Tensor& b, bool need_dx);

}  // namespace lorasb
