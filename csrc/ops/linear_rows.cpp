#include "ops/linear_rows.h"

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "gemm/bf16_gemm.h"
#include "gemm/fp32_gemm.h"
#include "gemm/panel_gemm.h"
#include "gemm/quantized_weight.h"
#include "gemm/small_m.h"
#include "gemm/unpacked_gemm.h"
#include "ops/linear.h"
#include "ops/operands.h"

namespace lorasb {
namespace {

// Sum of X_t W_t over terms, in a dtype. Too many tokens to pack at once are taken part by part, as in adapted_linear.
Tensor sum_of_products(const std::vector<std::pair<Tensor, Weight>>& terms, at::ScalarType dtype,
                       const OptionalTensor& bias) {
  const auto& [x, w] = terms.front();
  const int64_t tokens = x.size(0);
  if (tokens <= kFewRows && w.packed == nullptr) {
    Tensor sums = at::zeros({tokens, w.n()}, x.options().dtype(at::kFloat));
    for (const auto& [left, right] : terms) add_few_tokens(left, right, sums);
    if (bias.has_value()) sums.add_(*bias);
    return sums.to(dtype);
  }
  std::vector<Tensor> parts;
  over_parts(tokens, w.k(), [&](int64_t low, int64_t count) {
    std::vector<PackedTokens> packed;
    std::vector<Term> operands;
    packed.reserve(terms.size());  // operands refer to its elements: they must not move
    for (const auto& [left, right] : terms) {
      packed.push_back(pack_tokens(left.narrow(0, low, count), packed.empty()));  // one operand at a time in scratch
      operands.push_back({&packed.back(), &right});
    }
    parts.push_back(fp32_gemm(operands, dtype, bias));
  });
  return joined(parts);
}

// For fp32, or 16 bits that the processor multiplies: by small_m where it supports the call.
Tensor over_panels(const Packed& w, const Tensor& x, const Tensor& v, const Tensor& factor, const OptionalTensor& bias,
                   bool plain) {
  const Tensor like_x = v.to(x.scalar_type());
  if (!small_m_supported(w, x, plain)) return base_and_adapter(w, x, like_x, factor, bias, plain);
  const Tensor none_a = x.new_empty({0, w.columns}), none_b = x.new_empty({w.rows, 0}), none = x.new_empty({0, 0});
  Tensor y = plain ? std::get<0>(small_m_backward(w, x, none_a, none.to(at::kFloat), none_b, true))
                   : std::get<0>(small_m_forward(w, x, none_a, none, none_b, bias));
  return y.addmm_(like_x, plain ? factor : factor.t());
}

void check_cores(const Tensor& left, const Tensor& cores, const Tensor& index) {
  TORCH_CHECK_VALUE(left.dim() == 2 && cores.dim() == 3 && cores.size(1) == left.size(1) &&
                        cores.size(2) == left.size(1) && index.dim() == 1,
                    "expected left [M, r], cores [K, r, r] and index [n], got ", left.sizes(), ", ", cores.sizes(),
                    " and ", index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "expected index in int64, got ", index.scalar_type());
  TORCH_CHECK_VALUE(index.size(0) > 0 ? left.size(0) % index.size(0) == 0 : left.size(0) == 0,
                    "expected the same number of tokens in each of ", index.size(0), " rows, got ", left.size(0),
                    " tokens in all");
  const auto dtype = cores.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "expected cores in fp32, bf16 or fp16, got ", dtype);
  const int64_t r = cores.size(2);  // strides of a single element say nothing
  TORCH_CHECK_VALUE(r <= 1 || cores.numel() == 0 || (cores.stride(2) == 1 && cores.stride(1) == r),
                    "expected each R contiguous, got strides ", cores.strides());
}

// x [M, features] by a factor [other, features], or [features, other] if `plain`.
void check_product(const Tensor& x, const Tensor& factor, bool plain) {
  check_dtype(x);
  check_not_double(x);
  check_not_double(factor);
  TORCH_CHECK_VALUE(
      x.dim() == 2 && factor.dim() == 2 && x.size(1) == factor.size(plain ? 0 : 1),
      plain ? "expected x [M, k] and a factor [k, n], got " : "expected x [M, k] and a factor [n, k], got ", x.sizes(),
      " and ", factor.sizes());
  TORCH_CHECK_VALUE(x.device().is_cpu() && factor.device().is_cpu(), "expected both on the CPU, got ", x.device(),
                    " and ", factor.device());
}

// The rows of a batch, each of `tokens` tokens, whose R's are multiplied one after the other. R's of a bank are
// megabytes apart, and each is too short for the hardware prefetcher: the next one is prefetched during a product.
struct RowsOfCores {
  const int64_t* index;
  const char* cores;
  int64_t bytes, size;  // from one R to the next, as a bank has gaps; of one R
  int64_t tokens;

  // Calls multiply(first, count, core) for up to kFewRows tokens at a time of rows [begin, end) that have an R.
  template <typename F>
  void each(int64_t begin, int64_t end, const F& multiply) const {
    for (int64_t i = begin; i < end; ++i) {
      if (i + 1 < end && index[i + 1] >= 0) prefetch_bytes(cores + index[i + 1] * bytes, size);
      if (index[i] < 0) continue;
      for (int64_t low = i * tokens; low < (i + 1) * tokens; low += kFewRows) {
        multiply(low, std::min<int64_t>(kFewRows, (i + 1) * tokens - low), cores + index[i] * bytes);
      }
    }
  }
};

// left_i · s·R_kᵀ of left and cores in bf16 where the processor multiplies it: sums in fp32, rounded once.
Tensor times_cores_in_bf16(const Tensor& left, const RowsOfCores& rows, int64_t n, double scale) {
  const int64_t r = left.size(1);
  const Tensor src = left.contiguous();
  Tensor v = at::zeros(left.sizes(), left.options());
  uint16_t* dst = mutable_bits(v);
  at::parallel_for(0, n, grain(rows.tokens * r * r), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(kFewRows * r + kBf16Nr);  // `round_rows` reads whole vectors
    rows.each(begin, end, [&](int64_t low, int64_t count, const char* core) {
      kernels().dense_dot_bf16({bits(src) + low * r, r}, count, {reinterpret_cast<const uint16_t*>(core), r}, r, {0, r},
                               false, {sums.data(), r});
      if (scale != 1.0) {
        for (int64_t j = 0; j < count * r; ++j) sums[j] *= static_cast<float>(scale);
      }
      round_rows({sums.data(), r}, count, r, nullptr, {dst + low * r, r});
    });
  });
  return v;
}

// The kernels do not check what they read: this is the last check before them.
void check_range(const Tensor& index, int64_t count) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.size(0); ++i) {
    TORCH_CHECK_INDEX(values[i] >= -1 && values[i] < count, "expected index in [-1, ", count, "), one of ", count,
                      " adapters or -1 for none, got ", values[i]);
  }
}

}  // namespace

Tensor thin_product(const Tensor& x, const Tensor& factor, bool plain) {
  const BelowAutograd below_autograd;
  check_product(x, factor, plain);
  // a gradient may be an expanded or transposed view, and packing reads only contiguous rows
  return sum_of_products({{x.contiguous(), as_weight(factor.contiguous(), plain)}}, at::kFloat, std::nullopt);
}

Tensor times_cores(const Tensor& left, const Tensor& cores, const Tensor& index, double scale, bool plain) {
  const BelowAutograd below_autograd;
  check_cores(left, cores, index);
  const int64_t n = index.size(0), r = left.size(1), tokens = n > 0 ? left.size(0) / n : 0;
  const Tensor order = index.contiguous();
  check_range(order, cores.size(0));
  const Element element = element_of(cores.scalar_type());
  const RowsOfCores of_rows{order.const_data_ptr<int64_t>(), static_cast<const char*>(cores.const_data_ptr()),
                            cores.stride(0) * size_of(element), r * r * size_of(element), tokens};
  if (!plain && left.scalar_type() == at::kBFloat16 && element == Element::bf16 &&
      kernels().dense_dot_bf16 != nullptr) {
    return times_cores_in_bf16(left, of_rows, n, scale);
  }
  const Tensor rows = left.to(at::kFloat).contiguous();
  Tensor sums = at::zeros({left.size(0), r}, rows.options());
  const float* src = rows.const_data_ptr<float>();
  float* dst = sums.mutable_data_ptr<float>();
  const Fp32GemmKernels& gemm = kernels().fp32_gemm;
  at::parallel_for(0, n, grain(tokens * r * r), [&](int64_t begin, int64_t end) {
    of_rows.each(begin, end, [&](int64_t low, int64_t count, const char* data) {
      const DenseView core{data, element, r};
      if (plain) {
        gemm.add_rows({src + low * r, r}, count, core, {0, r}, {0, r}, {dst + low * r, r});
      } else {
        gemm.dot_rows({src + low * r, r}, count, core, r, {0, r}, {dst + low * r, r});
      }
    });
  });
  if (scale != 1.0) sums.mul_(scale);
  return sums.to(left.scalar_type());
}

Tensor extended_product(const Tensor& x, const OptionalTensor& weight, at::TensorList quant, at::IntArrayRef layout,
                        int64_t rows, int64_t columns, const Tensor& v, const Tensor& factor,
                        const OptionalTensor& bias, bool plain) {
  const BelowAutograd below_autograd;
  check_product(v, factor, plain);
  check_dtype(x);
  check_not_double(x);
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == (plain ? rows : columns) && v.size(0) == x.size(0) &&
                        factor.size(plain ? 1 : 0) == (plain ? columns : rows),
                    "expected x [M, ", plain ? rows : columns, "], v [M, r] and a factor to ", plain ? columns : rows,
                    " features, got ", x.sizes(), ", ", v.sizes(), " and ", factor.sizes());
  check_weight(weight, x, rows, columns);
  check_bias(bias, x, rows);
  const Tensor tokens = x.contiguous();
  const auto dtype = x.scalar_type();
  if (weight.has_value()) {
    return sum_of_products({{tokens, as_weight(*weight, plain)}, {v, as_weight(factor, plain)}}, dtype, bias);
  }
  const Packed w = unpack(quant, layout, rows, columns);
  if (takes_fp32_gemm(w, dtype, x.size(0))) {
    return sum_of_products({{tokens, as_weight(w, plain)}, {v, as_weight(factor, plain)}}, dtype, bias);
  }
  if (dtype != at::kHalf) return over_panels(w, tokens, v, factor, bias, plain);
  return extended_product(tokens.to(at::kFloat), weight, quant, layout, rows, columns, v, factor.to(at::kFloat),
                          widened(bias), plain)
      .to(at::kHalf);
}

void add_rows(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& cores, at::TensorList b,
              at::IntArrayRef first, const Tensor& index) {
  const BelowAutograd below_autograd;
  check_product(x, a, false);
  const int64_t tokens = x.size(0), parts = static_cast<int64_t>(b.size()), r = parts > 0 ? a.size(0) / parts : 0;
  TORCH_CHECK_VALUE(parts == cores.size(1) && parts == static_cast<int64_t>(first.size()) && y.dim() == 2 &&
                        y.size(0) == tokens && index.dim() == 1 && index.size(0) == tokens,
                    "expected y [T, m], cores [K, parts, r, r], a B and its first column for each part, and index [T]");
  if (tokens == 0) return;
  const Tensor rows = x.contiguous(), of_a = a.contiguous();
  const bool unpacked = unpacked_gemm_supported(of_a, rows);
  const Tensor u = unpacked ? unpacked_sum({TokenPanels(rows).times(of_a)}, tokens, a.size(0)) : at::mm(rows, of_a.t());
  // R of part p for slot k is number k * parts + p
  const Tensor each = index.unsqueeze(1).mul(parts).add(at::arange(parts, index.options())).clamp_min_(-1);
  const Tensor v = times_cores(u.view({tokens * parts, r}), cores.flatten(0, 1), each.flatten(), 1.0, false);
  for (int64_t p = 0; p < parts; ++p) {
    const Tensor v_p = v.view({tokens, parts * r}).narrow(1, p * r, r), of_b = b[p].contiguous();
    Tensor y_p = y.narrow(1, first[p], of_b.size(0));
    check_product(v_p, of_b, false);
    if (unpacked) {
      y_p.add_(unpacked_sum({TokenPanels(v_p).times(of_b)}, tokens, of_b.size(0)));
    } else {
      y_p.addmm_(v_p, of_b.t());
    }
  }
}

TensorPair linear_rows(const Tensor& x, const OptionalTensor& weight, at::TensorList quant, at::IntArrayRef layout,
                       const Tensor& a, const Tensor& cores, const Tensor& b, const OptionalTensor& bias,
                       const Tensor& index, double scaling, bool by_torch) {
  const BelowAutograd below_autograd;
  check_factors(x, a, b, false);
  check_not_double(x);
  check_weight(weight, x, b.size(0), a.size(1));
  check_bias(bias, x, b.size(0));
  TORCH_CHECK_VALUE(!by_torch || weight.has_value(), "expected a weight for torch to multiply with, got none");
  const auto dtype = x.scalar_type();
  const bool widened = dtype != at::kFloat && serves(dtype);  // 16 bits that torch would multiply slowly
  const auto thin = [&](const Tensor& left, const Tensor& factor) {
    return widened ? thin_product(left, factor, false) : at::mm(left, factor.t());
  };
  const Tensor rows = rows_of(x);
  if (by_torch && unpacked_gemm_supported(*weight, rows)) {
    const auto times = [&](const Tensor& u) { return times_cores(u, cores, index, scaling, false); };
    const auto [y, u] = unpacked_linear(TokenPanels(rows), *weight, a, times, b, bias);
    return {shaped(y, x), u};
  }
  const Tensor u = thin(rows, a);
  const Tensor v = times_cores(u, cores, index, scaling, false);
  Tensor y;
  if (by_torch) {
    y = bias.has_value() ? at::addmm(*bias, rows, weight->t()) : at::mm(rows, weight->t());
    y.addmm_(v, b.t());
  } else if (weight.has_value() || !quant.empty()) {
    y = extended_product(rows, weight, quant, layout, b.size(0), a.size(1), v, b, bias, false);
  } else {
    y = thin(v, b).to(dtype);
    if (bias.has_value()) y.add_(*bias);
  }
  return {shaped(y, x), u.to(dtype)};
}

}  // namespace lorasb
