// Products of many tokens in bf16 with a quantized weight: our own blocked product, over strips of W decoded into
// cache.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "cpu/packed_weight.h"

namespace lorasb {

// Whether the functions below take M tokens in this dtype.
bool takes_strips(const Packed& w, at::ScalarType dtype, int64_t M);

// y [M, m] = x [M, n] Wᵀ + v [M, r] B [m, r]ᵀ + bias, one sum in fp32.
at::Tensor strips_product(const Packed& w, const at::Tensor& x, const at::Tensor& v, const at::Tensor& b,
                          const std::optional<at::Tensor>& bias);

// dx [M, n] = dy [M, m] W + c [M, r] A [r, n], one sum in fp32.
at::Tensor strips_product_transposed(const Packed& w, const at::Tensor& dy, const at::Tensor& c, const at::Tensor& a);

// dx [M, n] += dy [M, m] W.
void add_strips_product_transposed(const Packed& w, const at::Tensor& dy, at::Tensor& dx);

}  // namespace lorasb
