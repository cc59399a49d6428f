// A quantized weight as bitsandbytes stores it. Plain C++: the kernels include this and no torch.
#pragma once

#include <cstdint>

namespace lorasb {

// What a weight is rounded to before it is used: the dtype that it was quantized from.
enum class Rounding : int { none = 0, bf16 = 1, fp16 = 2 };

// W [rows, columns], row by row in one piece. Element i is nibble i of `bytes` (the high one of a byte comes first),
// W[i] = table[nibble] * scale(i / block), in fp32.
struct Packed {
  const uint8_t* bytes = nullptr;
  int64_t rows = 0, columns = 0;
  int64_t block = 64;
  const float* table = nullptr;   // [16]
  float balance = 1.0f;           // what the table is multiplied by where it is rounded to bf16 without its scales
  const float* absmax = nullptr;  // [blocks], where statistics are plain
  // Nested statistics: scale = table2[absmax8[b]] * absmax2[b / block2] + offset; two roundings, as bitsandbytes has
  // it.
  const uint8_t* absmax8 = nullptr;
  const float* absmax2 = nullptr;
  const float* table2 = nullptr;  // [256]
  float offset = 0.0f;
  int64_t block2 = 256;
  int shift2 = 8;  // log2 of block2, or -1 where it is no power of two: a division takes longer than decoding a block
  Rounding rounding = Rounding::none;
  // 8 bits: W[i, j] = codes[i, j] * scales[i] / 127.
  const int8_t* codes = nullptr;
  const float* scales = nullptr;

  float scale(int64_t b) const {
    if (absmax != nullptr) return absmax[b];
    const float product = table2[absmax8[b]] * absmax2[shift2 < 0 ? b / block2 : b >> shift2];
    return product + offset;
  }

  // Scales of `count` blocks: where they are, or computed into `room`.
  const float* scales_from(int64_t b, int64_t count, float* room) const {
    if (absmax != nullptr) return absmax + b;
    for (int64_t i = 0; i < count; ++i) room[i] = scale(b + i);
    return room;
  }

  // Whether every row begins with a block of its own, and a block is a power of two and a whole number of vectors.
  bool whole_blocks() const {
    return codes == nullptr && block >= 32 && (block & (block - 1)) == 0 && columns % block == 0;
  }

  int block_shift() const { return __builtin_ctzll(static_cast<unsigned long long>(block)); }
};

}  // namespace lorasb
