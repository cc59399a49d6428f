// Packing of `Bf16GemmKernels` on AVX-512 with bf16: micro-panels of tokens, of a quantized W and of a dense factor
// (layout and pairing: cpu/bf16_microkernel.h); included inside a target region. AMX uses it as well.

namespace lorasb {
namespace {

// Sizes in bf16 elements.
constexpr int kPairSize = 2 * kBf16Nr;           // of one pair of k in a micro-panel of W
constexpr int kStepSize = kBf16KStep * kBf16Nr;  // of one step of a micro-panel of W

// Prefetching: a row's piece is too short for the hardware prefetcher.
constexpr int kColumnsAhead = 1024;  // columns of W ahead, where W's rows are columns of C
constexpr int kRowsAhead = 16;       // rows of W ahead, where W's columns are columns of C

// The permutation of 32 columns that makes neighbors of columns c and c + distance in each 2 * distance of them.
inline __m512i pairing(int distance) {
  alignas(64) uint16_t column[32];
  for (int i = 0; i < 32; ++i) {
    column[i] = static_cast<uint16_t>(i / (2 * distance) * 2 * distance + i % (2 * distance) / 2 + i % 2 * distance);
  }
  return _mm512_load_si512(column);
}

// Missing rows of a micro-panel are not written: micro-kernels do not store their sums, or these are never read.
void pack_bf16_tokens(const Bf16Matrix& x, const TokenLayout& layout, Range panels, uint16_t* dst) {
  const int64_t steps = (x.columns + kBf16KStep - 1) / kBf16KStep, all_panels = (x.rows + layout.mr - 1) / layout.mr;
  const int64_t step_size = layout.mr * kBf16KStep;
  const __m512i order = pairing(layout.pair_distance);
  for (int64_t begin = 0; begin < steps; begin += layout.steps) {
    const int64_t length = steps - begin < layout.steps ? steps - begin : layout.steps;
    uint16_t* panel = dst + (begin * all_panels + panels.begin * length) * step_size;
    for (int64_t t = panels.begin; t < panels.end; ++t, panel += length * step_size) {
      const int64_t first = t * layout.mr, count = x.rows - first < layout.mr ? x.rows - first : layout.mr;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t s = 0; s < length; ++s) {
          const int64_t column = (begin + s) * kBf16KStep;
          const __m512i values =
              _mm512_maskz_loadu_epi16(first_of_32(x.columns - column), x.data + (first + i) * x.ld + column);
          _mm512_storeu_si512(panel + s * step_size + i * kBf16KStep, _mm512_permutexvar_epi16(order, values));
        }
      }
    }
  }
}

// t[q] = 64-bit word q of each of eight rows of 64 bytes.
inline void transpose_words(const __m512i* rows, __m512i* t) {
  for (int odd = 0; odd < 2; ++odd) {
    __m512i pairs[4];
    for (int i = 0; i < 4; ++i) {
      pairs[i] = odd ? _mm512_unpackhi_epi64(rows[2 * i], rows[2 * i + 1])
                     : _mm512_unpacklo_epi64(rows[2 * i], rows[2 * i + 1]);
    }
    const __m512i low = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0x44);
    const __m512i low_upper = _mm512_shuffle_i64x2(pairs[2], pairs[3], 0x44);
    const __m512i high = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0xee);
    const __m512i high_upper = _mm512_shuffle_i64x2(pairs[2], pairs[3], 0xee);
    t[odd] = _mm512_shuffle_i64x2(low, low_upper, 0x88);
    t[2 + odd] = _mm512_shuffle_i64x2(low, low_upper, 0xdd);
    t[4 + odd] = _mm512_shuffle_i64x2(high, high_upper, 0x88);
    t[6 + odd] = _mm512_shuffle_i64x2(high, high_upper, 0xdd);
  }
}

// Loads four 32-bit words of each of 16 rows: words[i] has word i of all rows.
inline void words_of_rows(const void* src, int64_t row_bytes, __m512i* words) {
  const uint8_t* const bytes = static_cast<const uint8_t*>(src);
  const auto load = [](const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  __m512i rows[4];
  for (int l = 0; l < 4; ++l) {
    const uint8_t* const row = bytes + l * row_bytes;
    rows[l] = _mm512_inserti32x4(_mm512_castsi128_si512(load(row)), load(row + 4 * row_bytes), 1);
    rows[l] =
        _mm512_inserti32x4(_mm512_inserti32x4(rows[l], load(row + 8 * row_bytes), 2), load(row + 12 * row_bytes), 3);
  }
  const __m512i low = _mm512_unpacklo_epi32(rows[0], rows[1]), high = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i low_upper = _mm512_unpacklo_epi32(rows[2], rows[3]);
  const __m512i high_upper = _mm512_unpackhi_epi32(rows[2], rows[3]);
  words[0] = _mm512_unpacklo_epi64(low, low_upper);
  words[1] = _mm512_unpackhi_epi64(low, low_upper);
  words[2] = _mm512_unpacklo_epi64(high, high_upper);
  words[3] = _mm512_unpackhi_epi64(high, high_upper);
}

// Scales of blocks [b, b + count) of each of 16 rows of W from `low` on, zero beyond W: dst [count, 16].
inline void scales_of_rows(const Packed& w, int64_t low, int64_t b, int64_t count, MutableMatrixView dst) {
  const int64_t blocks = w.columns >> w.block_shift();
  if (w.absmax != nullptr && count % 4 == 0 && low + 16 <= w.rows) {
    for (int64_t i = 0; i < count; i += 4) {
      __m512i words[4];
      words_of_rows(w.absmax + low * blocks + b + i, blocks * sizeof(float), words);
      for (int k = 0; k < 4; ++k) _mm512_storeu_si512(dst.data + (i + k) * dst.ld, words[k]);
    }
    return;
  }
  for (int l = 0; l < 16; ++l) {
    const bool exists = low + l < w.rows;
    for (int64_t i = 0; i < count; ++i) {
      dst.data[i * dst.ld + l] = exists ? w.scale((low + l) * blocks + b + i) : 0.0f;
    }
  }
}

// 16 columns of 16 rows of W into eight pairs of a micro-panel. A row's 16 nibbles are two 32-bit lanes, 2l and 2l + 1
// of `upper` for rows 0 to 7 and of `lower` for rows 8 to 15: one look-up gives column c from the even lanes and column
// c + 8 from the odd ones, which is the pair.
template <int kNibble>
inline void pack_pairs(__m512i upper, __m512i lower, __m512 table, __m512 upper_scales, __m512 lower_scales,
                       uint16_t* dst) {
  if constexpr (kNibble < 8) {
    const __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(upper, 4 * kNibble), table);
    const __m512 second = _mm512_permutexvar_ps(_mm512_srli_epi32(lower, 4 * kNibble), table);
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(second, lower_scales), _mm512_mul_ps(first, upper_scales));
    _mm512_storeu_si512(dst + (kNibble ^ 1) * kPairSize, (__m512i)both);  // the high nibble comes first
    pack_pairs<kNibble + 1>(upper, lower, table, upper_scales, lower_scales, dst);
  }
}

// 16 rows of W from `row` on, half of a micro-panel. Rows beyond W are read as its last one, with scales of zero.
// `bytes_ahead` is the distance to what will be decoded later, which is prefetched into the second-level cache.
void pack_transposed_half(const Packed& w, __m512 table, int64_t row, const PanelBlock& block, int64_t bytes_ahead,
                          uint16_t* dst) {
  const int shift = w.block_shift();
  const int64_t half = w.columns / 2, first_block = block.k0 >> shift;
  const int64_t blocks = ((block.k0 + block.kc - 1) >> shift) - first_block + 1;
  alignas(64) float scales[kBf16MaxKc / 32][16];
  const uint8_t* bytes[16];
  for (int l = 0; l < 16; ++l) {
    bytes[l] = w.bytes + (row + l < w.rows ? row + l : w.rows - 1) * half + block.k0 / 2;
  }
  scales_of_rows(w, row, first_block, blocks, {scales[0], 16});
  const __m512i upper_rows = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i lower_rows = _mm512_add_epi32(upper_rows, _mm512_set1_epi32(8));
  for (int64_t c = 0; c < block.kc; c += 128) {  // 64 bytes of each row
    const int words = static_cast<int>(block.kc - c < 128 ? (block.kc - c) / 16 : 8);
    const __mmask8 valid = static_cast<__mmask8>((1u << words) - 1);
    __m512i rows[8], upper[8], lower[8];
    for (int l = 0; l < 16; ++l)
      _mm_prefetch(reinterpret_cast<const char*>(bytes[l] + c / 2 + bytes_ahead), _MM_HINT_T1);
    for (int l = 0; l < 8; ++l) rows[l] = _mm512_maskz_loadu_epi64(valid, bytes[l] + c / 2);
    transpose_words(rows, upper);
    for (int l = 0; l < 8; ++l) rows[l] = _mm512_maskz_loadu_epi64(valid, bytes[8 + l] + c / 2);
    transpose_words(rows, lower);
    for (int q = 0; q < words; ++q) {
      const int64_t column = c + 16 * q;
      const __m512 row_scales = _mm512_load_ps(scales[((block.k0 + column) >> shift) - first_block]);
      uint16_t* pairs = dst + column / kBf16KStep * kStepSize + column / 16 % 2 * 8 * kPairSize;
      pack_pairs<0>(upper[q], lower[q], table, _mm512_permutexvar_ps(upper_rows, row_scales),
                    _mm512_permutexvar_ps(lower_rows, row_scales), pairs);
    }
  }
}

// The distance in bytes to what is decoded later: further on in the same rows, or where the next block's rows begin.
inline int64_t prefetch_distance(const Packed& w, const PanelBlock& block) {
  const int64_t ahead = block.kc > kColumnsAhead ? block.kc : kColumnsAhead;
  const bool same_rows = block.k0 + ahead < w.columns;
  return (ahead + (same_rows ? 0 : (block.panels * kBf16Nr - 1) * w.columns)) / 2;
}

void pack_bf16_transposed(const Packed& w, const PanelBlock& block, uint16_t* dst) {
  const __m512 table = _mm512_loadu_ps(w.table);
  const int64_t bytes_ahead = prefetch_distance(w, block);
  for (int64_t h = 0; h < 2 * block.panels; ++h) {
    pack_transposed_half(w, table, block.n0 + h * 16, block, bytes_ahead,
                         dst + h / 2 * block.panel_stride + h % 2 * 32);
  }
}

// 16 rows of W without their scales: entries of the table, rounded. A 16-bit word holds columns 4i + 1, 4i, 4i + 3 and
// 4i + 2 in its nibbles from bit 0 up, and the two words of a lane are columns c and c + 4: a pair.
inline void pack_unscaled_half(const uint8_t* bytes, int64_t row_bytes, int64_t kc, int64_t bytes_ahead, __m512i table,
                               uint16_t* dst) {
  for (int64_t c = 0; c < kc; c += kBf16KStep, bytes += kBf16KStep / 2) {
    if (c % 128 == 0) {
      const char* later = reinterpret_cast<const char*>(bytes + bytes_ahead);
      for (int l = 0; l < 16; ++l) _mm_prefetch(later + l * row_bytes, _MM_HINT_T1);
    }
    __m512i words[4];
    words_of_rows(bytes, row_bytes, words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, dst += 4 * kPairSize) {  // the high nibble of a byte comes first
      _mm512_storeu_si512(dst, _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 4), table));
      _mm512_storeu_si512(dst + kPairSize, _mm512_permutexvar_epi16(words[i], table));
      _mm512_storeu_si512(dst + 2 * kPairSize, _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 12), table));
      _mm512_storeu_si512(dst + 3 * kPairSize, _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 8), table));
    }
  }
}

// Half the work of `pack_bf16_transposed`, for products of few tokens. The table was multiplied by the balance before
// it was rounded, and the scales are divided by it.
void pack_bf16_transposed_unscaled(const Packed& w, const PanelBlock& block, uint16_t* dst, float* scales) {
  const __m512i table = rounded_table(w);
  const int64_t half = w.columns / 2, bytes_ahead = prefetch_distance(w, block);
  const int64_t blocks = w.block < block.kc ? block.kc >> w.block_shift() : 1;
  for (int64_t h = 0; h < 2; ++h) {
    const int64_t row = block.n0 + 16 * h;
    float* half_scales = scales + 16 * h;
    scales_of_rows(w, row, block.k0 >> w.block_shift(), blocks, {half_scales, kBf16Nr});
    for (int64_t i = 0; i < blocks; ++i, half_scales += kBf16Nr) {
      _mm512_storeu_ps(half_scales, _mm512_div_ps(_mm512_loadu_ps(half_scales), _mm512_set1_ps(w.balance)));
    }
    const uint8_t* bytes = w.bytes + row * half + block.k0 / 2;
    if (row + 16 <= w.rows) {
      pack_unscaled_half(bytes, half, block.kc, bytes_ahead, table, dst + 32 * h);
      continue;
    }
    uint8_t last_rows[16][kBf16MaxKc / 2] = {};  // a copy, so that nothing past the last row is read
    for (int64_t l = 0; row + l < w.rows; ++l) __builtin_memcpy(last_rows[l], bytes + l * half, block.kc / 2);
    pack_unscaled_half(last_rows[0], kBf16MaxKc / 2, block.kc, 0, table, dst + 32 * h);
  }
}

// Rows `row` and `row` + 1 of W into a pair of each micro-panel. One look-up takes both: the table is scaled and
// rounded once for each row and block, and the second row's 16 entries are above the first's. Even columns come first,
// then odd ones. A last row without a neighbor is paired with itself, scaled by zero.
inline void pack_pair_of_rows(const Packed& w, __m512 table, int64_t row, const PanelBlock& block, uint16_t* dst) {
  const int shift = w.block_shift();
  const int64_t half = w.columns / 2, blocks = w.columns >> shift, next = row + 1 < w.rows ? row + 1 : row;
  const uint8_t *first_bytes = w.bytes + row * half + block.n0 / 2, *next_bytes = w.bytes + next * half + block.n0 / 2;
  const __m512i nibble = _mm512_set1_epi32(0x000f000f), second = _mm512_set1_epi32(0x00100000);
  constexpr int kSelect = 0xea;  // as a truth table: (nibble & 15) | 16 for the second row
  __m512i values = _mm512_setzero_si512();
  for (int64_t s = 0; s < block.panels; ++s) {
    const int64_t column = block.n0 + s * kBf16Nr;
    if (s == 0 || column % w.block == 0) {
      const int64_t b = column >> shift;
      const float next_scale = next > row ? w.scale(next * blocks + b) : 0.0f;
      values = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(table, _mm512_set1_ps(next_scale)),
                                            _mm512_mul_ps(table, _mm512_set1_ps(w.scale(row * blocks + b))));
    }
    const auto load = [&](const uint8_t* bytes) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + s * 16));
    };
    const __m512i upper = _mm512_cvtepu8_epi32(load(first_bytes)), lower = _mm512_cvtepu8_epi32(load(next_bytes));
    const __m512i words = _mm512_or_si512(upper, _mm512_slli_epi32(lower, 16));
    const __m512i even = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4), nibble, second, kSelect);
    const __m512i odd = _mm512_ternarylogic_epi32(words, nibble, second, kSelect);
    uint16_t* pair = dst + s * block.panel_stride;
    _mm512_storeu_si512(pair, _mm512_permutexvar_epi16(even, values));
    _mm512_storeu_si512(pair + 32, _mm512_permutexvar_epi16(odd, values));
  }
}

// Writes zeros from a pair of k on.
inline void clear_pairs(int64_t first_pair, const PanelBlock& block, uint16_t* dst) {
  for (int64_t s = 0; s < block.panels; ++s) {
    for (int64_t i = first_pair * kPairSize; i < block.kc * kBf16Nr; i += 32) {
      _mm512_storeu_si512(dst + s * block.panel_stride + i, _mm512_setzero_si512());
    }
  }
}

// The last micro-panel is full: whole blocks make the number of columns a multiple of 32.
void pack_bf16(const Packed& w, const PanelBlock& block, uint16_t* dst) {
  const __m512 table = _mm512_loadu_ps(w.table);
  const int64_t half = w.columns / 2;
  const int64_t end = block.k0 + block.kc < w.rows ? block.k0 + block.kc : w.rows;
  int64_t pair = 0;
  for (int64_t r = block.k0; r < end; r += 2, ++pair) {
    const uint8_t* later = w.bytes + (r + kRowsAhead) * half + block.n0 / 2;
    _mm_prefetch(reinterpret_cast<const char*>(later), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(later + half), _MM_HINT_T0);
    pack_pair_of_rows(w, table, r, block, dst + pair * kPairSize);
  }
  clear_pairs(pair, block, dst);
}

// D's rows as columns of C: two neighbors of a row are a pair already.
void pack_bf16_dense_transposed(const Bf16Matrix& d, const PanelBlock& block, uint16_t* dst) {
  clear_pairs(0, block, dst);
  const int64_t count = d.columns - block.k0 < block.kc ? d.columns - block.k0 : block.kc;
  for (int64_t l = 0; l < block.panels * kBf16Nr && block.n0 + l < d.rows; ++l) {
    uint16_t* column = dst + l / kBf16Nr * block.panel_stride + l % kBf16Nr * 2;
    const uint16_t* row = d.data + (block.n0 + l) * d.ld + block.k0;
    int64_t k = 0;
    for (; k + 1 < count; k += 2) __builtin_memcpy(column + k / 2 * kPairSize, row + k, 4);
    if (k < count) column[k / 2 * kPairSize] = row[k];
  }
}

// D's columns as columns of C, the even ones first, as for a quantized W.
void pack_bf16_dense(const Bf16Matrix& d, const PanelBlock& block, uint16_t* dst) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u)), low = _mm512_set1_epi32(0xffff);
  for (int64_t p = 0; 2 * p < block.kc; ++p) {
    const int64_t r = block.k0 + 2 * p;
    for (int64_t s = 0; s < block.panels; ++s) {
      const int64_t column = block.n0 + s * kBf16Nr;
      const __mmask32 valid = first_of_32(d.columns - column);
      const uint16_t* src = d.data + r * d.ld + column;
      const __m512i first = _mm512_maskz_loadu_epi16(r < d.rows ? valid : 0, src);
      const __m512i second = _mm512_maskz_loadu_epi16(r + 1 < d.rows ? valid : 0, src + d.ld);
      uint16_t* pair = dst + s * block.panel_stride + p * kPairSize;
      _mm512_storeu_si512(pair, _mm512_or_si512(_mm512_and_si512(first, low), _mm512_slli_epi32(second, 16)));
      _mm512_storeu_si512(pair + 32, _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(second, high)));
    }
  }
}

}  // namespace
}  // namespace lorasb
