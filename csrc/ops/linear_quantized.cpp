#include "ops/linear_quantized.h"

#include <array>

#include "gemm/adapted_linear.h"
#include "gemm/panel_gemm.h"
#include "gemm/quantized_weight.h"
#include "gemm/small_m.h"
#include "ops/operands.h"

// The product that computes a call: the first that applies.
//
//   takes_fp32_gemm        adapted_linear: base and adapter in one sum, for dtypes that the processor does not multiply
//   fp16                   the same op in fp32
//   small_m_supported      bf16, up to a few tokens, no dropout
//   bf16_gemm_supported    bf16, base and adapter in one sum
//   otherwise              the adapter by torch, and W's part added by panel_gemm
//
// u = x Aᵀ and t = dy B are rounded to x's dtype if torch or bf16_gemm computes the next product.
namespace lorasb {

TensorPair linear(const Tensor& x, at::TensorList quant, at::IntArrayRef layout, const Tensor& a, const Tensor& core,
                  const Tensor& b, const OptionalTensor& bias, double scaling, double probability,
                  const OptionalTensor& seed) {
  const BelowAutograd below_autograd;
  check_operands(x, a, core, b, false);
  const Packed w = unpack(quant, layout, b.size(0), a.size(1));
  check_bias(bias, x, w.rows);
  const auto dtype = x.scalar_type();
  const Dropout dropout{probability, seed};
  const double scale = dropout.scale(scaling);
  const Tensor rows = rows_of(x);
  if (takes_fp32_gemm(w, dtype, rows.size(0))) {
    const auto [y, u] = adapted_linear(rows, {as_weight(w, false), a, core, b, scale, bias}, dropout);
    return {shaped(y, x), u};
  }
  if (dtype == at::kHalf) {
    const auto [y, u] = linear(x.to(at::kFloat), quant, layout, a.to(at::kFloat), core, b.to(at::kFloat), widened(bias),
                               scaling, probability, seed);
    return {y.to(at::kHalf), u.to(at::kHalf)};
  }
  if (!seed.has_value() && small_m_supported(w, rows, false)) {
    const auto [y, u] = small_m_forward(w, rows, a, scaled(core, scaling, dtype), b, bias);
    return {shaped(y, x), u};
  }
  const OptionalTensor mask = dropout.mask(rows.sizes());  // for the adapter's input only
  const Tensor u = at::mm(mask.has_value() ? rows * *mask : rows, a.t());
  const Tensor v = at::mm(u, scaled(core, scale, dtype).t());
  return {shaped(base_and_adapter(w, rows, v, b, bias, false), x), u};
}

Tensor serve(const Tensor& x, at::TensorList quant, at::IntArrayRef layout, int64_t rows, int64_t columns,
             const OptionalTensor& a, const OptionalTensor& core, const OptionalTensor& b, const OptionalTensor& bias,
             double scaling) {
  TORCH_CHECK_VALUE(layout.size() == 3, "expected [block, nested block, rounding], got ", layout);
  const at::ScalarType dtype = x.scalar_type();
  // rounding W to the dtype that it was quantized from, and then to x's, is one rounding where they are the same
  const auto rounding = static_cast<Rounding>(layout[2]);
  const bool same =
      (rounding == Rounding::bf16 && dtype == at::kBFloat16) || (rounding == Rounding::fp16 && dtype == at::kHalf);
  const std::array<int64_t, 3> call_layout{layout[0], layout[1], same ? 0 : layout[2]};
  const bool adapted = a.has_value();
  TORCH_CHECK_VALUE(core.has_value() == adapted && b.has_value() == adapted, "expected A, R and B, or none of them");
  TORCH_CHECK_VALUE(!adapted || (a->dim() == 2 && b->dim() == 2 && a->size(1) == columns && b->size(0) == rows),
                    "expected a quantized weight [", adapted ? b->size(0) : rows, ", ", adapted ? a->size(-1) : columns,
                    "], got [", rows, ", ", columns, "]");
  const BelowAutograd below_autograd;
  // without an adapter: factors of rank 0
  return std::get<0>(linear(x, quant, call_layout, adapted ? *a : at::empty({0, columns}, x.options()),
                            adapted ? *core : at::empty({0, 0}, x.options().dtype(at::kFloat)),
                            adapted ? *b : at::empty({rows, 0}, x.options()), bias, scaling, 0.0, std::nullopt));
}

TensorPair linear_backward(const Tensor& dy, at::TensorList quant, at::IntArrayRef layout, const Tensor& a,
                           const Tensor& core, const Tensor& b, const Tensor& u, double scaling, double probability,
                           const OptionalTensor& seed, bool need_dx, bool need_dcore) {
  const BelowAutograd below_autograd;
  check_operands(dy, a, core, b, true);
  const Packed w = unpack(quant, layout, b.size(0), a.size(1));
  const auto dtype = dy.scalar_type();
  const Dropout dropout{probability, seed};
  const double scale = dropout.scale(scaling);
  const Tensor rows = rows_of(dy);
  if (takes_fp32_gemm(w, dtype, rows.size(0))) {
    const Layer layer{as_weight(w, true), a, core, b, scale, std::nullopt};
    const auto [dx, dcores] = adapted_backward({rows}, {layer}, {u}, dropout, need_dx, need_dcore);
    return {need_dx ? shaped(dx, dy) : dx, dcores.front()};
  }
  if (dtype == at::kHalf) {
    const auto [dx, dcore] = linear_backward(dy.to(at::kFloat), quant, layout, a.to(at::kFloat), core, b.to(at::kFloat),
                                             u.to(at::kFloat), scaling, probability, seed, need_dx, need_dcore);
    return {dx.to(at::kHalf), dcore};
  }
  Tensor dx = at::empty({0}, dy.options()), dcore = at::empty({0}, core.options());
  if (!seed.has_value() && small_m_supported(w, rows, true)) {
    const auto [few_dx, t] = small_m_backward(w, rows, a, scaled(core, scaling, core.scalar_type()), b, need_dx);
    if (need_dcore) dcore = at::mm(t.t(), u.to(at::kFloat)).mul_(scaling).to(core.scalar_type());
    return {need_dx ? shaped(few_dx, dy) : dx, dcore};
  }
  const Tensor t = at::mm(rows, b);
  if (need_dcore) {
    // The BLAS sums products of bf16 operands in fp32; wider operands are multiplied in the core's dtype.
    dcore = dtype == at::kBFloat16 ? at::mm(t.t(), u).to(core.scalar_type())
                                   : at::mm(t.to(core.scalar_type()).t(), u.to(core.scalar_type()));
    if (scale != 1.0) dcore.mul_(scale);
  }
  if (need_dx) {
    const Tensor c = at::mm(t, scaled(core, scale, dtype));
    if (seed.has_value()) {
      dx = at::mm(c, a);
      dx.mul_(*dropout.mask(dx.sizes()));
      panel_gemm_add(w, rows, dx, true);
    } else {
      dx = base_and_adapter(w, rows, c, a, std::nullopt, true);
    }
    dx = shaped(dx, dy);
  }
  return {dx, dcore};
}

}  // namespace lorasb
