#include "ops/linear_quantized.h"

#include <array>

#include "gemm/adapted_linear.h"
#include "gemm/bf16_gemm.h"
#include "gemm/dropout.h"
#include "gemm/panel_gemm.h"
#include "gemm/quantized_weight.h"
#include "gemm/small_m.h"
#include "ops/operands.h"

// Which product serves a call; the first that takes it:
//
//   takes_fp32_gemm        adapted_linear: base and adapter in one sum, for dtypes that the processor does not multiply
//   fp16                   the same op in fp32
//   small_m_supported      bf16, up to a few tokens, no dropout
//   bf16_gemm_supported    bf16, base and adapter in one sum
//   otherwise              the adapter by torch, and W's part added by panel_gemm
//
// u = x Aᵀ and t = dy B are rounded to x's dtype where torch or bf16_gemm multiplies on with them.
namespace lorasb {
namespace {

// torch multiplies fp16 on CPUs four times slower than fp32.
std::optional<at::Tensor> widened(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional<at::Tensor>(tensor->to(at::kFloat)) : std::nullopt;
}

// True if rounding W to the dtype that it was quantized from differs from rounding it to a product's dtype alone.
bool rounds_twice(int64_t rounding, at::ScalarType dtype) {
  const bool same = (static_cast<Rounding>(rounding) == Rounding::bf16 && dtype == at::kBFloat16) ||
                    (static_cast<Rounding>(rounding) == Rounding::fp16 && dtype == at::kHalf);
  return !same;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> linear(const at::Tensor& x, at::TensorList quant, at::IntArrayRef layout,
                                          const at::Tensor& a, const at::Tensor& core, const at::Tensor& b,
                                          const std::optional<at::Tensor>& bias, double scaling, double dropout,
                                          const std::optional<at::Tensor>& seed) {
  const BelowAutograd below_autograd;
  check_operands(x, a.dim() == 2 ? a.size(1) : 0, a, core, b);
  const Packed w = unpack(quant, layout, b.size(0), a.size(1));
  check_bias(bias, x, w.rows);
  if (takes_fp32_gemm(w, x.scalar_type(), x.numel() / std::max<int64_t>(1, x.size(-1)))) {
    const at::Tensor rows = rows_of(x);
    const Adapter adapter{a, core, b, seed.has_value() ? scaling / (1.0 - dropout) : scaling};
    const auto [y, u] = adapted_linear(rows, transposed_weight(w), adapter, bias, {dropout, seed});
    return {shaped(y, x), u};
  }
  if (x.scalar_type() == at::kHalf) {
    const auto [y, u] = linear(x.to(at::kFloat), quant, layout, a.to(at::kFloat), core, b.to(at::kFloat), widened(bias),
                               scaling, dropout, seed);
    return {y.to(at::kHalf), u.to(at::kHalf)};
  }
  const at::Tensor rows = rows_of(x);
  if (!seed.has_value() && small_m_supported(w, rows, false)) {
    const auto [y, u] = small_m_forward(w, rows, a, scaled(core, scaling, x.scalar_type()), b, bias);
    return {shaped(y, x), u};
  }
  double scale = scaling;
  at::Tensor u;
  if (seed.has_value()) {  // dropout is of the adapter's input alone
    u = at::mm(rows * keep_mask(rows.sizes(), dropout, *seed), a.t());
    scale /= 1.0 - dropout;
  } else {
    u = at::mm(rows, a.t());
  }
  const at::Tensor v = at::mm(u, scaled(core, scale, x.scalar_type()).t());
  if (bf16_gemm_supported(w, rows.scalar_type(), rows.size(0))) return {shaped(bf16_gemm(w, rows, v, b, bias), x), u};
  at::Tensor y = bias.has_value() ? at::addmm(*bias, v, b.t()) : at::mm(v, b.t());
  panel_gemm_add(w, rows, y);
  return {shaped(y, x), u};
}

at::Tensor serve(const at::Tensor& x, at::TensorList quant, at::IntArrayRef layout, int64_t rows, int64_t columns,
                 const std::optional<at::Tensor>& a, const std::optional<at::Tensor>& core,
                 const std::optional<at::Tensor>& b, const std::optional<at::Tensor>& bias, double scaling) {
  TORCH_CHECK_VALUE(layout.size() == 3, "expected [block, nested block, rounding], got ", layout);
  const bool cast = at::autocast::is_autocast_enabled(at::kCPU) && x.scalar_type() != at::kDouble;
  const at::ScalarType dtype = cast ? at::autocast::get_autocast_dtype(at::kCPU) : x.scalar_type();
  const auto like_x = [&](const std::optional<at::Tensor>& tensor) {
    return cast && tensor.has_value() ? std::optional<at::Tensor>(tensor->to(dtype)) : tensor;
  };
  const std::array<int64_t, 3> call_layout{layout[0], layout[1], rounds_twice(layout[2], dtype) ? layout[2] : 0};
  const at::TensorOptions options = x.options().dtype(dtype);
  // Without an adapter: factors of rank 0.
  const auto empty = [](int64_t factor_rows, int64_t factor_columns, const at::TensorOptions& factor_options) {
    return at::empty({factor_rows, factor_columns}, factor_options);
  };
  const bool adapted = a.has_value();
  TORCH_CHECK_VALUE(core.has_value() == adapted && b.has_value() == adapted, "expected A, R and B, or none of them");
  TORCH_CHECK_VALUE(!adapted || (a->dim() == 2 && b->dim() == 2 && a->size(1) == columns && b->size(0) == rows),
                    "expected a quantized weight [", adapted ? b->size(0) : rows, ", ", adapted ? a->size(-1) : columns,
                    "], got [", rows, ", ", columns, "]");
  const BelowAutograd below_autograd;
  return std::get<0>(linear(cast ? x.to(dtype) : x, quant, call_layout,
                            adapted ? *like_x(a) : empty(0, columns, options),
                            adapted ? *core : empty(0, 0, options.dtype(at::kFloat)),
                            adapted ? *like_x(b) : empty(rows, 0, options), like_x(bias), scaling, 0.0, std::nullopt));
}

std::tuple<at::Tensor, at::Tensor> linear_backward(const at::Tensor& dy, at::TensorList quant, at::IntArrayRef layout,
                                                   const at::Tensor& a, const at::Tensor& core, const at::Tensor& b,
                                                   const at::Tensor& u, double scaling, double dropout,
                                                   const std::optional<at::Tensor>& seed, bool need_dx,
                                                   bool need_dcore) {
  const BelowAutograd below_autograd;
  check_operands(dy, b.dim() == 2 ? b.size(0) : 0, a, core, b);
  const Packed w = unpack(quant, layout, b.size(0), a.size(1));
  const auto dtype = dy.scalar_type();
  if (takes_fp32_gemm(w, dtype, dy.numel() / std::max<int64_t>(1, dy.size(-1)))) {
    const Adapter adapter{a, core, b, seed.has_value() ? scaling / (1.0 - dropout) : scaling};
    const auto [dx, dcore] =
        adapted_backward(rows_of(dy), plain_weight(w), adapter, u, {dropout, seed}, need_dx, need_dcore);
    return {need_dx ? shaped(dx, dy) : dx, dcore};
  }
  if (dtype == at::kHalf) {
    const auto [dx, dcore] = linear_backward(dy.to(at::kFloat), quant, layout, a.to(at::kFloat), core, b.to(at::kFloat),
                                             u.to(at::kFloat), scaling, dropout, seed, need_dx, need_dcore);
    return {dx.to(at::kHalf), dcore};
  }
  const at::Tensor rows = rows_of(dy);
  if (!seed.has_value() && small_m_supported(w, rows, true)) {
    const auto [dx, t] = small_m_backward(w, rows, a, scaled(core, scaling, core.scalar_type()), b, need_dx);
    const at::Tensor dcore = need_dcore ? at::mm(t.t(), u.to(at::kFloat)).mul_(scaling).to(core.scalar_type())
                                        : at::empty({0}, core.options());
    return {need_dx ? shaped(dx, dy) : at::empty({0}, dy.options()), dcore};
  }
  const double scale = seed.has_value() ? scaling / (1.0 - dropout) : scaling;
  const at::Tensor t = at::mm(rows, b);
  at::Tensor dx = at::empty({0}, dy.options()), dcore = at::empty({0}, core.options());
  if (need_dcore) {
    // bf16 operands have fp32 sums in the BLAS; what is wider is multiplied in the core's dtype.
    dcore = dtype == at::kBFloat16 ? at::mm(t.t(), u).to(core.scalar_type())
                                   : at::mm(t.to(core.scalar_type()).t(), u.to(core.scalar_type()));
    if (scale != 1.0) dcore.mul_(scale);
  }
  if (need_dx) {
    const at::Tensor c = at::mm(t, scaled(core, scale, dtype));
    if (!seed.has_value() && bf16_gemm_supported(w, dtype, rows.size(0))) {
      return {shaped(bf16_gemm_transposed(w, rows, c, a), dy), dcore};
    }
    dx = at::mm(c, a);
    if (seed.has_value()) dx.mul_(keep_mask(dx.sizes(), dropout, *seed));
    panel_gemm_transposed_add(w, rows, dx);
    dx = shaped(dx, dy);
  }
  return {dx, dcore};
}

}  // namespace lorasb
