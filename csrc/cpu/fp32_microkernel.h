// What an instruction set provides for products in fp32: packing, the micro-kernel, and direct products of few tokens.
// The loops around them are in gemm/fp32_gemm.cpp.
//
// BLIS terms: C [m, n] = A [m, k] B [k, n], where A holds tokens and B is Wᵀ or W. The micro-kernel multiplies a
// micro-panel of tokens [kc, mr] by a micro-panel of the weight [kc, nr] and keeps mr x nr sums in registers:
//
//   tokens   x[0,0] x[1,0] .. x[mr-1,0] | x[0,1] x[1,1] .. x[mr-1,1] | ..   element [i, k] at k * mr + i
//   weight   b[0,0] b[0,1] .. b[0,nr-1] | b[1,0] b[1,1] .. b[1,nr-1] | ..   element [k, j] at k * nr + j
//
// Both are read with stride one. Rows and columns beyond the matrix are zero, so that the micro-kernel needs no masks.
#pragma once

#include <cstdint>

#include "cpu/matrix_view.h"

namespace lorasb {

constexpr int kFewRows = 4;  // rows of x that a direct product takes at once

struct Fp32GemmKernels {
  // nr is two registers wide; mr * 2 accumulators, two registers of the weight and a broadcast token fill the
  // registers.
  int mr, nr;

  // `count` elements of any type to fp32.
  void (*widen)(const void* src, Element element, int64_t count, float* dst);

  // `count` sums to any element type, rounded to nearest even.
  void (*narrow)(const float* src, Element element, int64_t count, void* dst);

  // c [rows, nr] = or += tokensᵀ · weight over kc, for up to mr rows; `overwrite` is BLAS's beta = 0. All nr columns
  // are stored, so c needs room for them at the right edge of the result, too.
  void (*micro_kernel)(const float* tokens, const float* weight, int64_t kc, int64_t rows, bool overwrite,
                       MutableMatrixView c);

  // Micro-panel [kc, nr] of the weight from `rows` rows of kc elements each: W's rows as columns of the result.
  void (*pack_transposed)(MatrixView src, int64_t rows, int64_t kc, float* panel);

  // The same from bf16, without an intermediate copy in fp32.
  void (*pack_transposed_bf16)(Bf16View src, int64_t rows, int64_t kc, float* panel);

  // Micro-panel [kc, mr] of tokens from `rows` rows of kc elements each.
  void (*pack_tokens)(MatrixView src, int64_t rows, int64_t kc, float* panel);

  // `count` elements of one row of W as row k of micro-panels: nr of them to `dst`, the next nr to dst + panel_stride,
  // and so on; zero up to a whole number of nr.
  void (*pack_row)(const void* src, Element element, int64_t count, float* dst, int64_t panel_stride);

  // y [rows, ..] += x [rows, columns] D[d_rows, :columns]ᵀ: column r of y takes row r of D. Up to kFewRows rows of x;
  // D is read once.
  void (*dot_rows)(MatrixView x, int64_t rows, DenseView d, int64_t columns, Range d_rows, MutableMatrixView y);

  // y [rows, columns] += c [rows, ..] D[d_rows, d_columns]: row r of D is multiplied by column r of c, and y begins at
  // the first of d_columns. Up to kFewRows rows of c.
  void (*add_rows)(MatrixView c, int64_t rows, DenseView d, Range d_rows, Range d_columns, MutableMatrixView y);
};

}  // namespace lorasb
