// Products of many tokens in fp32, W widened or decoded a panel at a time: y = Σ over terms of X_t W_tᵀ, or X_t W_t.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "cpu/fp32_microkernel.h"
#include "cpu/packed_weight.h"

namespace lorasb {

// W of a product, in any storage. Its lanes are what a result has columns for: W's rows in X Wᵀ, W's columns in X W.
struct Weight {
  enum class Lanes { rows, columns };

  at::Tensor dense;  // [rows, columns], elements of a row in one piece; undefined where packed
  const Packed* packed = nullptr;
  int64_t rows, columns;
  Lanes lanes;

  // The lanes' number, and the length of their sums.
  int64_t width() const { return lanes == Lanes::rows ? rows : columns; }
  int64_t depth() const { return lanes == Lanes::rows ? columns : rows; }
};

// X Wᵀ and X W. A dense W [m, n] in fp32, bf16 or fp16 may lie in either order.
Weight weight_rows(const at::Tensor& dense);
Weight weight_columns(const at::Tensor& dense);
Weight weight_rows(const Packed& w);
Weight weight_columns(const Packed& w);

// X [M, depth] in fp32, as micro-panels of tokens. One at a time in a thread may lie in memory that the thread keeps.
struct TokenPanels {
  at::Tensor panels;  // [chunks of the depth][tiles][their depth][mr]
  int64_t tokens, depth;
};

TokenPanels pack_tokens(const at::Tensor& x, bool keep = false);

struct Term {
  const TokenPanels* x;
  const Weight* w;
};

// y [M, width] in a dtype: the sum of the terms, each in fp32 and in one order whatever the number of threads, onto
// `start` ([width], such as a bias, or [M, width] in fp32).
at::Tensor product(const std::vector<Term>& terms, at::ScalarType dtype,
                   const std::optional<at::Tensor>& start = std::nullopt);

// Tokens that are packed at once: more are taken part by part, so that their copy in fp32 stays small.
int64_t tokens_at_once(int64_t depth);

// The same for up to kFewRows tokens, by a walk over the rows of a dense W: W is read once and nothing is packed.
at::Tensor few_rows(const at::Tensor& x, const Weight& w);
at::Tensor add_few_rows(const at::Tensor& x, const Weight& w, at::Tensor sums);

}  // namespace lorasb
