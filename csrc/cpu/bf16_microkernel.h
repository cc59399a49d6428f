// The parts of the blocked product in bf16: tiles of tokens, strips of a weight, and their products.
#pragma once

#include <cstdint>

#include "cpu/packed_weight.h"

namespace lorasb {

constexpr int kStripLanes = 32;   // rows or columns of W in a strip
constexpr int kStripDepth = 32;   // elements of a sum in a step: tiles and strips are whole steps
constexpr int kStripChunk = 512;  // elements of a sum that a strip holds at most

// How much of W is decoded at a time: strips, and elements of their sums.
struct Shape {
  int64_t strips, depth;
  int64_t apart() const { return depth * kStripLanes; }
  int64_t width() const { return strips * kStripLanes; }
};

// A piece of W or of a dense matrix as strips: so many from a lane on, elements [first, first + depth) of the sum,
// strip s from out + s * apart on. Whole steps.
struct Piece {
  int64_t lane, strips, first, depth, apart;
};

// Products of any number of tokens in bf16. x is arranged once as tiles [steps, tile_tokens, 32]; W is decoded, a piece
// that stays in a second-level cache, as strips [steps, 16, kStripLanes, 2]: a pair of elements of a sum for each lane.
// W has whole blocks. Rows of W as lanes pair columns c and c + 8 of 16, plain ones c and c + 4 of 8; columns of W as
// lanes pair neighboring rows, and hold even columns before odd ones. Strips are zero beyond their matrix.
struct StripKernels {
  int tile_tokens;   // rows of x in a tile
  int plain_tokens;  // up to these, scales are applied to sums and not to weights
  Shape wide;        // for more tokens; a second-level cache holds it
  void (*begin)();   // what a thread calls before products and after them, or null
  void (*end)();
  // Tiles [low, high) of so many tokens of x [rows, columns], zero beyond its last column; pairs are so far apart.
  // Chunk by chunk of so many steps, and in a chunk tile by tile, as a product reads them.
  void (*tiles)(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns, int tokens, int apart, int64_t chunk,
                int64_t low, int64_t high, uint16_t* out);
  // Rows of W as lanes, and columns.
  void (*of_rows)(const Packed& w, const Piece& piece, uint16_t* out);
  void (*of_columns)(const Packed& w, const Piece& piece, uint16_t* out);
  // The same of a dense D [rows, columns]; its rows as lanes pair neighboring columns.
  void (*of_dense_rows)(const uint16_t* d, int64_t rows, int64_t columns, const Piece& piece, uint16_t* out);
  void (*of_dense_columns)(const uint16_t* d, int64_t rows, int64_t columns, const Piece& piece, uint16_t* out);
  // One strip of rows of W without their scales, and these apart, [runs, kStripLanes]: a run is a block, or all of it.
  void (*of_rows_plain)(const Packed& w, const Piece& piece, uint16_t* out, float* scales);
  // sums [rows, kStripLanes] = (fresh) or += tile · strip over some steps.
  void (*multiply)(const uint16_t* tile, int64_t rows, const uint16_t* strip, int64_t steps, bool fresh, float* sums,
                   int64_t stride);
  // The same over a plain strip, whose runs are so many steps.
  void (*multiply_scaled)(const uint16_t* tile, int64_t rows, const uint16_t* strip, int64_t steps, int64_t run,
                          const float* scales, bool fresh, float* sums, int64_t stride);
  // y [rows, count] = sums + bias, or += sums; `apart`: the sums' even columns come first.
  void (*finish)(const float* sums, int64_t stride, int64_t rows, int64_t count, bool apart, const uint16_t* bias,
                 bool add, uint16_t* y, int64_t y_stride);
};

}  // namespace lorasb
