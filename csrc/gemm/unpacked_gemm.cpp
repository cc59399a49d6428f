#include "gemm/unpacked_gemm.h"

#include <cstdlib>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace lorasb {
namespace {

constexpr size_t kLine = 64;  // bytes: panels are stored by whole vectors

std::unique_ptr<uint16_t[], void (*)(void*)> allocate_lines(int64_t elements) {
  const size_t bytes = (elements * sizeof(uint16_t) + kLine - 1) / kLine * kLine;
  void* memory = std::aligned_alloc(kLine, std::max(bytes, kLine));
  TORCH_CHECK(memory != nullptr, "no memory for ", bytes, " bytes of packed tokens");
  return {static_cast<uint16_t*>(memory), std::free};
}

}  // namespace

int64_t max_unpacked_tokens(int64_t elements) {
  const Kernels& k = kernels();
  const int64_t by_products = k.max_unpacked_products / std::max<int64_t>(elements, 1);
  return std::min(k.max_unpacked_tokens, std::max(k.min_unpacked_tokens, by_products));
}

bool unpacked_gemm_supported(const at::Tensor& w, const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && x.size(0) > 0 && x.size(0) <= max_unpacked_tokens(w.numel()) &&
         w.is_contiguous() && w.numel() > 0;
}

TokenPanels::TokenPanels(const at::Tensor& x) : tokens_(x.size(0)), columns_(x.size(1)), data_(nullptr, std::free) {
  const at::Tensor rows = x.contiguous();
  const int64_t panels = ceil_div(tokens_, kUnpackedTokens), stride = unpacked_panel(columns_);
  data_ = allocate_lines(panels * stride);
  at::parallel_for(0, panels, grain(stride), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t low = p * kUnpackedTokens, count = std::min<int64_t>(kUnpackedTokens, tokens_ - low);
      kernels().arrange_tokens({bits(rows) + low * columns_, columns_}, count, columns_, data_.get() + p * stride);
    }
  });
}

UnpackedTerm TokenPanels::times(const at::Tensor& d) const { return {{bits(d), columns_}, columns_, data_.get()}; }

at::Tensor unpacked_sum(const std::vector<UnpackedTerm>& terms, int64_t tokens, int64_t rows,
                        const std::optional<at::Tensor>& bias) {
  at::Tensor y = at::empty({tokens, rows}, at::TensorOptions().dtype(at::kBFloat16));
  const at::Tensor bias_row = bias.has_value() ? bias->contiguous() : at::Tensor();
  const uint16_t* added = bias.has_value() ? bits(bias_row) : nullptr;
  uint16_t* dst = mutable_bits(y);
  over_rows(rows, terms.front().columns, kUnpackedRows, [&](int64_t low, int64_t high) {
    kernels().multiply_unpacked(terms.data(), static_cast<int>(terms.size()), tokens, {low, high}, added, {dst, rows});
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> unpacked_linear(const TokenPanels& x, const at::Tensor& w, const at::Tensor& a,
                                                   const TimesCore& times_core, const at::Tensor& b,
                                                   const std::optional<at::Tensor>& bias) {
  const int64_t M = x.tokens(), r = a.size(0);
  const at::Tensor a_rows = a.contiguous(), b_rows = b.contiguous();
  if (r == 0) return {unpacked_sum({x.times(w)}, M, w.size(0), bias), at::empty({M, 0}, a.options())};
  const at::Tensor u = unpacked_sum({x.times(a_rows)}, M, r, std::nullopt);
  const TokenPanels v(times_core(u));
  return {unpacked_sum({x.times(w), v.times(b_rows)}, M, w.size(0), bias), u};
}

TimesCore times_unpacked(const at::Tensor& core) {
  return [core_rows = core.contiguous()](const at::Tensor& u) {
    return unpacked_sum({TokenPanels(u).times(core_rows)}, u.size(0), u.size(1), std::nullopt);
  };
}

}  // namespace lorasb
