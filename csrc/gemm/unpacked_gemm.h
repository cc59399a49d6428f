// The adapted linear for few tokens in bf16 over a dense W, where the processor multiplies bf16:
//
//   u = x Aᵀ,  v = u coreᵀ,  y = x Wᵀ + v Bᵀ + bias
//
// W, A, core and B are read from memory once, in their own layout; only x is packed, once for both A and W. y is one
// sum in fp32, rounded once; u and v are rounded to bf16. The BLAS packs W again in every call, and takes four calls:
// on two cores of an Emerald Rapids this takes 0.35 to 0.8 of their time for up to 128 tokens, and for up to 64 less
// than W's product alone.
//
// Threading: a task has its own rows of W, and so complete sums.
#pragma once

#include <functional>
#include <vector>

#include "cpu/kernel_table.h"
#include "gemm/tensors.h"

namespace lorasb {

// The most tokens in bf16 for which a contiguous W with this many elements is read in place.
int64_t max_unpacked_tokens(int64_t elements);

// True if x [M, n] and a dense W [m, n] are supported.
bool unpacked_gemm_supported(const Tensor& w, const Tensor& x);

// A packed copy of x [M, n].
class TokenPanels {
 public:
  explicit TokenPanels(const Tensor& x);
  // A term with a contiguous D [m, n].
  UnpackedTerm times(const Tensor& d) const;
  int64_t tokens() const { return tokens_; }

 private:
  uint16_t* data() const { return static_cast<uint16_t*>(data_.get()); }

  int64_t tokens_, columns_;
  c10::DataPtr data_;  // panels are stored by whole vectors: torch's allocator aligns to them
};

// y [M, m] in bf16 = Σ_t x_t D_tᵀ + bias.
Tensor unpacked_sum(const std::vector<UnpackedTerm>& terms, int64_t tokens, int64_t rows,
                    const OptionalTensor& bias = std::nullopt);

// v [M, r] of u [M, r], both in bf16.
using TimesCore = std::function<Tensor(const Tensor&)>;

// y and u [M, r].
TensorPair unpacked_linear(const TokenPanels& x, const Tensor& w, const Tensor& a, const TimesCore& times_core,
                           const Tensor& b, const OptionalTensor& bias);

}  // namespace lorasb
