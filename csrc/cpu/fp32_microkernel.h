// What an instruction set brings to products in fp32 of any number of tokens: packing, the micro-kernel, and the direct
// products of a few tokens.
#pragma once

#include <cstdint>

namespace lorasb {

// A dense matrix's element type.
enum class Element : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr int kFewRows = 4;  // rows of x that a direct product takes at once

// Terms as in BLIS: the micro-kernel multiplies a micro-panel of tokens [depth, mr] by one of lanes [depth, nr] and
// keeps mr x nr sums in registers. Lanes are rows of W forward and columns of W backward.
struct GemmKernels {
  int mr, nr;

  // `count` elements of a dense matrix in fp32.
  void (*widen)(const void* from, Element element, int64_t count, float* to);

  // sums [rows, nr] = (fresh) or += tokensᵀ · lanes, for up to mr rows. `ld` is the sums' leading dimension.
  void (*multiply)(const float* tokens, const float* lanes, int64_t depth, int64_t rows, bool fresh, float* sums,
                   int64_t ld);

  // Micro-panel of lanes [depth, nr] from `rows` rows [rows, depth] whose leading dimension is `ld`; zero beyond them.
  void (*transpose_lanes)(const float* from, int64_t ld, int64_t rows, int64_t depth, float* to);

  void (*transpose_bf16_lanes)(const uint16_t* from, int64_t ld, int64_t rows, int64_t depth, float* to);

  // Micro-panel of tokens [depth, mr] from `rows` rows likewise.
  void (*transpose_tokens)(const float* from, int64_t ld, int64_t rows, int64_t depth, float* to);

  // `count` elements of one row as row k of micro-panels of lanes: nr of them to `to`, the next nr to `to + apart`, and
  // so on; zero up to a whole number of nr.
  void (*spread_lanes)(const void* from, Element element, int64_t count, float* to, int64_t apart);

  // y [count] in an element type from sums, rounded to nearest even.
  void (*narrow)(const float* from, Element element, int64_t count, void* to);

  // sums [rows, stride] (+)= x [rows, x_stride] D[row] for rows [low, high) of a dense D [.., columns], leading
  // dimension ld: element [i, row]. Up to kFewRows rows of x; D is read once.
  void (*dot_rows)(const float* x, int64_t x_stride, int64_t rows, const void* d, Element element, int64_t ld,
                   int64_t columns, int64_t low, int64_t high, bool add, float* sums, int64_t stride);

  // sums [rows, stride] += c [rows, c_stride] D[low:high, first:first + width]. Up to kFewRows rows of c.
  void (*add_rows)(const float* c, int64_t c_stride, int64_t rows, const void* d, Element element, int64_t ld,
                   int64_t low, int64_t high, int64_t first, int64_t width, float* sums, int64_t stride);
};

inline int64_t size_of(Element element) { return element == Element::f32 ? 4 : 2; }

}  // namespace lorasb
