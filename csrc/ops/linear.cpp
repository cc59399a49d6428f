#include "ops/linear.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "gemm/adapted_linear.h"
#include "gemm/unpacked_gemm.h"
#include "ops/operands.h"

namespace lorasb {
namespace {

// Without a weight the op is the adapter's part alone.
std::optional<Weight> transposed_or_none(const std::optional<at::Tensor>& weight) {
  return weight.has_value() ? std::optional<Weight>(transposed_weight(*weight)) : std::nullopt;
}

std::optional<Weight> plain_or_none(const std::optional<at::Tensor>& weight) {
  return weight.has_value() ? std::optional<Weight>(plain_weight(*weight)) : std::nullopt;
}

// Every argument of a group has one entry for each member.
void check_group(size_t count, std::initializer_list<size_t> sizes) {
  TORCH_CHECK_VALUE(count > 0, "expected one member or more, got none");
  for (const size_t size : sizes) {
    TORCH_CHECK_VALUE(size == count, "expected one of each argument for each of ", count, " members, got ", size);
  }
}

}  // namespace

bool serves(at::ScalarType dtype) {
#ifdef LORASB_X86
  if (dtype == at::kFloat) return kernels().fp32_gemm_beats_blas;
  if (dtype == at::kBFloat16) return kernels().bf16_gemm == nullptr;
  return dtype == at::kHalf && !multiplies_fp16();
#else
  (void)dtype;  // torch has 16-bit products for many other processors, and these ops were not measured there
  return false;
#endif
}

std::tuple<at::Tensor, at::Tensor> dense_linear(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                                const at::Tensor& a, const at::Tensor& core, const at::Tensor& b,
                                                const std::optional<at::Tensor>& bias, double scaling, double dropout,
                                                const std::optional<at::Tensor>& seed) {
  const BelowAutograd below_autograd;
  check_operands(x, a.dim() == 2 ? a.size(1) : 0, a, core, b);
  check_not_double(x);
  check_weight(weight, x, b.size(0), a.size(1));
  check_bias(bias, x, b.size(0));
  const at::Tensor rows = rows_of(x);
  if (weight.has_value() && !seed.has_value() && unpacked_gemm_supported(*weight, rows)) {
    const auto [y, u] =
        unpacked_linear(TokenPanels(rows), *weight, a, times_unpacked(scaled(core, scaling, at::kBFloat16)), b, bias);
    return {shaped(y, x), u};
  }
  const Adapter adapter{a, core, b, seed.has_value() ? scaling / (1.0 - dropout) : scaling};
  const auto [y, u] = adapted_linear(rows, transposed_or_none(weight), adapter, bias, {dropout, seed});
  return {shaped(y, x), u};
}

std::tuple<at::Tensor, at::Tensor> dense_linear_backward(const at::Tensor& dy, const std::optional<at::Tensor>& weight,
                                                         const at::Tensor& a, const at::Tensor& core,
                                                         const at::Tensor& b, const at::Tensor& u, double scaling,
                                                         double dropout, const std::optional<at::Tensor>& seed,
                                                         bool need_dx, bool need_dcore) {
  const BelowAutograd below_autograd;
  check_operands(dy, b.dim() == 2 ? b.size(0) : 0, a, core, b);
  check_not_double(dy);
  check_weight(weight, dy, b.size(0), a.size(1));
  const Adapter adapter{a, core, b, seed.has_value() ? scaling / (1.0 - dropout) : scaling};
  const auto [dx, dcore] =
      adapted_backward(rows_of(dy), plain_or_none(weight), adapter, u, {dropout, seed}, need_dx, need_dcore);
  return {need_dx ? shaped(dx, dy) : dx, dcore};
}

std::vector<at::Tensor> dense_group(const at::Tensor& x, at::TensorList weights, at::TensorList a, at::TensorList cores,
                                    at::TensorList b, at::TensorList biases, at::ArrayRef<double> scalings) {
  const BelowAutograd below_autograd;
  const size_t count = weights.size();
  check_group(count, {a.size(), cores.size(), b.size(), scalings.size(), biases.empty() ? count : biases.size()});
  check_not_double(x);
  std::vector<Member> members;
  std::vector<std::optional<at::Tensor>> bias_list;
  for (size_t i = 0; i < count; ++i) {
    check_operands(x, a[i].dim() == 2 ? a[i].size(1) : 0, a[i], cores[i], b[i]);
    check_weight(weights[i], x, b[i].size(0), a[i].size(1));
    bias_list.push_back(biases.empty() ? std::nullopt : std::optional<at::Tensor>(biases[i]));
    check_bias(bias_list.back(), x, b[i].size(0));
    members.push_back({transposed_weight(weights[i]), {a[i], cores[i], b[i], scalings[i]}});
  }
  const at::Tensor rows = rows_of(x);
  const bool unpacked = std::all_of(weights.begin(), weights.end(),
                                    [&](const at::Tensor& w) { return unpacked_gemm_supported(w, rows); });
  std::vector<std::tuple<at::Tensor, at::Tensor>> results;
  if (unpacked) {
    const TokenPanels panels(rows);
    for (size_t i = 0; i < count; ++i) {
      const at::Tensor core = scaled(cores[i], scalings[i], at::kBFloat16);
      results.push_back(unpacked_linear(panels, weights[i], a[i], times_unpacked(core), b[i], bias_list[i]));
    }
  } else {
    results = adapted_group(rows, members, bias_list);
  }
  std::vector<at::Tensor> ys, us;
  for (const auto& [y, u] : results) {
    ys.push_back(shaped(y, x));
    us.push_back(u);
  }
  // Flat, as the op's schema has it: every y, then every u.
  ys.insert(ys.end(), us.begin(), us.end());
  return ys;
}

std::vector<at::Tensor> dense_group_backward(at::TensorList dys, at::TensorList weights, at::TensorList a,
                                             at::TensorList cores, at::TensorList b, at::TensorList us,
                                             at::ArrayRef<double> scalings, bool need_dx, bool need_dcore) {
  const BelowAutograd below_autograd;
  const size_t count = weights.size();
  check_group(count, {dys.size(), a.size(), cores.size(), b.size(), us.size(), scalings.size()});
  std::vector<Member> members;
  std::vector<at::Tensor> rows;
  for (size_t i = 0; i < count; ++i) {
    check_operands(dys[i], b[i].dim() == 2 ? b[i].size(0) : 0, a[i], cores[i], b[i]);
    check_not_double(dys[i]);
    check_weight(weights[i], dys[i], b[i].size(0), a[i].size(1));
    TORCH_CHECK_VALUE(dys[i].numel() / std::max<int64_t>(1, dys[i].size(-1)) ==
                          dys[0].numel() / std::max<int64_t>(1, dys[0].size(-1)),
                      "expected as many tokens of every member, got ", dys[0].sizes(), " and ", dys[i].sizes());
    members.push_back({plain_weight(weights[i]), {a[i], cores[i], b[i], scalings[i]}});
    rows.push_back(rows_of(dys[i]));
  }
  auto [dx, dcores] = adapted_group_backward(rows, members, us.vec(), need_dx, need_dcore);
  // Flat as well: dx, then every dR.
  std::vector<at::Tensor> results{need_dx ? shaped(dx, dys[0]) : dx};
  results.insert(results.end(), dcores.begin(), dcores.end());
  return results;
}

}  // namespace lorasb
