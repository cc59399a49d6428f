// Strips and tiles of `StripKernels` on AVX-512 with bf16; included inside a target region.

namespace lorasb {
namespace {

constexpr int kPairWords = 2 * kStripLanes;            // bf16 of one pair of a strip
constexpr int kStepWords = kStripDepth * kStripLanes;  // of one step of a strip
constexpr int kTileTokens = 8;                         // rows of x in a tile
constexpr int kTileWords = kStripDepth * kTileTokens;  // of one step of a tile
constexpr int kColumnsAhead = 1024;                    // of a row of W that are fetched ahead when rows are lanes
constexpr int kRowsAhead = 16;                         // rows of W that are fetched ahead when columns are lanes

inline __mmask32 first_of_32(int64_t count) { return count >= 32 ? 0xffffffffu : count > 0 ? (1u << count) - 1 : 0u; }

// Pairs of columns that lie `apart` in each 2 * apart of them.
inline __m512i columns_apart(int apart) {
  alignas(64) uint16_t place[32];
  for (int i = 0; i < 32; ++i) {
    place[i] = static_cast<uint16_t>(i / (2 * apart) * 2 * apart + i % (2 * apart) / 2 + i % 2 * apart);
  }
  return _mm512_load_si512(place);
}

void token_tiles(const uint16_t* x, int64_t stride, int64_t rows, int64_t columns, int tokens, int apart, int64_t chunk,
                 int64_t low, int64_t high, uint16_t* out) {
  const int64_t steps = (columns + kStripDepth - 1) / kStripDepth, tiles = (rows + tokens - 1) / tokens;
  const int64_t words = tokens * kStripDepth;
  const __m512i order = columns_apart(apart);
  for (int64_t begin = 0; begin < steps; begin += chunk) {
    const int64_t length = steps - begin < chunk ? steps - begin : chunk;
    uint16_t* to = out + (begin * tiles + low * length) * words;
    for (int64_t t = low; t < high; ++t, to += length * words) {
      const int64_t first = t * tokens, count = rows - first < tokens ? rows - first : tokens;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t s = 0; s < length; ++s) {
          const int64_t column = (begin + s) * kStripDepth;
          const __m512i values =
              _mm512_maskz_loadu_epi16(first_of_32(columns - column), x + (first + i) * stride + column);
          _mm512_storeu_si512(to + s * words + i * kStripDepth, _mm512_permutexvar_epi16(order, values));
        }
      }
    }
  }
}

// t[q] = 64-bit word q of each of eight rows.
inline void transpose_words(const __m512i* rows, __m512i* t) {
  for (int odd = 0; odd < 2; ++odd) {
    __m512i pairs[4];
    for (int i = 0; i < 4; ++i) {
      pairs[i] = odd ? _mm512_unpackhi_epi64(rows[2 * i], rows[2 * i + 1])
                     : _mm512_unpacklo_epi64(rows[2 * i], rows[2 * i + 1]);
    }
    const __m512i low = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0x44);
    const __m512i low_rest = _mm512_shuffle_i64x2(pairs[2], pairs[3], 0x44);
    const __m512i high = _mm512_shuffle_i64x2(pairs[0], pairs[1], 0xee);
    const __m512i high_rest = _mm512_shuffle_i64x2(pairs[2], pairs[3], 0xee);
    t[odd] = _mm512_shuffle_i64x2(low, low_rest, 0x88);
    t[2 + odd] = _mm512_shuffle_i64x2(low, low_rest, 0xdd);
    t[4 + odd] = _mm512_shuffle_i64x2(high, high_rest, 0x88);
    t[6 + odd] = _mm512_shuffle_i64x2(high, high_rest, 0xdd);
  }
}

// Four 32-bit words of each of 16 rows, a word of all of them in each vector.
inline void words_of_rows(const void* from, int64_t stride, __m512i* words) {
  const uint8_t* const bytes = static_cast<const uint8_t*>(from);
  const auto load = [](const uint8_t* at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); };
  __m512i rows[4];
  for (int l = 0; l < 4; ++l) {
    const uint8_t* const row = bytes + l * stride;
    rows[l] = _mm512_inserti32x4(_mm512_castsi128_si512(load(row)), load(row + 4 * stride), 1);
    rows[l] = _mm512_inserti32x4(_mm512_inserti32x4(rows[l], load(row + 8 * stride), 2), load(row + 12 * stride), 3);
  }
  const __m512i low = _mm512_unpacklo_epi32(rows[0], rows[1]), high = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i low_rest = _mm512_unpacklo_epi32(rows[2], rows[3]);
  const __m512i high_rest = _mm512_unpackhi_epi32(rows[2], rows[3]);
  words[0] = _mm512_unpacklo_epi64(low, low_rest);
  words[1] = _mm512_unpackhi_epi64(low, low_rest);
  words[2] = _mm512_unpacklo_epi64(high, high_rest);
  words[3] = _mm512_unpackhi_epi64(high, high_rest);
}

// Scales of blocks [b, b + runs) of each of 16 rows from `low` on, zero beyond W: [runs, stride].
inline void scales_of_rows(const Packed& w, int64_t low, int64_t b, int64_t runs, float* out, int64_t stride) {
  const int64_t blocks = w.columns >> w.block_shift();
  if (w.absmax != nullptr && runs % 4 == 0 && low + 16 <= w.rows) {
    for (int64_t i = 0; i < runs; i += 4) {
      __m512i words[4];
      words_of_rows(w.absmax + low * blocks + b + i, blocks * sizeof(float), words);
      for (int k = 0; k < 4; ++k) _mm512_storeu_si512(out + (i + k) * stride, words[k]);
    }
    return;
  }
  for (int l = 0; l < 16; ++l) {
    const bool there = low + l < w.rows;
    for (int64_t i = 0; i < runs; ++i) out[i * stride + l] = there ? w.scale((low + l) * blocks + b + i) : 0.0f;
  }
}

// 16 columns of 16 rows of W into eight pairs of a strip: lanes 2l and 2l + 1 of `words` are the two halves of row l.
template <int kNibble>
inline void strip_pairs(__m512i upper, __m512i lower, __m512 table, __m512 upper_scales, __m512 lower_scales,
                        uint16_t* out) {
  if constexpr (kNibble < 8) {
    const __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(upper, 4 * kNibble), table);
    const __m512 second = _mm512_permutexvar_ps(_mm512_srli_epi32(lower, 4 * kNibble), table);
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(second, lower_scales), _mm512_mul_ps(first, upper_scales));
    _mm512_storeu_si512(out + (kNibble ^ 1) * kPairWords, (__m512i)both);  // the high nibble comes first
    strip_pairs<kNibble + 1>(upper, lower, table, upper_scales, lower_scales, out);
  }
}

// `next` is how far what will be decoded after this lies, in bytes: it is fetched meanwhile.
void half_strip(const Packed& w, __m512 table, int64_t low, int64_t first, int64_t depth, int64_t next, uint16_t* out) {
  const int shift = w.block_shift();
  const int64_t half = w.columns / 2, origin = first >> shift;
  const int64_t used = ((first + depth - 1) >> shift) - origin + 1;
  alignas(64) float scales[kStripChunk / 32][16];
  const uint8_t* bytes[16];
  for (int l = 0; l < 16; ++l) {
    const int64_t row = low + l < w.rows ? low + l : w.rows - 1;
    bytes[l] = w.bytes + row * half + first / 2;
  }
  scales_of_rows(w, low, origin, used, scales[0], 16);
  const __m512i upper_rows = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  const __m512i lower_rows = _mm512_add_epi32(upper_rows, _mm512_set1_epi32(8));
  for (int64_t c = 0; c < depth; c += 128) {
    const int words = static_cast<int>(depth - c < 128 ? (depth - c) / 16 : 8);
    const __mmask8 there = static_cast<__mmask8>((1u << words) - 1);
    __m512i rows[8], upper[8], lower[8];
    for (int l = 0; l < 16; ++l) _mm_prefetch(reinterpret_cast<const char*>(bytes[l] + c / 2 + next), _MM_HINT_T1);
    for (int l = 0; l < 8; ++l) rows[l] = _mm512_maskz_loadu_epi64(there, bytes[l] + c / 2);
    transpose_words(rows, upper);
    for (int l = 0; l < 8; ++l) rows[l] = _mm512_maskz_loadu_epi64(there, bytes[8 + l] + c / 2);
    transpose_words(rows, lower);
    for (int q = 0; q < words; ++q) {
      const int64_t column = c + 16 * q;
      const __m512 of_rows = _mm512_load_ps(scales[((first + column) >> shift) - origin]);
      uint16_t* target = out + column / kStripDepth * kStepWords + column / 16 % 2 * 8 * kPairWords;
      strip_pairs<0>(upper[q], lower[q], table, _mm512_permutexvar_ps(upper_rows, of_rows),
                     _mm512_permutexvar_ps(lower_rows, of_rows), target);
    }
  }
}

// How far what is decoded later lies, in bytes: further on in the same rows, or where the next strips' rows begin.
inline int64_t columns_ahead(const Packed& w, const Piece& piece) {
  const int64_t ahead = piece.depth > kColumnsAhead ? piece.depth : kColumnsAhead;
  const bool goes_on = piece.first + ahead < w.columns;
  return (ahead + (goes_on ? 0 : (piece.strips * kStripLanes - 1) * w.columns)) / 2;
}

void strips_of_rows(const Packed& w, const Piece& piece, uint16_t* out) {
  const __m512 table = _mm512_loadu_ps(w.table);
  const int64_t next = columns_ahead(w, piece);
  for (int64_t h = 0; h < 2 * piece.strips; ++h) {
    half_strip(w, table, piece.lane + h * 16, piece.first, piece.depth, next, out + h / 2 * piece.apart + h % 2 * 32);
  }
}

// 16 rows of W as lanes without their scales: entries of the table, rounded.
inline void plain_half_strip(const uint8_t* bytes, int64_t stride, int64_t depth, int64_t next, __m512i table,
                             uint16_t* out) {
  for (int64_t c = 0; c < depth; c += kStripDepth, bytes += kStripDepth / 2) {
    if (c % 128 == 0) {
      const char* later = reinterpret_cast<const char*>(bytes + next);
      for (int l = 0; l < 16; ++l) _mm_prefetch(later + l * stride, _MM_HINT_T1);
    }
    __m512i words[4];
    words_of_rows(bytes, stride, words);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i, out += 4 * kPairWords) {  // the high nibble of a byte comes first
      _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 4), table));
      _mm512_storeu_si512(out + kPairWords, _mm512_permutexvar_epi16(words[i], table));
      _mm512_storeu_si512(out + 2 * kPairWords, _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 12), table));
      _mm512_storeu_si512(out + 3 * kPairWords, _mm512_permutexvar_epi16(_mm512_srli_epi16(words[i], 8), table));
    }
  }
}

// Half the work of `strips_of_rows`, for few tokens to share it.
void plain_strips_of_rows(const Packed& w, const Piece& piece, uint16_t* out, float* scales) {
  const __m512i table = rounded_table(w);
  const int64_t half = w.columns / 2, next = columns_ahead(w, piece);
  const int64_t runs = w.block < piece.depth ? piece.depth >> w.block_shift() : 1;
  for (int64_t h = 0; h < 2; ++h) {
    const int64_t low = piece.lane + 16 * h;
    float* of_half = scales + 16 * h;
    scales_of_rows(w, low, piece.first >> w.block_shift(), runs, of_half, kStripLanes);
    for (int64_t i = 0; i < runs; ++i, of_half += kStripLanes) {
      _mm512_storeu_ps(of_half, _mm512_div_ps(_mm512_loadu_ps(of_half), _mm512_set1_ps(w.balance)));
    }
    const uint8_t* bytes = w.bytes + low * half + piece.first / 2;
    if (low + 16 <= w.rows) {
      plain_half_strip(bytes, half, piece.depth, next, table, out + 32 * h);
      continue;
    }
    uint8_t last[16][kStripChunk / 2] = {};  // rows that are there, and others
    for (int64_t l = 0; low + l < w.rows; ++l) __builtin_memcpy(last[l], bytes + l * half, piece.depth / 2);
    plain_half_strip(last[0], kStripChunk / 2, piece.depth, 0, table, out + 32 * h);
  }
}

// Rows `low` and `low` + 1 of W into a pair of each strip. One look-up takes both: the table of the second row lies
// above the first's. Even columns come first, then odd ones.
inline void pair_of_rows(const Packed& w, __m512 table, int64_t low, const Piece& piece, uint16_t* out) {
  const int shift = w.block_shift();
  const int64_t first = piece.lane, half = w.columns / 2, blocks = w.columns >> shift,
                next = low + 1 < w.rows ? low + 1 : low;
  const uint8_t *one = w.bytes + low * half + first / 2, *two = w.bytes + next * half + first / 2;
  const __m512i nibble = _mm512_set1_epi32(0x000f000f), second = _mm512_set1_epi32(0x00100000);
  constexpr int kPlace = 0xea;  // (nibble & 15) | 16 for the second row
  __m512i values = _mm512_setzero_si512();
  for (int64_t s = 0; s < piece.strips; ++s) {
    const int64_t column = first + s * kStripLanes;
    if (s == 0 || column % w.block == 0) {
      const int64_t b = column >> shift;
      const float lower = next > low ? w.scale(next * blocks + b) : 0.0f;
      values = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(table, _mm512_set1_ps(lower)),
                                            _mm512_mul_ps(table, _mm512_set1_ps(w.scale(low * blocks + b))));
    }
    const __m512i upper = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(one + s * 16)));
    const __m512i lower = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(two + s * 16)));
    const __m512i words = _mm512_or_si512(upper, _mm512_slli_epi32(lower, 16));
    const __m512i even = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4), nibble, second, kPlace);
    const __m512i odd = _mm512_ternarylogic_epi32(words, nibble, second, kPlace);
    uint16_t* target = out + s * piece.apart;
    _mm512_storeu_si512(target, _mm512_permutexvar_epi16(even, values));
    _mm512_storeu_si512(target + 32, _mm512_permutexvar_epi16(odd, values));
  }
}

// Zeros from a pair on.
inline void clear_pairs(int64_t from, const Piece& piece, uint16_t* out) {
  for (int64_t s = 0; s < piece.strips; ++s) {
    for (int64_t i = from * kPairWords; i < piece.depth * kStripLanes; i += 32) {
      _mm512_storeu_si512(out + s * piece.apart + i, _mm512_setzero_si512());
    }
  }
}

void strips_of_columns(const Packed& w, const Piece& piece, uint16_t* out) {
  const __m512 table = _mm512_loadu_ps(w.table);
  const int64_t half = w.columns / 2;
  const int64_t end = piece.first + piece.depth < w.rows ? piece.first + piece.depth : w.rows;
  int64_t p = 0;
  for (int64_t r = piece.first; r < end; r += 2, ++p) {
    const uint8_t* later = w.bytes + (r + kRowsAhead) * half + piece.lane / 2;
    _mm_prefetch(reinterpret_cast<const char*>(later), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(later + half), _MM_HINT_T0);
    pair_of_rows(w, table, r, piece, out + p * kPairWords);
  }
  clear_pairs(p, piece, out);
}

// Rows of a dense matrix as lanes.
void dense_strips_of_rows(const uint16_t* d, int64_t rows, int64_t columns, const Piece& piece, uint16_t* out) {
  clear_pairs(0, piece, out);
  const int64_t count = columns - piece.first < piece.depth ? columns - piece.first : piece.depth;
  for (int64_t l = 0; l < piece.strips * kStripLanes && piece.lane + l < rows; ++l) {
    uint16_t* target = out + l / kStripLanes * piece.apart + l % kStripLanes * 2;
    const uint16_t* from = d + (piece.lane + l) * columns + piece.first;
    int64_t k = 0;
    for (; k + 1 < count; k += 2) __builtin_memcpy(target + k / 2 * kPairWords, from + k, 4);
    if (k < count) target[k / 2 * kPairWords] = from[k];
  }
}

// Columns of a dense matrix as lanes, the even ones first.
void dense_strips_of_columns(const uint16_t* d, int64_t rows, int64_t columns, const Piece& piece, uint16_t* out) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u)), even = _mm512_set1_epi32(0xffff);
  for (int64_t p = 0; 2 * p < piece.depth; ++p) {
    const int64_t r = piece.first + 2 * p;
    for (int64_t s = 0; s < piece.strips; ++s) {
      const int64_t column = piece.lane + s * kStripLanes;
      const __mmask32 there = first_of_32(columns - column);
      const uint16_t* from = d + r * columns + column;
      const __m512i one = _mm512_maskz_loadu_epi16(r < rows ? there : 0, from);
      const __m512i two = _mm512_maskz_loadu_epi16(r + 1 < rows ? there : 0, from + columns);
      uint16_t* target = out + s * piece.apart + p * kPairWords;
      _mm512_storeu_si512(target, _mm512_or_si512(_mm512_and_si512(one, even), _mm512_slli_epi32(two, 16)));
      _mm512_storeu_si512(target + 32, _mm512_or_si512(_mm512_srli_epi32(one, 16), _mm512_and_si512(two, high)));
    }
  }
}

}  // namespace
}  // namespace lorasb
