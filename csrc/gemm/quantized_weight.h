// Makes a `Packed` of the tensors of an op's call, with every check that keeps a kernel inside its memory, and decodes
// it to dense elements. Kernels check nothing.
#pragma once

#include "cpu/matrix_view.h"
#include "cpu/packed_weight.h"
#include "gemm/tensors.h"

namespace lorasb {

// W [rows, columns] in its storage format. The result points into the tensors, which have to outlive it.
//
//   tensors   4 bits: [bytes, absmax, table]
//             nested: [bytes, absmax8, table, absmax2, table2, offset]
//             8 bits: [codes, scales]
//   layout    [block, block2, rounding]
Packed unpack(at::TensorList tensors, at::IntArrayRef layout, int64_t rows, int64_t columns);

// W [rows, columns] in a dtype, bit-equal to bitsandbytes.
Tensor dequantize(at::TensorList tensors, at::IntArrayRef layout, int64_t rows, int64_t columns, at::ScalarType dtype);

// W[rows, columns] into `panel` [rows, columns], contiguous in fp32, bf16 or fp16.
void decode_panel(const Packed& w, Range rows, Range columns, Tensor& panel);

}  // namespace lorasb
