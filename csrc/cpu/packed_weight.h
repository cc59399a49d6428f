// A quantized weight as bitsandbytes stores it. Plain C++: the kernels include this and no torch.
//
// 4 bits: W [rows, columns] is flattened row by row and cut into blocks of `block` elements, each with one scale.
//
//   bytes    | e0 e1 | e2 e3 | ..                element i is nibble i; the high nibble of a byte comes first
//   scales   | block 0 | block 1 | ..            W[i] = table[nibble] * scale(i / block), in fp32
//
// Blocks cross the ends of rows unless `columns` is a multiple of `block`; kernels that walk over rows require that:
// whole_blocks().
#pragma once

#include <cstdint>

namespace lorasb {

// What a weight is rounded to before it is used: the dtype that it was quantized from.
enum class Rounding : int { none = 0, bf16 = 1, fp16 = 2 };

struct Packed {
  const uint8_t* bytes = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t block = 64;
  const float* table = nullptr;  // [16]
  // Multiplies the table if its entries are rounded to bf16 without their scales; sums are divided by it.
  float balance = 1.0f;
  const float* absmax = nullptr;  // [blocks], where statistics are plain

  // Nested statistics: scale = table2[absmax8[b]] * absmax2[b / block2] + offset. Product and sum are rounded one after
  // the other, as bitsandbytes rounds them: an fma would change the weight's last bit (-ffp-contract=off in setup.py).
  const uint8_t* absmax8 = nullptr;
  const float* absmax2 = nullptr;
  const float* table2 = nullptr;  // [256]
  float offset = 0.0f;
  int64_t block2 = 256;
  int shift2 = 8;  // log2 of block2, or -1 where it is no power of two: a division takes longer than decoding a block

  Rounding rounding = Rounding::none;

  // 8 bits: W[i, j] = codes[i, j] * scales[i] / 127. Null for 4 bits.
  const int8_t* codes = nullptr;
  const float* scales = nullptr;

  float scale(int64_t b) const {
    if (absmax != nullptr) return absmax[b];
    const float product = table2[absmax8[b]] * absmax2[shift2 < 0 ? b / block2 : b >> shift2];
    return product + offset;
  }

  // Scales of `count` blocks: where they are stored, or computed into `scratch`.
  const float* scales_from(int64_t b, int64_t count, float* scratch) const {
    if (absmax != nullptr) return absmax + b;
    for (int64_t i = 0; i < count; ++i) scratch[i] = scale(b + i);
    return scratch;
  }

  // True if every row begins with a new block, and a block is a power of two and a whole number of vectors: no
  // vector of a row then needs two scales, and a shift of a column gives b.
  bool whole_blocks() const {
    return codes == nullptr && block >= 32 && (block & (block - 1)) == 0 && columns % block == 0;
  }

  int block_shift() const { return __builtin_ctzll(static_cast<unsigned long long>(block)); }
};

}  // namespace lorasb
