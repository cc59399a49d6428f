// Sums of weight gradients and their signs, for the initializer.
#pragma once

#include "gemm/tensors.h"

namespace lorasb {

// total [m, n] = (`fresh`) or += dyᵀ x, in total's dtype, fp32 or fp64; dy [M, m], x [M, n].
void gradient_add(const Tensor& dy, const Tensor& x, Tensor& total, bool fresh);

// G = total + dyᵀ x, or dyᵀ x if `fresh` or without a total. Returns bits of G > 0 and of G != 0 as words
// [m, ceil(n / 32)], and fp64 [3]: Σ G², the number of zeros, and of entries that are not finite. G is stored in total;
// without one, only some rows of G exist at a time.
std::tuple<Tensor, Tensor, Tensor> gradient_signs(const Tensor& dy, const Tensor& x, const OptionalTensor& total,
                                                  bool fresh);

}  // namespace lorasb
