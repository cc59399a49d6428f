// The blocked product in fp32, for 16 bits that the processor does not multiply and for fp32 where it beats the BLAS:
// y = Σ over terms of X_t W_tᵀ, or of X_t W_t. W is dense in fp32, bf16 or fp16, or quantized; a packed panel of it is
// widened or decoded into cache.
//
// BLIS terms: C [m, n] += A [m, k] B [k, n]. A is X (m tokens), B is Wᵀ or W, k is what is summed over.
//
//   for each piece of C, mc x nc, taken by whichever thread is free
//     for each term                                 base and adapter: one sum
//       for k0 in steps of kc                       256
//         pack B [kc, nc] into micro-panels         in a second-level cache, by the thread that uses it
//         for i0 in steps of mr                     a micro-panel of A, packed once before the product
//           for j0 in steps of nr                   micro-kernel: mr x nr sums in registers
//     C = sums + start, rounded
//
// Layouts, with M and n rounded up to whole micro-panels (zero beyond the matrix):
//
//   packed A   [k / kc] blocks of [m / mr][kc][mr]      element [i, k]: block k / kc, panel i / mr, k % kc, i % mr
//   packed B   [nc / nr][kc][nr]                        element [k, j]: panel j / nr, k, j % nr
//   sums       [mc][nc]                                 row-major, leading dimension nc
//
// Threading: a piece has all of k, so that one thread computes each element of C: over terms in order, over k in order,
// in one chain of FMAs. Neither the pieces' sizes, which depend on the number of threads, nor the thread that takes a
// piece changes bits.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/fp32_microkernel.h"
#include "cpu/packed_weight.h"
#include "gemm/tensors.h"

namespace lorasb {

inline Element element_of(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return Element::bf16;
  return dtype == at::kHalf ? Element::f16 : Element::f32;
}

// W [rows, columns] as B of a product, in any storage: B = Wᵀ or B = W.
struct Weight {
  Tensor dense;  // [rows, columns], elements of a row contiguous; undefined where W is quantized
  const Packed* packed = nullptr;
  int64_t rows, columns;
  bool transposed;

  int64_t n() const { return transposed ? rows : columns; }
  int64_t k() const { return transposed ? columns : rows; }
};

// B = Wᵀ, in y = x Wᵀ, or `plain` B = W, in dx = dy W. A dense W may be stored in either order.
Weight as_weight(const Tensor& dense, bool plain);
Weight as_weight(const Packed& w, bool plain);

// X [tokens, k] in fp32 as micro-panels.
struct PackedTokens {
  Tensor panels;
  int64_t tokens, k;
};

// `use_scratch`: the panels are in this thread's scratch memory until its next call with `use_scratch`: only one
// operand at a time can use it.
PackedTokens pack_tokens(const Tensor& x, bool use_scratch = false);

struct Term {
  const PackedTokens* x;
  const Weight* w;
};

// y [tokens, n] in a dtype: the sum of the terms plus `start` ([n], such as a bias, or [tokens, n] in fp32).
Tensor fp32_gemm(const std::vector<Term>& terms, at::ScalarType dtype, const OptionalTensor& start = std::nullopt);

// The same product in fp32 for up to kFewRows tokens and a dense W, which is read once and in place: nothing is
// packed. add_few_tokens adds to `sums` and returns it.
Tensor multiply_few_tokens(const Tensor& x, const Weight& w);
Tensor add_few_tokens(const Tensor& x, const Weight& w, Tensor sums);

// The most tokens that are packed at once: more are taken part by part, so that their copy in fp32 stays small.
int64_t max_packed_tokens(int64_t k);

// Calls part(first, count) for each part, and once for no tokens.
template <typename F>
void over_parts(int64_t tokens, int64_t k, const F& part) {
  const int64_t most = max_packed_tokens(k);
  for (int64_t low = 0; low == 0 || low < tokens; low += most) part(low, std::min(most, tokens - low));
}

inline Tensor joined(const std::vector<Tensor>& parts) { return parts.size() == 1 ? parts.front() : at::cat(parts); }

}  // namespace lorasb
