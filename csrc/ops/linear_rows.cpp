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

template <typename Stored>
Weight as_weight(const Stored& stored, bool plain) {
  return plain ? plain_weight(stored) : transposed_weight(stored);
}

// Sums of X_t W_t over terms, in a dtype; more tokens than are packed at once part by part, as in adapted_linear.
at::Tensor sum_of_products(const std::vector<std::pair<at::Tensor, Weight>>& terms, at::ScalarType dtype,
                           const std::optional<at::Tensor>& bias) {
  const auto& [x, w] = terms.front();
  const int64_t tokens = x.size(0);
  const bool few = tokens <= kFewRows && w.packed == nullptr;
  if (few) {
    at::Tensor sums = at::zeros({tokens, w.n()}, x.options().dtype(at::kFloat));
    for (const auto& [left, right] : terms) add_few_tokens(left, right, sums);
    if (bias.has_value()) sums.add_(*bias);
    return sums.to(dtype);
  }
  const int64_t most = max_packed_tokens(w.k());
  std::vector<at::Tensor> parts;
  for (int64_t low = 0; low == 0 || low < tokens; low += most) {
    const int64_t count = std::min(most, tokens - low);
    std::vector<PackedTokens> packed;
    std::vector<Term> operands;
    packed.reserve(terms.size());  // operands refer to its elements: they must not move
    for (const auto& [left, right] : terms) {
      packed.push_back(pack_tokens(left.narrow(0, low, count), packed.empty()));  // one operand at a time in scratch
      operands.push_back({&packed.back(), &right});
    }
    parts.push_back(fp32_gemm(operands, dtype, bias));
  }
  return parts.size() == 1 ? parts.front() : at::cat(parts);
}

// In 16 bits that are multiplied, or fp32: small_m and bf16_gemm where they take the call, else panels.
at::Tensor over_panels(const Packed& w, const at::Tensor& x, const at::Tensor& v, const at::Tensor& factor,
                       const std::optional<at::Tensor>& bias, bool plain) {
  const at::Tensor like_x = v.to(x.scalar_type());
  if (small_m_supported(w, x, plain)) {
    const at::Tensor none_a = x.new_empty({0, w.columns}), none_b = x.new_empty({w.rows, 0});
    const at::Tensor none = x.new_empty({0, 0});
    at::Tensor y = plain ? std::get<0>(small_m_backward(w, x, none_a, none.to(at::kFloat), none_b, true))
                         : std::get<0>(small_m_forward(w, x, none_a, none, none_b, bias));
    return y.addmm_(like_x, plain ? factor : factor.t());
  }
  if (bf16_gemm_supported(w, x.scalar_type(), x.size(0))) {
    return plain ? bf16_gemm_transposed(w, x, like_x, factor) : bf16_gemm(w, x, like_x, factor, bias);
  }
  if (plain) {
    at::Tensor dx = at::mm(like_x, factor);
    panel_gemm_transposed_add(w, x, dx);
    return dx;
  }
  at::Tensor y = bias.has_value() ? at::addmm(*bias, like_x, factor.t()) : at::mm(like_x, factor.t());
  panel_gemm_add(w, x, y);
  return y;
}

void check_cores(const at::Tensor& left, const at::Tensor& cores, const at::Tensor& index) {
  TORCH_CHECK_VALUE(left.dim() == 2 && cores.dim() == 3 && cores.size(1) == left.size(1) &&
                        cores.size(2) == left.size(1) && index.dim() == 1,
                    "expected left [M, r], cores [K, r, r] and index [n], got ", left.sizes(), ", ", cores.sizes(),
                    " and ", index.sizes());
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, "expected index in int64, got ", index.scalar_type());
  TORCH_CHECK_VALUE(index.size(0) > 0 ? left.size(0) % index.size(0) == 0 : left.size(0) == 0,
                    "expected as many tokens of each of ", index.size(0), " rows, got ", left.size(0));
  const auto dtype = cores.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "expected cores in fp32, bf16 or fp16, got ", dtype);
  const int64_t r = cores.size(2);  // strides of a single element say nothing
  TORCH_CHECK_VALUE(r <= 1 || (cores.stride(2) == 1 && cores.stride(1) == r),
                    "expected each R contiguous, got strides ", cores.strides());
}

// x [M, features] by a factor whose sides are [other, features], in memory the other way round if `plain`.
void check_product(const at::Tensor& x, const at::Tensor& factor, bool plain) {
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

// R's of a bank are megabytes apart, each too short for the hardware to see a stream: the next one is prefetched while
// one is multiplied.
void fetch(const char* core, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(core + line);
}

// The rows of a batch whose R's are multiplied, one after the other.
struct RowsOfCores {
  const int64_t* index;
  const char* cores;
  int64_t bytes, size;  // from one R to the next, where a bank has gaps; of one

  // Calls multiply(i, core) for rows [begin, end) that have an R.
  template <typename F>
  void each(int64_t begin, int64_t end, const F& multiply) const {
    for (int64_t i = begin; i < end; ++i) {
      if (i + 1 < end && index[i + 1] >= 0) fetch(cores + index[i + 1] * bytes, size);
      if (index[i] >= 0) multiply(i, cores + index[i] * bytes);
    }
  }
};

// left_i · s·R_kᵀ of left and cores in bf16 where the processor multiplies it: sums in fp32, rounded once.
at::Tensor times_cores_in_bf16(const at::Tensor& left, const RowsOfCores& rows, int64_t n, double scale) {
  const int64_t r = left.size(1), tokens = n > 0 ? left.size(0) / n : 0;
  const at::Tensor src = left.contiguous();
  at::Tensor v = at::zeros(left.sizes(), left.options());
  uint16_t* dst = mutable_bits(v);
  at::parallel_for(0, n, grain(tokens * r * r), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(kDirectRows * r + kBf16Nr);  // `round_rows` reads whole vectors
    rows.each(begin, end, [&](int64_t i, const char* core) {
      for (int64_t low = i * tokens; low < (i + 1) * tokens; low += kDirectRows) {
        const int64_t count = std::min<int64_t>(kDirectRows, (i + 1) * tokens - low);
        kernels().dense_dot_bf16({bits(src) + low * r, r}, count, {reinterpret_cast<const uint16_t*>(core), r}, r,
                                 {0, r}, false, {sums.data(), r});
        if (scale != 1.0) {
          for (int64_t j = 0; j < count * r; ++j) sums[j] *= static_cast<float>(scale);
        }
        round_rows({sums.data(), r}, count, r, nullptr, {dst + low * r, r});
      }
    });
  });
  return v;
}

// As the kernels read without looking: the last line before them.
void check_range(const at::Tensor& index, int64_t count) {
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.size(0); ++i) {
    TORCH_CHECK_INDEX(values[i] >= -1 && values[i] < count, "expected index in [-1, ", count, "), one of ", count,
                      " adapters or -1 for none, got ", values[i]);
  }
}

}  // namespace

at::Tensor thin_product(const at::Tensor& x, const at::Tensor& factor, bool plain) {
  const BelowAutograd below_autograd;
  check_product(x, factor, plain);
  // a gradient may be an expanded or transposed view, of which packing reads rows alone
  return sum_of_products({{x.contiguous(), as_weight(factor.contiguous(), plain)}}, at::kFloat, std::nullopt);
}

at::Tensor times_cores(const at::Tensor& left, const at::Tensor& cores, const at::Tensor& index, double scale,
                       bool plain) {
  const BelowAutograd below_autograd;
  check_cores(left, cores, index);
  const int64_t n = index.size(0), r = left.size(1), tokens = n > 0 ? left.size(0) / n : 0;
  const at::Tensor order = index.contiguous();
  check_range(order, cores.size(0));
  const Element element = element_of(cores.scalar_type());
  const RowsOfCores of_rows{order.const_data_ptr<int64_t>(), static_cast<const char*>(cores.const_data_ptr()),
                            cores.stride(0) * size_of(element), r * r * size_of(element)};
  if (!plain && left.scalar_type() == at::kBFloat16 && element == Element::bf16 &&
      kernels().dense_dot_bf16 != nullptr) {
    return times_cores_in_bf16(left, of_rows, n, scale);
  }
  const at::Tensor rows = left.to(at::kFloat).contiguous();
  at::Tensor sums = at::zeros({left.size(0), r}, rows.options());
  const float* src = rows.const_data_ptr<float>();
  float* dst = sums.mutable_data_ptr<float>();
  const Fp32GemmKernels& gemm = *kernels().fp32_gemm;
  at::parallel_for(0, n, grain(tokens * r * r), [&](int64_t begin, int64_t end) {
    of_rows.each(begin, end, [&](int64_t i, const char* data) {
      const DenseView core{data, element, r};
      for (int64_t low = i * tokens; low < (i + 1) * tokens; low += kFewRows) {
        const int64_t count = std::min<int64_t>(kFewRows, (i + 1) * tokens - low);
        if (plain) {
          gemm.add_rows({src + low * r, r}, count, core, {0, r}, {0, r}, {dst + low * r, r});
        } else {
          gemm.dot_rows({src + low * r, r}, count, core, r, {0, r}, {dst + low * r, r});
        }
      }
    });
  });
  if (scale != 1.0) sums.mul_(scale);
  return sums.to(left.scalar_type());
}

at::Tensor extended_product(const at::Tensor& x, const std::optional<at::Tensor>& weight, at::TensorList quant,
                            at::IntArrayRef layout, int64_t rows, int64_t columns, const at::Tensor& v,
                            const at::Tensor& factor, const std::optional<at::Tensor>& bias, bool plain) {
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
  const at::Tensor tokens = x.contiguous();
  const auto dtype = x.scalar_type();
  if (weight.has_value()) {
    return sum_of_products({{tokens, as_weight(*weight, plain)}, {v, as_weight(factor, plain)}}, dtype, bias);
  }
  const Packed w = unpack(quant, layout, rows, columns);
  if (takes_fp32_gemm(w, dtype, x.size(0))) {
    return sum_of_products({{tokens, as_weight(w, plain)}, {v, as_weight(factor, plain)}}, dtype, bias);
  }
  if (dtype != at::kHalf) return over_panels(w, tokens, v, factor, bias, plain);
  const std::optional<at::Tensor> wide_bias =
      bias.has_value() ? std::optional<at::Tensor>(bias->to(at::kFloat)) : std::nullopt;
  return extended_product(tokens.to(at::kFloat), weight, quant, layout, rows, columns, v, factor.to(at::kFloat),
                          wide_bias, plain)
      .to(at::kHalf);
}

void add_rows(const at::Tensor& y, const at::Tensor& x, const at::Tensor& a, const at::Tensor& cores, at::TensorList b,
              at::IntArrayRef first, const at::Tensor& index) {
  const BelowAutograd below_autograd;
  check_product(x, a, false);
  const int64_t tokens = x.size(0), parts = static_cast<int64_t>(b.size()), r = parts > 0 ? a.size(0) / parts : 0;
  TORCH_CHECK_VALUE(parts == cores.size(1) && parts == static_cast<int64_t>(first.size()) && y.dim() == 2 &&
                        y.size(0) == tokens && index.dim() == 1 && index.size(0) == tokens,
                    "expected y [T, m], cores [K, parts, r, r], a B and its first column for each part, and index [T]");
  if (tokens == 0) return;
  const at::Tensor rows = x.contiguous(), of_a = a.contiguous();
  const bool unpacked = unpacked_gemm_supported(of_a, rows);
  const at::Tensor u = unpacked ? unpacked_sum({TokenPanels(rows).times(of_a)}, tokens, a.size(0), std::nullopt)
                                : at::mm(rows, of_a.t());
  // R of part p for slot k is number k * parts + p
  const at::Tensor each = index.unsqueeze(1).mul(parts).add(at::arange(parts, index.options())).clamp_min_(-1);
  const at::Tensor v = times_cores(u.view({tokens * parts, r}), cores.flatten(0, 1), each.flatten(), 1.0, false);
  for (int64_t p = 0; p < parts; ++p) {
    const at::Tensor v_p = v.view({tokens, parts * r}).narrow(1, p * r, r), of_b = b[p].contiguous();
    at::Tensor y_p = y.narrow(1, first[p], of_b.size(0));
    check_product(v_p, of_b, false);
    if (unpacked) {
      y_p.add_(unpacked_sum({TokenPanels(v_p).times(of_b)}, tokens, of_b.size(0), std::nullopt));
    } else {
      y_p.addmm_(v_p, of_b.t());
    }
  }
}

std::tuple<at::Tensor, at::Tensor> linear_rows(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                               at::TensorList quant, at::IntArrayRef layout, const at::Tensor& a,
                                               const at::Tensor& cores, const at::Tensor& b,
                                               const std::optional<at::Tensor>& bias, const at::Tensor& index,
                                               double scaling, bool by_torch) {
  const BelowAutograd below_autograd;
  check_factors(x, a.dim() == 2 ? a.size(1) : 0, a, b);
  check_not_double(x);
  check_weight(weight, x, b.size(0), a.size(1));
  check_bias(bias, x, b.size(0));
  TORCH_CHECK_VALUE(!by_torch || weight.has_value(), "expected a weight for torch to multiply with, got none");
  const auto dtype = x.scalar_type();
  const bool widened = dtype != at::kFloat && serves(dtype);  // 16 bits that torch would multiply slowly
  const auto thin = [&](const at::Tensor& left, const at::Tensor& factor) {
    return widened ? thin_product(left, factor, false) : at::mm(left, factor.t());
  };
  const at::Tensor rows = rows_of(x);
  if (by_torch && unpacked_gemm_supported(*weight, rows)) {
    const auto times = [&](const at::Tensor& u) { return times_cores(u, cores, index, scaling, false); };
    const auto [y, u] = unpacked_linear(TokenPanels(rows), *weight, a, times, b, bias);
    return {shaped(y, x), u};
  }
  const at::Tensor u = thin(rows, a);
  const at::Tensor v = times_cores(u, cores, index, scaling, false);
  at::Tensor y;
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
