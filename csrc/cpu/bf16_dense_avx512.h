// Products of dense matrices in bf16 with sums in fp32; included inside a target region: the adapter's thin products
// for few tokens, and weight gradients dyᵀ x.

namespace lorasb {
namespace {

// Sums over the lanes of four vectors at once, in fewer steps than four separate sums.
inline __m128 sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Loads 32 elements, or the last `left` ones of a row and zeros.
inline __m512i load_bf16(const uint16_t* src, int64_t left) {
  if (left >= 32) return _mm512_loadu_si512(src);
  return _mm512_maskz_loadu_epi16((1u << left) - 1, src);
}

// kDenseTaps rows of D at a time. At the end the first row replaces those that do not exist; their sums are masked.
template <int kRows>
void dense_dot_rows(Bf16View x, Bf16View d, int64_t columns, Range d_rows, bool accumulate, MutableMatrixView y) {
  for (int64_t r = d_rows.begin; r < d_rows.end; r += kDenseTaps) {
    const int count = static_cast<int>(d_rows.end - r < kDenseTaps ? d_rows.end - r : kDenseTaps);
    __m512 sums[kRows][kDenseTaps];
    for (int i = 0; i < kRows; ++i) {
      for (int t = 0; t < kDenseTaps; ++t) sums[i][t] = _mm512_setzero_ps();
    }
    const uint16_t* rows[kDenseTaps];
    for (int t = 0; t < kDenseTaps; ++t) rows[t] = d.data + (r + (t < count ? t : 0)) * d.ld;
    for (int64_t k = 0; k < columns; k += 32) {
      __m512bh ds[kDenseTaps];
      for (int t = 0; t < kDenseTaps; ++t) ds[t] = as_bf16(load_bf16(rows[t] + k, columns - k));
      for (int i = 0; i < kRows; ++i) {
        const __m512bh xs = as_bf16(load_bf16(x.data + i * x.ld + k, columns - k));
        for (int t = 0; t < kDenseTaps; ++t) sums[i][t] = _mm512_dpbf16_ps(sums[i][t], xs, ds[t]);
      }
    }
    const __mmask8 valid = static_cast<__mmask8>((1 << count) - 1);
    for (int i = 0; i < kRows; ++i) {
      float* dst = y.data + i * y.ld + r;
      __m128 values = sum_four(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
      if (accumulate) values = _mm_add_ps(values, _mm_maskz_loadu_ps(valid, dst));
      _mm_mask_storeu_ps(dst, valid, values);
    }
  }
}

void dense_dot_bf16(Bf16View x, int64_t rows, Bf16View d, int64_t columns, Range d_rows, bool accumulate,
                    MutableMatrixView y) {
  by_rows<kDirectRows>(
      rows, [&](auto count) { dense_dot_rows<decltype(count)::value>(x, d, columns, d_rows, accumulate, y); });
}

// `multiply_by_dots` reads rows as they are, so they are only copied.
void arrange_rows_of_tokens(Bf16View x, int64_t count, int64_t columns, uint16_t* dst) {
  for (int64_t i = 0; i < count; ++i) __builtin_memcpy(dst + i * columns, x.data + i * x.ld, columns * 2);
}

void multiply_by_dots(const UnpackedTerm* terms, int count, int64_t tokens, Range rows, const uint16_t* bias,
                      MutableBf16View y) {
  float sums[kDirectRows * kBf16Nr];
  for (int64_t r = rows.begin; r < rows.end; r += kBf16Nr) {
    const int64_t taken = rows.end - r < kBf16Nr ? rows.end - r : kBf16Nr;
    for (int64_t low = 0; low < tokens; low += kDirectRows) {
      const int64_t few = tokens - low < kDirectRows ? tokens - low : kDirectRows;
      for (const UnpackedTerm* term = terms; term < terms + count; ++term) {
        const uint16_t* x = term->tokens + low / kUnpackedTokens * unpacked_panel(term->columns);
        dense_dot_bf16({x + low % kUnpackedTokens * term->columns, term->columns}, few,
                       {term->d.data + r * term->d.ld, term->d.ld}, term->columns, {0, taken}, term > terms,
                       {sums, kBf16Nr});
      }
      store_bf16({sums, kBf16Nr}, few, taken, {false, bias == nullptr ? nullptr : bias + r, false},
                 {y.data + low * y.ld + r, y.ld});
    }
  }
}

// kTaps rows of D: each tap is one FMA onto the same sum, in the order of rows. `d` and `c` point at the first of them.
template <int kTaps>
inline void dense_add_taps(MatrixView c, int64_t rows, Bf16View d, int64_t width, float* sums) {
  for (int64_t j = 0; j < width; j += 16) {
    const __mmask16 valid = static_cast<__mmask16>(width - j >= 16 ? 0xffff : (1u << (width - j)) - 1);
    __m512 values[kTaps];
    for (int t = 0; t < kTaps; ++t) {
      values[t] = widened(_mm256_maskz_loadu_epi16(valid, d.data + t * d.ld + j));
    }
    for (int64_t i = 0; i < rows; ++i) {
      __m512 sum = _mm512_maskz_loadu_ps(valid, sums + i * width + j);
      for (int t = 0; t < kTaps; ++t) sum = _mm512_fmadd_ps(values[t], _mm512_set1_ps(c.data[i * c.ld + t]), sum);
      _mm512_mask_storeu_ps(sums + i * width + j, valid, sum);
    }
  }
}

void dense_add_bf16(MatrixView c, int64_t rows, Bf16View d, Range d_rows, Range d_columns, float* sums) {
  const auto from_row = [&](int64_t r) { return Bf16View{d.data + r * d.ld + d_columns.begin, d.ld}; };
  int64_t r = d_rows.begin;
  for (; r + 8 <= d_rows.end; r += 8) {
    dense_add_taps<8>({c.data + r, c.ld}, rows, from_row(r), d_columns.size(), sums);
  }
  for (; r < d_rows.end; ++r) dense_add_taps<1>({c.data + r, c.ld}, rows, from_row(r), d_columns.size(), sums);
}

// A tile of G of kRows rows and up to kOuterColumns columns in registers: 24 accumulators for 6 rows. A pair of tokens
// is one 32-bit broadcast of dy and four vectors of x.
template <int kRows>
inline void outer_tile(const OuterOperands& operands, int64_t row, int64_t column, bool overwrite, float* total) {
  const int64_t m = operands.m, n = operands.n, columns = n - column;
  const uint16_t* left = operands.left + 2 * row;
  const uint16_t* panel = operands.right + column * operands.pairs * 2;
  float* dst = total + row * n + column;
  __m512 sums[kRows][4];
  __mmask16 valid[4];
  for (int c = 0; c < 4; ++c) {
    const int64_t count = columns - 16 * c;
    valid[c] = static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0);
    for (int i = 0; i < kRows; ++i) {
      sums[i][c] = overwrite ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(valid[c], dst + i * n + 16 * c);
    }
  }
  for (int64_t p = 0; p < operands.pairs; ++p) {
    __m512bh xs[4];
    for (int c = 0; c < 4; ++c) xs[c] = as_bf16(_mm512_loadu_si512(panel + (p * kOuterColumns + 16 * c) * 2));
    for (int i = 0; i < kRows; ++i) {
      int pair;
      __builtin_memcpy(&pair, left + (p * m + i) * 2, 4);
      const __m512bh dys = as_bf16(_mm512_set1_epi32(pair));
      for (int c = 0; c < 4; ++c) sums[i][c] = _mm512_dpbf16_ps(sums[i][c], dys, xs[c]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < 4; ++c) _mm512_mask_storeu_ps(dst + i * n + 16 * c, valid[c], sums[i][c]);
  }
}

// Every sum is one chain over the pairs of tokens, so it is the same in tiles of six rows and of one row.
void outer_bf16(const OuterOperands& operands, Range rows, bool overwrite, float* total) {
  for (int64_t j = 0; j < operands.n; j += kOuterColumns) {
    int64_t i = rows.begin;
    for (; i + kOuterRows <= rows.end; i += kOuterRows) outer_tile<kOuterRows>(operands, i, j, overwrite, total);
    for (; i < rows.end; ++i) outer_tile<1>(operands, i, j, overwrite, total);
  }
}

}  // namespace
}  // namespace lorasb
