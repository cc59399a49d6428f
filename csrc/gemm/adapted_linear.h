// The adapted linear by the blocked product in fp32 (fp32_gemm.h), whatever stores W:
//
//   forward    u = x Aᵀ, v = s·u Rᵀ          y  = x Wᵀ + v Bᵀ + bias
//   backward   t = dy B, c = s·t R           dx = dy W + c A,  dR = s·tᵀ u
//
// y and dx are one sum each, in fp32, that is rounded once. Up to kFewRows tokens and a dense W nothing is packed:
// every matrix is read once, in place. More tokens than max_packed_tokens are taken part by part. u, v, t and c have
// r columns and stay in fp32.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "gemm/fp32_gemm.h"

namespace lorasb {

struct Adapter {
  at::Tensor a, core, b;  // A [r, n] and B [m, r] in x's dtype, R [r, r] in fp32
  double scale;           // s, divided by 1 - p under dropout
};

// Dropout of the adapter's input: backward draws the same mask again from the seed.
struct Dropout {
  double probability = 0.0;
  std::optional<at::Tensor> seed;
};

// y [M, m] and u = x Aᵀ [M, r], both in x's dtype; u is rounded for backward alone. `w` is a transposed_weight; without
// it y is the adapter's part alone.
std::tuple<at::Tensor, at::Tensor> adapted_linear(const at::Tensor& x, const std::optional<Weight>& w,
                                                  const Adapter& adapter, const std::optional<at::Tensor>& bias,
                                                  const Dropout& dropout);

// dx [M, n] and dR [r, r]; what is not needed is empty. `w` is a plain_weight.
std::tuple<at::Tensor, at::Tensor> adapted_backward(const at::Tensor& dy, const std::optional<Weight>& w,
                                                    const Adapter& adapter, const at::Tensor& u, const Dropout& dropout,
                                                    bool need_dx, bool need_dcore);

// A layer of a group that reads the same x, such as q, k and v.
struct Member {
  std::optional<Weight> w;
  Adapter adapter;
};

// y_i and u_i of every member; x is packed once.
std::vector<std::tuple<at::Tensor, at::Tensor>> adapted_group(const at::Tensor& x, const std::vector<Member>& members,
                                                              const std::vector<std::optional<at::Tensor>>& biases);

// dx = Σ_i dy_i W_i + c_i A_i in one sum, and the dR_i.
std::tuple<at::Tensor, std::vector<at::Tensor>> adapted_group_backward(const std::vector<at::Tensor>& dys,
                                                                       const std::vector<Member>& members,
                                                                       const std::vector<at::Tensor>& us, bool need_dx,
                                                                       bool need_dcore);

}  // namespace lorasb
