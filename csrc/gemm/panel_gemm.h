// Products with a quantized weight that never exists as a whole.
#pragma once

#include <ATen/ATen.h>

#include "cpu/packed_weight.h"

namespace lorasb {

// y [M, m] += x [M, n] Wᵀ. Both have rows in one piece and one dtype, fp32, bf16 or fp64.
void add_product(const Packed& w, const at::Tensor& x, at::Tensor& y);

// dx [M, n] += dy [M, m] W.
void add_product_transposed(const Packed& w, const at::Tensor& dy, at::Tensor& dx);

// Whether M tokens in a dtype are multiplied by our own product in fp32 (gemm.h) and not by the two above.
bool takes_panels(const Packed& w, at::ScalarType dtype, int64_t M);

}  // namespace lorasb
