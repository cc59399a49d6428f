// An 8 x 8 block of fp32 by AVX2; included inside a target region, by each file that compiles for one.

namespace lorasb {
namespace {

// Rows to columns of an 8 x 8 block of 32-bit entries.
inline void transpose_block(const __m256 (&row)[8], __m256 (&column)[8]) {
  __m256 pair[8], quad[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    column[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    column[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}

// to [8, to_ld] = from [rows, ld]ᵀ, 8 elements of up to 8 rows; the missing rows are zero.
inline void transpose8_avx2(const float* from, int64_t ld, int64_t rows, float* to, int64_t to_ld) {
  __m256 row[8], column[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) row[i] = i < rows ? _mm256_loadu_ps(from + i * ld) : _mm256_setzero_ps();
  transpose_block(row, column);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + i * to_ld, column[i]);
}

// to [16, to_ld] in fp32 likewise from 16 bf16 elements of up to 8 rows: pairs of elements are moved as one entry, and
// parted and widened by shifts at the end.
inline void transpose16_bf16_avx2(const uint16_t* from, int64_t ld, int64_t rows, float* to, int64_t to_ld) {
  __m256 row[8], column[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    row[i] = i < rows ? _mm256_loadu_ps(reinterpret_cast<const float*>(from + i * ld)) : _mm256_setzero_ps();
  }
  transpose_block(row, column);
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256i pair = _mm256_castps_si256(column[i]);
    _mm256_storeu_ps(to + 2 * i * to_ld, _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)));
    _mm256_storeu_ps(to + (2 * i + 1) * to_ld, _mm256_castsi256_ps(_mm256_and_si256(pair, upper)));
  }
}

}  // namespace
}  // namespace lorasb
