// The adapted linear over rows of tokens by our own product in fp32, whatever stores W:
// y = x Wᵀ + s·x Aᵀ Rᵀ Bᵀ + bias, in one sum.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "gemm/fp32_gemm.h"

namespace lorasb {

struct Adapter {
  at::Tensor a, core, b;  // A [r, n] and B [m, r] in x's dtype, R [r, r] in fp32
  double scale;           // s, over the probability of being kept under dropout
};

// Of the adapter's input: the mask is made again from its seed in backward.
struct Dropout {
  double probability = 0.0;
  std::optional<at::Tensor> seed;
};

// y [M, m] and u = x Aᵀ [M, r], both in x's dtype; u is rounded for backward alone. `w` has W's rows as lanes; none is
// the adapter's part alone.
std::tuple<at::Tensor, at::Tensor> adapted_linear(const at::Tensor& x, const std::optional<Weight>& w,
                                                  const Adapter& adapter, const std::optional<at::Tensor>& bias,
                                                  const Dropout& dropout);

// dx [M, n] = dy W + (s·t R) A with t = dy B, and dR = s·tᵀ u; what is not needed is empty. `w` has W's columns as
// lanes.
std::tuple<at::Tensor, at::Tensor> adapted_backward(const at::Tensor& dy, const std::optional<Weight>& w,
                                                    const Adapter& adapter, const at::Tensor& u, const Dropout& dropout,
                                                    bool need_dx, bool need_dcore);

// One member of a group that reads the same x: its W as in the calls above, and what belongs to it.
struct Member {
  std::optional<Weight> w;
  Adapter adapter;
};

// y_i and u_i of every member; x is packed once.
std::vector<std::tuple<at::Tensor, at::Tensor>> adapted_group(const at::Tensor& x, const std::vector<Member>& members,
                                                              const std::vector<std::optional<at::Tensor>>& biases);

// dx = Σ_i dy_i W_i + (s_i·t_i R_i) A_i in one sum, and the dR_i.
std::tuple<at::Tensor, std::vector<at::Tensor>> adapted_group_backward(const std::vector<at::Tensor>& dys,
                                                                       const std::vector<Member>& members,
                                                                       const std::vector<at::Tensor>& us, bool need_dx,
                                                                       bool need_dcore);

}  // namespace lorasb
