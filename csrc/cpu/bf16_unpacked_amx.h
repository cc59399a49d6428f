// Products of tokens and dense matrices that are not packed, by tiles; included inside AMX's target region.
//
// A row of W is a row of the tile's first operand: yᵀ = W xᵀ reads W once from memory, in place, and only x, which is
// small, is rearranged into pairs. For 32 rows of W at a time and each panel of 32 tokens, sums over all terms are in
// four registers; they are transposed, rounded once and stored.
//
//                     tokens 0-15 (tmm6)   tokens 16-31 (tmm7)
//   W's rows 0-15   (tmm4)   tmm0          tmm1
//   W's rows 16-31  (tmm5)   tmm2          tmm3

namespace lorasb {
namespace {

constexpr int kPanelStep = kUnpackedTokens * kBf16KStep;  // bf16 of one step of a panel of tokens

// 16 x 16 words of 32 bits.
inline void transpose_16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Lane l of r[i + j] has column 4 l + j of rows i to i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i upper_even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    const __m512i lower_even = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i upper_odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i lower_odd = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(upper_even, lower_even, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(upper_odd, lower_odd, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(upper_even, lower_even, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(upper_odd, lower_odd, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// [columns / 32][16 pairs][32 tokens][2], zero beyond x; for up to 16 tokens only the first half is written.
void arrange_pairs_of_tokens(Bf16View x, int64_t count, int64_t columns, uint16_t* dst) {
  for (int64_t column = 0; column < columns; column += kBf16KStep, dst += kPanelStep) {
    const __mmask32 valid = first_of_32(columns - column);
    for (int64_t half = 0; half < count; half += 16) {
      __m512i rows[16];
      for (int64_t i = 0; i < 16; ++i) {
        const bool there = half + i < count;
        rows[i] = _mm512_maskz_loadu_epi16(there ? valid : 0, x.data + (there ? half + i : 0) * x.ld + column);
      }
      transpose_16(rows);
      for (int pair = 0; pair < 16; ++pair) _mm512_store_si512(dst + pair * 2 * kUnpackedTokens + 2 * half, rows[pair]);
    }
  }
}

// Multiplies steps of 32 columns of 32 rows of D by a panel. The rows after them are prefetched: a row's piece is too
// short for the hardware prefetcher.
template <bool kTwo>
inline void add_row_steps(Bf16View d, int64_t steps, const uint16_t* tokens, bool prefetch) {
  const int64_t row_bytes = d.ld * 2;
  const uint16_t* rows = d.data;
  for (int64_t s = 0; s < steps; ++s, rows += kBf16KStep, tokens += kPanelStep) {
    _tile_loadd(6, tokens, kUnpackedTokens * 4);
    _tile_loadd(4, rows, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwo) _tile_loadd(7, tokens + 32, kUnpackedTokens * 4);
    _tile_loadd(5, rows + 16 * d.ld, row_bytes);
    if constexpr (kTwo) _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kTwo) _tile_dpbf16ps(3, 5, 7);
    if (prefetch) {
      for (int i = 0; i < kUnpackedRows; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(rows + (kUnpackedRows + i) * d.ld), _MM_HINT_T1);
      }
    }
  }
}

// Copies one step of rows of D, zero beyond its rows and columns: nothing past its end is read.
inline void copy_step(Bf16View d, int64_t rows, int64_t columns, uint16_t* dst) {
  const __mmask32 valid = first_of_32(columns);
  for (int64_t i = 0; i < kUnpackedRows; ++i) {
    const __m512i values = _mm512_maskz_loadu_epi16(i < rows ? valid : 0, d.data + (i < rows ? i : 0) * d.ld);
    _mm512_store_si512(dst + i * kBf16KStep, values);
  }
}

// Sums rows `rows` of yᵀ over all terms, for one panel of tokens.
template <bool kTwo>
inline void sum_rows(const UnpackedTerm* terms, int count, int64_t panel, Range rows, float* sums) {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (kTwo) {
    _tile_zero(1);
    _tile_zero(3);
  }
  for (const UnpackedTerm* term = terms; term < terms + count; ++term) {
    const int64_t steps = (term->columns + kBf16KStep - 1) / kBf16KStep;
    const uint16_t* tokens = term->tokens + panel * unpacked_panel(term->columns);
    const Bf16View d{term->d.data + rows.begin * term->d.ld, term->d.ld};
    const int64_t whole = rows.size() == kUnpackedRows ? term->columns / kBf16KStep : 0;
    add_row_steps<kTwo>(d, whole, tokens, panel == 0);
    for (int64_t s = whole; s < steps; ++s) {
      alignas(64) uint16_t copy[kUnpackedRows * kBf16KStep];
      copy_step({d.data + s * kBf16KStep, d.ld}, rows.size(), term->columns - s * kBf16KStep, copy);
      add_row_steps<kTwo>({copy, kBf16KStep}, 1, tokens + s * kPanelStep, false);
    }
  }
  _tile_stored(0, sums, kUnpackedTokens * 4);
  _tile_stored(2, sums + 16 * kUnpackedTokens, kUnpackedTokens * 4);
  if constexpr (kTwo) {
    _tile_stored(1, sums + 16, kUnpackedTokens * 4);
    _tile_stored(3, sums + 16 * kUnpackedTokens + 16, kUnpackedTokens * 4);
  }
}

// y [tokens, rows] in bf16 = sums [32, 32] transposed + bias.
inline void store_rows(const float* sums, int64_t tokens, __mmask32 valid, const uint16_t* bias, MutableBf16View y) {
  const __m512i added = bias == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(valid, bias);
  const __m512 low_bias = widened(_mm512_castsi512_si256(added));
  const __m512 high_bias = widened(_mm512_extracti64x4_epi64(added, 1));
  for (int64_t half = 0; half < tokens; half += 16) {
    __m512i low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      low[i] = _mm512_load_si512(sums + i * kUnpackedTokens + half);
      high[i] = _mm512_load_si512(sums + (16 + i) * kUnpackedTokens + half);
    }
    transpose_16(low);
    transpose_16(high);
    for (int64_t t = 0; t < 16 && half + t < tokens; ++t) {
      const __m512 first = _mm512_add_ps(_mm512_castsi512_ps(low[t]), low_bias);
      const __m512 second = _mm512_add_ps(_mm512_castsi512_ps(high[t]), high_bias);
      _mm512_mask_storeu_epi16(y.data + (half + t) * y.ld, valid, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    }
  }
}

void multiply_by_tiles(const UnpackedTerm* terms, int count, int64_t tokens, Range rows, const uint16_t* bias,
                       MutableBf16View y) {
  begin_tiles();
  alignas(64) float sums[kUnpackedRows * kUnpackedTokens];
  for (int64_t r = rows.begin; r < rows.end; r += kUnpackedRows) {
    const Range block{r, rows.end - r < kUnpackedRows ? rows.end : r + kUnpackedRows};
    for (int64_t low = 0; low < tokens; low += kUnpackedTokens) {
      const int64_t taken = tokens - low < kUnpackedTokens ? tokens - low : kUnpackedTokens;
      const auto sum = taken > 16 ? sum_rows<true> : sum_rows<false>;
      sum(terms, count, low / kUnpackedTokens, block, sums);
      store_rows(sums, taken, first_of_32(block.size()), bias == nullptr ? nullptr : bias + r,
                 {y.data + low * y.ld + r, y.ld});
    }
  }
  end_tiles();
}

}  // namespace
}  // namespace lorasb
