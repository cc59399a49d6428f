#include "gemm/unpacked_gemm.h"

#include <c10/core/CPUAllocator.h>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace lorasb {

int64_t max_unpacked_tokens(int64_t elements) {
  const Kernels& k = kernels();
  const int64_t by_products = k.max_unpacked_products / std::max<int64_t>(elements, 1);
  return std::min(k.max_unpacked_tokens, std::max(k.min_unpacked_tokens, by_products));
}

bool unpacked_gemm_supported(const Tensor& w, const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && x.size(0) > 0 && x.size(0) <= max_unpacked_tokens(w.numel()) &&
         w.is_contiguous() && w.numel() > 0;
}

TokenPanels::TokenPanels(const Tensor& x) : tokens_(x.size(0)), columns_(x.size(1)) {
  const Tensor rows = x.contiguous();
  const int64_t panels = ceil_div(tokens_, kUnpackedTokens), stride = unpacked_panel(columns_);
  data_ = c10::GetCPUAllocator()->allocate(panels * stride * sizeof(uint16_t));
  at::parallel_for(0, panels, grain(stride), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t low = p * kUnpackedTokens, count = std::min<int64_t>(kUnpackedTokens, tokens_ - low);
      kernels().arrange_tokens({bits(rows) + low * columns_, columns_}, count, columns_, data() + p * stride);
    }
  });
}

UnpackedTerm TokenPanels::times(const Tensor& d) const { return {{bits(d), columns_}, columns_, data()}; }

Tensor unpacked_sum(const std::vector<UnpackedTerm>& terms, int64_t tokens, int64_t rows, const OptionalTensor& bias) {
  Tensor y = at::empty({tokens, rows}, at::TensorOptions().dtype(at::kBFloat16));
  const Tensor bias_row = bias.has_value() ? bias->contiguous() : Tensor();
  const uint16_t* added = bias.has_value() ? bits(bias_row) : nullptr;
  uint16_t* dst = mutable_bits(y);
  over_rows(rows, terms.front().columns, kUnpackedRows, [&](int64_t low, int64_t high) {
    kernels().multiply_unpacked(terms.data(), static_cast<int>(terms.size()), tokens, {low, high}, added, {dst, rows});
  });
  return y;
}

TensorPair unpacked_linear(const TokenPanels& x, const Tensor& w, const Tensor& a, const TimesCore& times_core,
                           const Tensor& b, const OptionalTensor& bias) {
  const int64_t M = x.tokens(), r = a.size(0);
  const Tensor a_rows = a.contiguous(), b_rows = b.contiguous();
  if (r == 0) return {unpacked_sum({x.times(w)}, M, w.size(0), bias), at::empty({M, 0}, a.options())};
  const Tensor u = unpacked_sum({x.times(a_rows)}, M, r);
  const TokenPanels v(times_core(u));
  return {unpacked_sum({x.times(w), v.times(b_rows)}, M, w.size(0), bias), u};
}

}  // namespace lorasb
