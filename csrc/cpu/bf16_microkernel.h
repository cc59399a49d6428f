// What AVX512-BF16 and AMX provide for products of many tokens with a quantized weight: packing and micro-kernels. The
// loops around them are in gemm/bf16_gemm.cpp.
//
// The product is C [m, n] = A [m, k] B [k, n]: A holds tokens, B is Wᵀ (forward) or W (backward). The instructions
// multiply pairs of neighboring bf16 of k and add both products to one fp32 sum, so that both operands hold pairs:
//
//   micro-panel of tokens   [k / 32][mr][32]        step s, token i: the 32 elements of k of that step
//   micro-panel of W        [k / 32][16][nr = 32][2]
//
//     step s, pair p    b[k0, 0] b[k1, 0] | b[k0, 1] b[k1, 1] | .. | b[k0, 31] b[k1, 31]     two 64-byte vectors
//
// Any elements k0 and k1 can be a pair as long as both operands agree. The choice follows from how a decoder yields
// them, and `pair_distance` = k1 - k0 passes it to the packing of tokens:
//
//   distance 8   Wᵀ with scales:     columns c and c + 8 of each 16
//   distance 4   Wᵀ without scales:  columns c and c + 4 of each 8
//   distance 1   W, and dense factors: neighbors
//
// Where W's columns are the columns of C, a decoder yields 16 even ones and then 16 odd ones, since a byte holds two
// neighbors; `Epilogue::split_columns` puts them in order again. Micro-panels are zero beyond their matrix.
#pragma once

#include <cstdint>

#include "cpu/matrix_view.h"
#include "cpu/packed_weight.h"

namespace lorasb {

constexpr int kBf16Nr = 32;      // columns of C in a micro-panel of W
constexpr int kBf16KStep = 32;   // elements of k in a step: micro-panels are whole steps
constexpr int kBf16MaxKc = 512;  // elements of k that a packed micro-panel holds at most

// The block of W that is packed at a time: `panels` micro-panels that are kc deep.
struct BlockShape {
  int64_t panels, kc;
  int64_t panel_stride() const { return kc * kBf16Nr; }  // bf16 between micro-panels
  int64_t nc() const { return panels * kBf16Nr; }
};

// What to pack: `panels` micro-panels from column n0 of C on, elements [k0, k0 + kc) of k.
struct PanelBlock {
  int64_t n0, panels, k0, kc, panel_stride;
};

struct Bf16Matrix {
  const uint16_t* data;
  int64_t ld, rows, columns;
};

// How tokens are packed: micro-panels of mr rows; k is cut into blocks of `steps` steps, and a block holds all
// micro-panels one after the other, as the product reads them.
struct TokenLayout {
  int mr, pair_distance;
  int64_t steps;
};

struct PackedPanel {
  const uint16_t* data;
  int64_t steps;
};

// A micro-panel without its scales: these are [steps / steps_per_scale, kBf16Nr], one for each column of C.
struct UnscaledPanel {
  PackedPanel panel;
  int64_t steps_per_scale;
  const float* scales;
};

// What is done with the sums of a tile: y = sums + bias, or y += sums.
struct Epilogue {
  bool split_columns;    // the sums' even columns come first
  const uint16_t* bias;  // or null
  bool accumulate;
};

// W has whole blocks (Packed::whole_blocks).
struct Bf16GemmKernels {
  int mr = 0;               // tokens in a micro-panel; 0 where bf16 is not multiplied
  int max_unscaled_tokens;  // up to these, scales are applied to sums and not to weights
  BlockShape block;         // for more tokens; a second-level cache holds it

  // Called by a thread before products and after them, or null: AMX configures its tile registers.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;

  // Micro-panels `panels` of all of x, zero beyond its last column; rows beyond the last one are not written.
  void (*pack_tokens)(const Bf16Matrix& x, const TokenLayout& layout, Range panels, uint16_t* dst);

  // B = Wᵀ and B = W.
  void (*pack_transposed)(const Packed& w, const PanelBlock& block, uint16_t* dst);
  void (*pack)(const Packed& w, const PanelBlock& block, uint16_t* dst);
  // One micro-panel of B = Wᵀ without scales, and the scales separately.
  void (*pack_transposed_unscaled)(const Packed& w, const PanelBlock& block, uint16_t* dst, float* scales);
  // B = Dᵀ and B = D for a contiguous dense D.
  void (*pack_dense_transposed)(const Bf16Matrix& d, const PanelBlock& block, uint16_t* dst);
  void (*pack_dense)(const Bf16Matrix& d, const PanelBlock& block, uint16_t* dst);

  // c [rows, kBf16Nr] = or += tokens · weight; `overwrite` is BLAS's beta = 0.
  void (*micro_kernel)(const uint16_t* tokens, int64_t rows, PackedPanel weight, bool overwrite, MutableMatrixView c);
  void (*unscaled_micro_kernel)(const uint16_t* tokens, int64_t rows, const UnscaledPanel& weight, bool overwrite,
                                MutableMatrixView c);

  // y [rows, columns] in bf16 from the sums of one micro-panel; at most kBf16Nr columns are written.
  void (*store)(MatrixView sums, int64_t rows, int64_t columns, const Epilogue& epilogue, MutableBf16View y);
};

}  // namespace lorasb
