// Sums of weight gradients and their signs, for the initializer.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace lorasb {

// total [m, n] (+)= dyᵀ x, in total's dtype; dy [M, m], x [M, n].
void gradient_add(const at::Tensor& dy, const at::Tensor& x, at::Tensor& total, bool fresh);

// Signs and nonzero places of total + dyᵀ x as words [m, ceil(n / 32)], and Σ G², zeros, not finite. total gets the
// sum; without one it exists some rows at a time.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gradient_signs(const at::Tensor& dy, const at::Tensor& x,
                                                              const std::optional<at::Tensor>& total, bool fresh);

}  // namespace lorasb
