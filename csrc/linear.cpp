#include "linear.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <array>

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

void check_like(const std::optional<at::Tensor>& tensor, const at::Tensor& x, const char* name) {
  if (!tensor.has_value()) return;
  TORCH_CHECK_TYPE(tensor->scalar_type() == x.scalar_type(), "expected ", name, " in x's dtype ", x.scalar_type(),
                   ", got ", tensor->scalar_type(), ": cast one of the two");
  TORCH_CHECK_VALUE(tensor->device() == x.device(), "expected ", name, " on x's device ", x.device(), ", got ",
                    tensor->device(), ": move one of the two");
}

void check_operands(const at::Tensor& x, int64_t features, const at::Tensor& a, const at::Tensor& core,
                    const at::Tensor& b) {
  check_dtype(x);
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && core.dim() == 2 && a.size(0) == b.size(1) &&
                        core.size(0) == a.size(0) && core.size(1) == a.size(0),
                    "expected A [r, in], R [r, r] and B [out, r], got ", a.sizes(), ", ", core.sizes(), ", ",
                    b.sizes());
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == features, "expected [..., ", features, "], got ", x.sizes());
  check_like(a, x, "lora_A");
  check_like(b, x, "lora_B");
  TORCH_CHECK_TYPE(core.is_floating_point(), "expected lora_R in fp32, got ", core.scalar_type());
  TORCH_CHECK_VALUE(core.device().is_cpu(), "expected lora_R on the CPU, got it on ", core.device());
}

// torch multiplies fp16 on CPUs four times slower than fp32.
std::optional<at::Tensor> widened(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional<at::Tensor>(tensor->to(at::kFloat)) : std::nullopt;
}

// Whether W is rounded to what it was quantised from before it is rounded to a product's dtype.
bool rounds(int64_t from, at::ScalarType dtype) {
  return !(from == 1 && dtype == at::kBFloat16) && !(from == 2 && dtype == at::kHalf);
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
  check_like(bias, x, "bias");
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

at::Tensor serve(const at::Tensor& x, at::TensorList quant, at::IntArrayRef layout, int64_t rows, int64_t columns,
                 const std::optional<at::Tensor>& a, const std::optional<at::Tensor>& core,
                 const std::optional<at::Tensor>& b, const std::optional<at::Tensor>& bias, double scaling) {
  TORCH_CHECK_VALUE(layout.size() == 3, "expected [block, nested block, rounding], got ", layout);
  const bool cast = at::autocast::is_autocast_enabled(at::kCPU) && x.scalar_type() != at::kDouble;
  const at::ScalarType dtype = cast ? at::autocast::get_autocast_dtype(at::kCPU) : x.scalar_type();
  const auto like_x = [&](const std::optional<at::Tensor>& tensor) {
    return cast && tensor.has_value() ? std::optional<at::Tensor>(tensor->to(dtype)) : tensor;
  };
  const std::array<int64_t, 3> now{layout[0], layout[1], rounds(layout[2], dtype) ? layout[2] : 0};
  const at::TensorOptions options = x.options().dtype(dtype);
  const auto empty = [](int64_t high, int64_t wide, const at::TensorOptions& of) {
    return at::empty({high, wide}, of);
  };
  const bool adapted = a.has_value();
  TORCH_CHECK_VALUE(core.has_value() == adapted && b.has_value() == adapted, "expected A, R and B, or none of them");
  TORCH_CHECK_VALUE(!adapted || (a->dim() == 2 && b->dim() == 2 && a->size(1) == columns && b->size(0) == rows),
                    "expected a quantised weight [", adapted ? b->size(0) : rows, ", ", adapted ? a->size(-1) : columns,
                    "], got [", rows, ", ", columns, "]");
  const Plain plain;
  return std::get<0>(linear(cast ? x.to(dtype) : x, quant, now, adapted ? *like_x(a) : empty(0, columns, options),
                            adapted ? *core : empty(0, 0, options.dtype(at::kFloat)),
                            adapted ? *like_x(b) : empty(rows, 0, options), like_x(bias), scaling, 0.0, std::nullopt));
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
