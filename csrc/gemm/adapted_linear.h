// The adapted linear by the blocked product in fp32 (fp32_gemm.h), for any storage of W:
//
//   forward    u = x Aᵀ, v = s·u Rᵀ          y  = x Wᵀ + v Bᵀ + bias
//   backward   t = dy B, c = s·t R           dx = dy W + c A,  dR = s·tᵀ u
//
// y and dx are one sum each, in fp32, that is rounded once. For up to kFewRows tokens and a dense W, nothing is packed:
// every matrix is read once, in place. More tokens than max_packed_tokens are taken part by part. u, v, t and c have
// r columns and stay in fp32.
#pragma once

#include <vector>

#include "gemm/dropout.h"
#include "gemm/fp32_gemm.h"

namespace lorasb {

// A layer, alone or in a group that reads the same x, such as q, k and v.
struct Layer {
  std::optional<Weight> w;  // W of forward, or `plain` of backward; none: the adapter's part alone
  Tensor a, core, b;        // A [r, n] and B [m, r] in x's dtype, R [r, r] in fp32
  double scale;             // Dropout::scale of s
  OptionalTensor bias;
};

// y [M, m] and u = x Aᵀ [M, r], both in x's dtype; u is rounded only for backward.
TensorPair adapted_linear(const Tensor& x, const Layer& layer, const Dropout& dropout);

// y and u of every layer of a group; x is packed once.
std::vector<TensorPair> adapted_group(const Tensor& x, const std::vector<Layer>& layers);

using Gradients = std::tuple<Tensor, std::vector<Tensor>>;

// dx [M, n] = Σ_i dy_i W_i + c_i A_i in one sum, and the dR_i [r, r], of a group; what is not needed is empty. Dropout
// is for a group of one: its mask is applied to the adapter's part of dx and not to the base's.
Gradients adapted_backward(const std::vector<Tensor>& dys, const std::vector<Layer>& layers,
                           const std::vector<Tensor>& us, const Dropout& dropout, bool need_dx, bool need_dcore);

}  // namespace lorasb
