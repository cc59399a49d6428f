// Sums of weight gradients and their signs, for the initializer.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace lorasb {

// total [m, n] = (`fresh`) or += dyᵀ x, in total's dtype, fp32 or fp64; dy [M, m], x [M, n].
void gradient_add(const at::Tensor& dy, const at::Tensor& x, at::Tensor& total, bool fresh);

// G = total + dyᵀ x, or dyᵀ x if `fresh` or without a total. Returns bits of G > 0 and of G != 0 as words
// [m, ceil(n / 32)], and fp64 [3]: Σ G², the number of zeros, and of entries that are not finite. total gets G; without
// one G exists some rows at a time.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gradient_signs(const at::Tensor& dy, const at::Tensor& x,
                                                              const std::optional<at::Tensor>& total, bool fresh);

}  // namespace lorasb
