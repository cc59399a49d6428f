// What an instruction set provides: one table of functions for each, chosen at run time (cpu/dispatch.h).
//
// Kernels work on plain pointers and allocate nothing. All sums are in fp32, each in an order that depends on shapes
// alone: not on threads, and not on where a thread's part begins.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/bf16_microkernel.h"
#include "cpu/fp32_microkernel.h"
#include "cpu/matrix_view.h"
#include "cpu/packed_weight.h"

namespace lorasb {

constexpr int kDirectRows = 4;     // rows of x that `dot` and the dense products in bf16 take at once
constexpr int kDotRows = 8;        // rows of x that `dot_bf16` takes at once
constexpr int kDenseTaps = 4;      // rows of a dense matrix that are read at once
constexpr int kOuterColumns = 64;  // columns of G that a panel of x covers
constexpr int kOuterRows = 6;      // rows of G in a tile of `outer_bf16`
constexpr int kUnpackedRows = 32;  // rows of D, and tokens of a panel, that `multiply_unpacked` takes at once
constexpr int kUnpackedTokens = 32;

// Rows of x in fp32, split into even and odd columns, as a byte of W yields them: row i at even + i * ld.
struct SplitRows {
  const float *even, *odd;
  int64_t ld;
};

// dyᵀ x as an outer product over pairs of tokens in bf16: `left` is dy [pairs, m, 2], `right` is x as panels of
// kOuterColumns columns, [pairs, kOuterColumns, 2] each. An odd number of tokens is padded with zeros.
struct OuterOperands {
  const uint16_t *left, *right;
  int64_t m, n, pairs;
};

// A term of a sum of products in bf16 with a dense D [.., columns] that is read in place.
struct UnpackedTerm {
  Bf16View d;
  int64_t columns;
  const uint16_t* tokens;  // panels of `unpacked_panel` elements, as `arrange_tokens` makes each
};

struct SignCounts {
  double squares = 0.0;  // Σ x²
  int64_t zeros = 0, not_finite = 0;

  void add(const SignCounts& part) {
    squares += part.squares;
    zeros += part.zeros;
    not_finite += part.not_finite;
  }
};

struct Kernels {
  const char* name = nullptr;

  // Elements [first, first + count) of W, in fp32, bf16 or fp16; bit-equal to bitsandbytes.
  void (*decode_f32)(const Packed& w, int64_t first, int64_t count, float* dst) = nullptr;
  void (*decode_bf16)(const Packed& w, int64_t first, int64_t count, uint16_t* dst) = nullptr;
  void (*decode_f16)(const Packed& w, int64_t first, int64_t count, uint16_t* dst) = nullptr;
  // The same with non-temporal stores, for results that exceed the caches: `dst` and `first` begin cache lines. Null if
  // there is no such kernel.
  void (*stream_bf16)(const Packed& w, int64_t first, int64_t count, uint16_t* dst) = nullptr;

  // y [rows, ..] = x W[w_rows]ᵀ for up to kDirectRows rows of x: column r of y takes row r of W. W has whole blocks.
  void (*dot)(const Packed& w, SplitRows x, int64_t rows, Range w_rows, MutableMatrixView y) = nullptr;

  // sums [rows, columns.size()] = dy [rows, ..] W[:, columns]; `columns` are whole blocks. In each row of the sums the
  // even columns come first, then the odd ones.
  void (*dot_transposed)(const Packed& w, MatrixView dy, int64_t rows, Range columns, float* sums) = nullptr;

  // As `dot` for up to kDotRows rows in bf16, where the processor multiplies it; null elsewhere. `streams` is what
  // `arrange_bf16` makes of x, rows of stream_stride(columns).
  int max_few_tokens = kDotRows;  // for more, the blocked product is faster
  void (*arrange_bf16)(const uint16_t* x, int64_t columns, uint16_t* streams) = nullptr;
  void (*dot_bf16)(const Packed& w, const uint16_t* streams, int64_t rows, Range w_rows, MutableMatrixView y) = nullptr;

  // The adapter's thin products for up to kDirectRows rows in bf16; null where bf16 is not multiplied.
  // y [rows, ..] = or += x [rows, columns] D[d_rows]ᵀ: column r of y takes row r of D.
  void (*dense_dot_bf16)(Bf16View x, int64_t rows, Bf16View d, int64_t columns, Range d_rows, bool accumulate,
                         MutableMatrixView y) = nullptr;
  // sums [rows, d_columns.size()] += c [rows, ..] D[d_rows, d_columns].
  void (*dense_add_bf16)(MatrixView c, int64_t rows, Bf16View d, Range d_rows, Range d_columns, float* sums) = nullptr;

  // Reading a dense W in place is faster than the BLAS, which packs it, for up to min_unpacked_tokens, and for up to
  // max_unpacked_tokens while tokens x elements of W <= max_unpacked_products. 0 tokens where bf16 is not multiplied.
  int64_t min_unpacked_tokens = 0, max_unpacked_tokens = 0;
  int64_t max_unpacked_products = std::numeric_limits<int64_t>::max();
  // One panel of up to kUnpackedTokens tokens of x [count, columns], in the order that `multiply_unpacked` reads.
  void (*arrange_tokens)(Bf16View x, int64_t count, int64_t columns, uint16_t* dst) = nullptr;
  // y [tokens, rows] in bf16 = the sum of x_t D_t[rows]ᵀ over terms + bias, rounded once; y's column r is D's row r.
  void (*multiply_unpacked)(const UnpackedTerm* terms, int count, int64_t tokens, Range rows, const uint16_t* bias,
                            MutableBf16View y) = nullptr;

  // Rows `rows` of G [m, n] in fp32 = or += dyᵀ x; null where bf16 is not multiplied. `total` is G's first element.
  void (*outer_bf16)(const OuterOperands& operands, Range rows, bool overwrite, float* total) = nullptr;

  // Booleans of a matrix's row, 32 per word: bit j of a word is x[32 * word + j] > 0 (and != 0).
  SignCounts (*pack_signs)(const float* x, int64_t count, uint32_t* positive, uint32_t* nonzero) = nullptr;

  Bf16GemmKernels bf16_gemm{};
  Fp32GemmKernels fp32_gemm{};
  bool fp32_gemm_beats_blas = false;  // true where the blocked product was measured to be faster than panels

  bool multiplies_bf16() const { return bf16_gemm.mr > 0; }
};

// Leading dimensions of rows that are read side by side: never a multiple of 4096 bytes, which would map all of them to
// the same few sets of a first-level cache.
inline int64_t half_stride(int64_t columns) { return columns / 2 + 16; }
// For one row of x in bf16: full steps of 128 columns, the last padded with zeros, and then up to 2112 bytes (half of
// 4096 and a line) past a multiple of 4096, so that the same column of eight rows is in different sets.
inline int64_t stream_stride(int64_t columns) {
  const int64_t whole = (columns + 127) / 128 * 128;
  return whole + ((1024 + 32 - whole) % 2048 + 2048) % 2048;
}

// Elements of a panel of tokens for `multiply_unpacked`: whole steps of columns.
inline int64_t unpacked_panel(int64_t columns) {
  return (columns + kBf16KStep - 1) / kBf16KStep * kBf16KStep * kUnpackedTokens;
}

Kernels portable_kernels();
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LORASB_X86 1
Kernels avx2_kernels();
Kernels avx512_kernels();
Kernels avx512_bf16_kernels();
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define LORASB_AMX 1
Kernels amx_kernels();
// Linux gives a process the 8 KiB of AMX state only on request: true if it did.
bool amx_permitted();
#endif
#endif

}  // namespace lorasb
