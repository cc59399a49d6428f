#include "ops/linear.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "gemm/adapted_linear.h"
#include "gemm/unpacked_gemm.h"
#include "ops/operands.h"

namespace lorasb {
namespace {

// A layer of checked operands; `plain` for backward, where x is dy.
Layer checked_layer(const Tensor& x, const OptionalTensor& weight, const Tensor& a, const Tensor& core, const Tensor& b,
                    const OptionalTensor& bias, double scale, bool plain) {
  check_operands(x, a, core, b, plain);
  check_not_double(x);
  check_weight(weight, x, b.size(0), a.size(1));
  check_bias(bias, x, b.size(0));
  Layer layer{std::nullopt, a, core, b, scale, bias};
  if (weight.has_value()) layer.w = as_weight(*weight, plain);
  return layer;
}

// Every argument of a group has one entry for each member.
void check_group(size_t count, std::initializer_list<size_t> sizes) {
  TORCH_CHECK_VALUE(count > 0, "expected one member or more, got none");
  for (const size_t size : sizes) {
    TORCH_CHECK_VALUE(size == count, "expected one of each argument for each of ", count, " members, got ", size);
  }
}

TensorPair unpacked_layer(const TokenPanels& x, const Tensor& weight, const Layer& layer) {
  const Tensor core = scaled(layer.core, layer.scale, at::kBFloat16).contiguous();
  const auto times_core = [&](const Tensor& u) {
    return unpacked_sum({TokenPanels(u).times(core)}, u.size(0), u.size(1));
  };
  return unpacked_linear(x, weight, layer.a, times_core, layer.b, layer.bias);
}

}  // namespace

bool serves(at::ScalarType dtype) {
#ifdef LORASB_X86
  if (dtype == at::kFloat) return kernels().fp32_gemm_beats_blas;
  if (dtype == at::kBFloat16) return !kernels().multiplies_bf16();
  return dtype == at::kHalf && !multiplies_fp16();
#else
  (void)dtype;  // torch has 16-bit products for many other processors, and these ops were not measured there
  return false;
#endif
}

TensorPair dense_linear(const Tensor& x, const OptionalTensor& weight, const Tensor& a, const Tensor& core,
                        const Tensor& b, const OptionalTensor& bias, double scaling, double probability,
                        const OptionalTensor& seed) {
  const BelowAutograd below_autograd;
  const Dropout dropout{probability, seed};
  const Layer layer = checked_layer(x, weight, a, core, b, bias, dropout.scale(scaling), false);
  const Tensor rows = rows_of(x);
  const bool unpacked = weight.has_value() && !seed.has_value() && unpacked_gemm_supported(*weight, rows);
  const auto [y, u] =
      unpacked ? unpacked_layer(TokenPanels(rows), *weight, layer) : adapted_linear(rows, layer, dropout);
  return {shaped(y, x), u};
}

TensorPair dense_linear_backward(const Tensor& dy, const OptionalTensor& weight, const Tensor& a, const Tensor& core,
                                 const Tensor& b, const Tensor& u, double scaling, double probability,
                                 const OptionalTensor& seed, bool need_dx, bool need_dcore) {
  const BelowAutograd below_autograd;
  const Dropout dropout{probability, seed};
  const Layer layer = checked_layer(dy, weight, a, core, b, std::nullopt, dropout.scale(scaling), true);
  const auto [dx, dcores] = adapted_backward({rows_of(dy)}, {layer}, {u}, dropout, need_dx, need_dcore);
  return {need_dx ? shaped(dx, dy) : dx, dcores.front()};
}

std::vector<Tensor> dense_group(const Tensor& x, at::TensorList weights, at::TensorList a, at::TensorList cores,
                                at::TensorList b, at::TensorList biases, at::ArrayRef<double> scalings) {
  const BelowAutograd below_autograd;
  const size_t count = weights.size();
  check_group(count, {a.size(), cores.size(), b.size(), scalings.size(), biases.empty() ? count : biases.size()});
  std::vector<Layer> layers;
  for (size_t i = 0; i < count; ++i) {
    const OptionalTensor bias = biases.empty() ? std::nullopt : OptionalTensor(biases[i]);
    layers.push_back(checked_layer(x, weights[i], a[i], cores[i], b[i], bias, scalings[i], false));
  }
  const Tensor rows = rows_of(x);
  std::vector<TensorPair> results;
  if (std::all_of(weights.begin(), weights.end(), [&](const Tensor& w) { return unpacked_gemm_supported(w, rows); })) {
    const TokenPanels panels(rows);
    for (size_t i = 0; i < count; ++i) results.push_back(unpacked_layer(panels, weights[i], layers[i]));
  } else {
    results = adapted_group(rows, layers);
  }
  std::vector<Tensor> ys, us;
  for (const auto& [y, u] : results) {
    ys.push_back(shaped(y, x));
    us.push_back(u);
  }
  // Flat, as the op's schema has it: every y, then every u.
  ys.insert(ys.end(), us.begin(), us.end());
  return ys;
}

std::vector<Tensor> dense_group_backward(at::TensorList dys, at::TensorList weights, at::TensorList a,
                                         at::TensorList cores, at::TensorList b, at::TensorList us,
                                         at::ArrayRef<double> scalings, bool need_dx, bool need_dcore) {
  const BelowAutograd below_autograd;
  const size_t count = weights.size();
  check_group(count, {dys.size(), a.size(), cores.size(), b.size(), us.size(), scalings.size()});
  std::vector<Layer> layers;
  std::vector<Tensor> rows;
  for (size_t i = 0; i < count; ++i) {
    layers.push_back(checked_layer(dys[i], weights[i], a[i], cores[i], b[i], std::nullopt, scalings[i], true));
    rows.push_back(rows_of(dys[i]));
    TORCH_CHECK_VALUE(rows[i].size(0) == rows[0].size(0), "expected the same number of tokens from every member, got ",
                      dys[0].sizes(), " and ", dys[i].sizes());
  }
  const auto [dx, dcores] = adapted_backward(rows, layers, us.vec(), {}, need_dx, need_dcore);
  // Flat as well: dx, then every dR.
  std::vector<Tensor> results{need_dx ? shaped(dx, dys[0]) : dx};
  results.insert(results.end(), dcores.begin(), dcores.end());
  return results;
}

}  // namespace lorasb
