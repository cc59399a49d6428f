// What the ops over dense and quantized weights share: checks of their operands, and rows of tokens.
//
// Checks raise ValueError and TypeError with what was expected and what was received; below ops/ nothing is checked.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <vector>

#include "gemm/tensors.h"

namespace lorasb {

// Within an op, torch's calls are neither recorded by autograd, which records the op itself, nor cast by autocast,
// which has already cast the op's operands.
struct BelowAutograd {
  at::AutoDispatchBelowAutograd below_autograd;
  c10::impl::ExcludeDispatchKeyGuard without_autocast{c10::autocast_dispatch_keyset};
};

// x [..., n] as contiguous rows [M, n].
inline Tensor rows_of(const Tensor& x) { return x.reshape({-1, x.size(-1)}).contiguous(); }

// Rows [M, m] with the leading shape of x or dy: [..., m].
inline Tensor shaped(const Tensor& rows, const Tensor& like) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape.back() = rows.size(1);
  return at::_unsafe_view(rows, shape);
}

// core·scale in x's dtype: products with it are rounded to that in any case.
inline Tensor scaled(const Tensor& core, double scale, at::ScalarType dtype) {
  return (scale == 1.0 ? core : core * scale).to(dtype);
}

// A tensor in fp32: on CPUs torch multiplies fp16 four times slower.
inline OptionalTensor widened(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(tensor->to(at::kFloat)) : std::nullopt;
}

inline void check_dtype(const Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble,
                   "expected x in fp64, fp32, bf16 or fp16, got ", dtype);
}

// The blocked products sum in fp32.
inline void check_not_double(const Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() != at::kDouble, "expected x in fp32, bf16 or fp16, got ", x.scalar_type());
}

inline void check_like(const OptionalTensor& tensor, const Tensor& x, const char* name) {
  if (!tensor.has_value()) return;
  TORCH_CHECK_TYPE(tensor->scalar_type() == x.scalar_type(), "expected ", name, " in x's dtype ", x.scalar_type(),
                   ", got ", tensor->scalar_type(), ": cast one of the two");
  TORCH_CHECK_VALUE(tensor->device() == x.device(), "expected ", name, " on x's device ", x.device(), ", got ",
                    tensor->device(), ": move one of the two");
}

// x [..., in] against A [r, in] and B [out, r]; `plain`, in backward: dy [..., out].
inline void check_factors(const Tensor& x, const Tensor& a, const Tensor& b, bool plain) {
  check_dtype(x);
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(1), "expected A [r, in] and B [out, r], got ",
                    a.sizes(), " and ", b.sizes());
  const int64_t features = plain ? b.size(0) : a.size(1);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == features, "expected [..., ", features, "], got ", x.sizes());
  check_like(a, x, "lora_A");
  check_like(b, x, "lora_B");
}

inline void check_operands(const Tensor& x, const Tensor& a, const Tensor& core, const Tensor& b, bool plain) {
  check_factors(x, a, b, plain);
  TORCH_CHECK_VALUE(core.dim() == 2 && core.size(0) == a.size(0) && core.size(1) == a.size(0),
                    "expected A [r, in], R [r, r] and B [out, r], got ", a.sizes(), ", ", core.sizes(), ", ",
                    b.sizes());
  TORCH_CHECK_TYPE(core.is_floating_point(), "expected lora_R in fp32, got ", core.scalar_type());
  TORCH_CHECK_VALUE(core.device().is_cpu(), "expected lora_R on the CPU, got it on ", core.device());
}

inline void check_weight(const OptionalTensor& weight, const Tensor& x, int64_t rows, int64_t columns) {
  if (!weight.has_value()) return;
  TORCH_CHECK_VALUE(weight->dim() == 2 && weight->size(0) == rows && weight->size(1) == columns, "expected weight [",
                    rows, ", ", columns, "], got ", weight->sizes());
  check_like(weight, x, "weight");
}

inline void check_bias(const OptionalTensor& bias, const Tensor& x, int64_t out_features) {
  TORCH_CHECK_VALUE(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == out_features), "expected a bias [",
                    out_features, "], got ", bias.has_value() ? bias->sizes() : at::IntArrayRef());
  check_like(bias, x, "bias");
}

}  // namespace lorasb
