// From the tensors of an op's call to a `Packed`, with every check that keeps a kernel inside its memory.
#pragma once

#include <ATen/ATen.h>

#include "cpu/packed_weight.h"

namespace lorasb {

// tensors: [bytes, absmax, table], nested [bytes, absmax8, table, absmax2, table2, offset], 8 bits [codes, scales].
// layout: [block, block2, rounding]. The tensors have to outlive the result.
Packed unpack(at::TensorList tensors, at::IntArrayRef layout, int64_t rows, int64_t columns);

// W [rows, columns] in a dtype.
at::Tensor dequantize(at::TensorList tensors, at::IntArrayRef layout, int64_t rows, int64_t columns,
                      at::ScalarType dtype);

// Rows [low, high) and columns [first, first + width) of W into `out`, in one piece, fp32, bf16 or fp16.
void decode_panel(const Packed& w, int64_t low, int64_t high, int64_t first, int64_t width, at::Tensor& out);

}  // namespace lorasb
