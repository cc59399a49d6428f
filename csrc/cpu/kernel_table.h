// What an instruction set brings: one table of functions for each, chosen at run time.
#pragma once

#include <cstdint>

#include "cpu/bf16_microkernel.h"
#include "cpu/fp32_microkernel.h"
#include "cpu/packed_weight.h"

namespace lorasb {

constexpr int kDirectRows = 4;  // rows of x that a direct product takes at once
constexpr int kDotRows = 8;     // and that `dot_bf16` takes

struct Kernels {
  const char* name = nullptr;

  // Elements [first, first + count) of W, in fp32, bf16 or fp16; bit-equal to bitsandbytes.
  void (*decode_f32)(const Packed& w, int64_t first, int64_t count, float* out) = nullptr;
  void (*decode_bf16)(const Packed& w, int64_t first, int64_t count, uint16_t* out) = nullptr;
  void (*decode_f16)(const Packed& w, int64_t first, int64_t count, uint16_t* out) = nullptr;
  // The same past the caches, for what does not fit into them: `out` and `first` are whole lines. Null where there is
  // no such thing.
  void (*stream_bf16)(const Packed& w, int64_t first, int64_t count, uint16_t* out) = nullptr;

  // y [rows, stride of y] = x W[low:high]ᵀ for up to kDirectRows rows of x, in fp32. `even` and `odd` hold the columns
  // of x apart, rows of half_stride(columns). W has whole blocks.
  void (*dot)(const Packed& w, const float* even, const float* odd, int64_t rows, int64_t low, int64_t high, float* y,
              int64_t stride) = nullptr;

  // sums [rows, width] = dy [rows, stride of dy] W[:, first:first + width], in fp32; width is a multiple of the block.
  // The sums lie apart by column: width / 2 even ones, then the odd ones.
  void (*dot_transposed)(const Packed& w, const float* dy, int64_t stride, int64_t rows, int64_t first, int64_t width,
                         float* sums) = nullptr;

  // The same as `dot` for up to kDotRows rows in bf16, where the processor multiplies it; null elsewhere. `streams` is
  // what `arrange_bf16` makes of x.
  int few_tokens = kDotRows;  // for more, strips are faster
  void (*arrange_bf16)(const uint16_t* x, int64_t columns, uint16_t* streams) = nullptr;
  void (*dot_bf16)(const Packed& w, const uint16_t* streams, int64_t rows, int64_t low, int64_t high, float* y,
                   int64_t stride) = nullptr;

  // The adapter's thin products for up to kDirectRows rows in bf16; null where bf16 is not multiplied.
  // y [rows, stride of y] (+)= x [rows, stride of x] D[low:high]ᵀ for a dense D [.., columns] in one piece.
  void (*dense_dot_bf16)(const uint16_t* x, int64_t x_stride, int64_t rows, const uint16_t* d, int64_t columns,
                         int64_t low, int64_t high, float* y, int64_t stride, bool add) = nullptr;
  // sums [rows, width] += c [rows, stride of c] D[low:high, first:first + width] for a dense D [.., columns].
  void (*dense_add_bf16)(const float* c, int64_t stride, int64_t rows, const uint16_t* d, int64_t columns, int64_t low,
                         int64_t high, int64_t first, int64_t width, float* sums) = nullptr;

  // Rows [low, high) of G [m, n] fp32 (+)= dyᵀ x over `pairs` pairs of tokens, in bf16; null where bf16 is not
  // multiplied. `left` is dy as [pairs, m, 2]; `right` is x as panels of kOuterColumns columns, [pairs, kOuterColumns,
  // 2] each.
  void (*outer_bf16)(const uint16_t* left, const uint16_t* right, int64_t m, int64_t n, int64_t pairs, int64_t low,
                     int64_t high, float* total, bool fresh) = nullptr;

  // Booleans of a matrix's row, 32 a word: bit j of a word is x[32 * word + j] > 0 (and != 0). Returns Σ x² in fp64 and
  // counts zeros and entries that are not finite.
  double (*pack_signs)(const float* x, int64_t count, uint32_t* positive, uint32_t* nonzero, int64_t* zeros,
                       int64_t* bad) = nullptr;

  const StripKernels* strips = nullptr;  // null where bf16 is not multiplied
  const GemmKernels* gemm = nullptr;     // never null
  bool gemm_beats_blas = false;          // our fp32 product against panels for the BLAS, where that was measured
};

constexpr int kDenseTaps = 4;      // rows of a dense matrix that are read at once
constexpr int kOuterColumns = 64;  // columns of G that a panel of x covers

// Strides of rows that are read side by side: never a multiple of 4096 bytes, which would put all of them into the same
// few lines of a first-level cache.
inline int64_t half_stride(int64_t columns) { return columns / 2 + 16; }
// Of one row of x in bf16: whole steps of 128 columns, the last padded with zeros, and then up to half of those 4096
// bytes and a line more, so that eight rows' equal columns take half of the cache each and none the same lines.
inline int64_t stream_stride(int64_t columns) {
  const int64_t whole = (columns + 127) / 128 * 128;
  return whole + ((1024 + 32 - whole) % 2048 + 2048) % 2048;
}

const Kernels& portable_kernels();
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LORASB_X86 1
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
#if defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define LORASB_AMX 1
const Kernels& amx_kernels();
bool may_use_tiles();  // whether the system lets this process use a tile's registers
#endif
#endif

}  // namespace lorasb
