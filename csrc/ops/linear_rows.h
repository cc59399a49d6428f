// The parts of lorasb::adapted_linear with one R per row of a batch and shared A and B:
//
//   forward    u = x Aᵀ,  v_i = s·u_i R_kᵀ    y  = x Wᵀ + v Bᵀ + bias        with k = index[i]
//   backward   t = dy B,  c_i = s·t_i R_k     dx = dy W + c A
//
// Forward is one call; composed in Python it takes 20 microseconds more per layer (Zen 3). Backward is composed of
// these parts in Python (backends/eager.py). y and dx are one sum wherever the op with one R computes them as one,
// except over a quantized base in bf16 for a few tokens, where the adapter's part is added to the base's in bf16.
#pragma once

#include "gemm/tensors.h"

namespace lorasb {

// x [M, k] times the rows of a factor [n, k], in fp32; `plain`: times a factor [k, n].
Tensor thin_product(const Tensor& x, const Tensor& factor, bool plain);

// left [n * tokens, r] in any dtype but fp64, cores [K, r, r] in fp32, bf16 or fp16, each R contiguous, index [n] in
// [-1, K), int64. left_i · s·R_kᵀ, or left_i · s·R_k if `plain`, in left's dtype from sums in fp32; zero where k = -1.
Tensor times_cores(const Tensor& left, const Tensor& cores, const Tensor& index, double scale, bool plain);

// y [T, m] += v Bᵀ in place for the parts of a layer, which have the same x [T, n] and an R each: u = x Aᵀ with the
// parts' A's one after the other, a [parts * r, n]; cores [K, parts, r, r]; a part's B [m_p, r] goes to the columns of
// y from first[p]. One call for all parts: an engine that batches requests of many adapters makes a hundred per token.
void add_rows(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& cores, at::TensorList b,
              at::IntArrayRef first, const Tensor& index);

// x [M, columns] Wᵀ + v Bᵀ + bias, W [rows, columns] dense or quantized (`quant`, `layout`, as in unpack), v [M, r] in
// fp32 or x's dtype, factor B [rows, r]. `plain`: x [M, rows] W + v A with A [r, columns], and no bias.
Tensor extended_product(const Tensor& x, const OptionalTensor& weight, at::TensorList quant, at::IntArrayRef layout,
                        int64_t rows, int64_t columns, const Tensor& v, const Tensor& factor,
                        const OptionalTensor& bias, bool plain);

// y [..., rows of B] and u [M, r] in x's dtype; no weight and no `quant`: the adapter's part alone. `by_torch`: torch
// multiplies with W, which is dense. x in fp32, bf16 or fp16, and the rest as above.
TensorPair linear_rows(const Tensor& x, const OptionalTensor& weight, at::TensorList quant, at::IntArrayRef layout,
                       const Tensor& a, const Tensor& cores, const Tensor& b, const OptionalTensor& bias,
                       const Tensor& index, double scaling, bool by_torch);

}  // namespace lorasb
