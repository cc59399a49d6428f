#include "linear.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "few_tokens.h"
#include "product.h"
#include "quantised.h"
#include "strips.h"

namespace lorasb {
namespace {

// Casts were made and the graph is recorded before the op.
struct Plain {
  at::AutoDispatchBelowAutograd below_autograd;
  c10::impl::ExcludeDispatchKeyGuard without_autocast{c10::autocast_dispatch_keyset};
};

at::Tensor rows_of(const at::Tensor& x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

at::Tensor shaped(const at::Tensor& rows, const at::Tensor& like) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape.back() = rows.size(1);
  return at::_unsafe_view(rows, shape);
}

at::Tensor keep_mask(at::IntArrayRef shape, double dropout, const at::Tensor& seed) {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed.item<int64_t>()));
  return at::empty(shape, at::TensorOptions().dtype(at::kBool)).bernoulli_(1.0 - dropout, generator);
}

// core·scale in x's dtype: its product is rounded to that in any case.
at::Tensor scaled(const at::Tensor& core, double scale, at::ScalarType dtype) {
  return (scale == 1.0 ? core : core * scale).to(dtype);
}

void check_dtype(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
                   "expected x in fp64, fp32, bf16 or fp16, got ", dtype);
}

void check_operands(const at::Tensor& x, int64_t features, const at::Tensor& a, const at::Tensor& core,
                    const at::Tensor& b) {
  check_dtype(x);
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && core.dim() == 2 && a.size(0) == b.size(1) &&
                        core.size(0) == a.size(0) && core.size(1) == a.size(0),
                    "expected A [r, in], R [r, r] and B [out, r], got ", a.sizes(), ", ", core.sizes(), ", ",
                    b.sizes());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == features, "expected [..., ", features, "], got ", x.sizes());
  TORCH_CHECK_TYPE(a.scalar_type() == x.scalar_type() && b.scalar_type() == x.scalar_type(), "expected A and B in ",
                   x.scalar_type(), ", got ", a.scalar_type(), " and ", b.scalar_type());
}

// torch multiplies fp16 on CPUs four times slower than fp32.
std::optional<at::Tensor> widened(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional<at::Tensor>(tensor->to(at::kFloat)) : std::nullopt;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> linear(const at::Tensor& x, at::TensorList quant, at::IntArrayRef layout,
                                          const at::Tensor& a, const at::Tensor& core, const at::Tensor& b,
                                          const std::optional<at::Tensor>& bias, double scaling, double dropout,
                                          const std::optional<at::Tensor>& seed) {
  const Plain plain;
  check_operands(x, a.dim() == 2 ? a.size(1) : 0, a, core, b);
  const Packed w = unpack(quant, layout, b.size(0), a.size(1));
  TORCH_CHECK_VALUE(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == w.rows), "expected a bias [", w.rows,
                    "], got ", bias.has_value() ? bias->sizes() : at::IntArrayRef());
  if (x.scalar_type() == at::kHalf) {
    const auto [y, u] = linear(x.to(at::kFloat), quant, layout, a.to(at::kFloat), core, b.to(at::kFloat), widened(bias),
                               scaling, dropout, seed);
    return {y.to(at::kHalf), u.to(at::kHalf)};
  }
  const at::Tensor rows = rows_of(x);
  if (!seed.has_value() && takes_few_tokens(w, rows, false)) {
    const auto [y, u] = few_tokens(w, rows, a, scaled(core, scaling, x.scalar_type()), b, bias);
    return {shaped(y, x), u};
  }
  double scale = scaling;
  at::Tensor u;
  if (seed.has_value()) {
    u = at::mm(rows * keep_mask(rows.sizes(), dropout, *seed), a.t());
    scale /= 1.0 - dropout;
  } else {
    u = at::mm(rows, a.t());
  }
  const at::Tensor v = at::mm(u, scaled(core, scale, x.scalar_type()).t());
  if (takes_strips(w, rows.scalar_type(), rows.size(0))) return {shaped(strips_product(w, rows, v, b, bias), x), u};
  at::Tensor y = bias.has_value() ? at::addmm(*bias, v, b.t()) : at::mm(v, b.t());
  add_product(w, rows, y);
  return {shaped(y, x), u};
}

std::tuple<at::Tensor, at::Tensor> linear_backward(const at::Tensor& dy, at::TensorList quant, at::IntArrayRef layout,
                                                   const at::Tensor& a, const at::Tensor& core, const at::Tensor& b,
                                                   const at::Tensor& u, double scaling, double dropout,
                                                   const std::optional<at::Tensor>& seed, bool need_dx,
                                                   bool need_dcore) {
  const Plain plain;
  check_operands(dy, b.dim() == 2 ? b.size(0) : 0, a, core, b);
  const Packed w = unpack(quant, layout, b.size(0), a.size(1));
  const auto dtype = dy.scalar_type();
  if (dtype == at::kHalf) {
    const auto [dx, dcore] = linear_backward(dy.to(at::kFloat), quant, layout, a.to(at::kFloat), core, b.to(at::kFloat),
                                             u.to(at::kFloat), scaling, dropout, seed, need_dx, need_dcore);
    return {dx.to(at::kHalf), dcore};
  }
  const at::Tensor rows = rows_of(dy);
  if (!seed.has_value() && takes_few_tokens(w, rows, true)) {
    const auto [dx, t] = few_tokens_backward(w, rows, a, scaled(core, scaling, core.scalar_type()), b, need_dx);
    const at::Tensor nothing = at::empty({0}, core.options());
    const at::Tensor dcore =
        need_dcore ? at::mm(t.t(), u.to(at::kFloat)).mul_(scaling).to(core.scalar_type()) : nothing;
    return {need_dx ? shaped(dx, dy) : at::empty({0}, dy.options()), dcore};
  }
  const double scale = seed.has_value() ? scaling / (1.0 - dropout) : scaling;
  const at::Tensor t = at::mm(rows, b);
  at::Tensor dx = at::empty({0}, dy.options()), dcore = at::empty({0}, core.options());
  if (need_dcore) {
    dcore = dtype == at::kBFloat16 ? at::mm(t.t(), u).to(core.scalar_type())
                                   : at::mm(t.to(core.scalar_type()).t(), u.to(core.scalar_type()));
    if (scale != 1.0) dcore.mul_(scale);
  }
  if (need_dx) {
    const at::Tensor c = at::mm(t, scaled(core, scale, dtype));
    if (!seed.has_value() && takes_strips(w, dtype, rows.size(0))) {
      return {shaped(strips_product_transposed(w, rows, c, a), dy), dcore};
    }
    dx = at::mm(c, a);
    if (seed.has_value()) dx.mul_(keep_mask(dx.sizes(), dropout, *seed));
    add_product_transposed(w, rows, dx);
    dx = shaped(dx, dy);
  }
  return {dx, dcore};
}

}  // namespace lorasb
