// Transposes of blocks by AVX2, which AVX-512 uses as well; included by each file inside its target region. Packing
// spends its time here: 8 loads, 24 shuffles and 8 stores for 64 elements.

namespace lorasb {
namespace {

// Rows to columns of an 8 x 8 block of 32-bit entries: pairs of rows within 128-bit halves, then pairs of pairs, then
// the halves are exchanged.
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

// dst [8, 8] = src [rows, 8]ᵀ for up to 8 rows; the missing rows are zero and not read.
inline void transpose8(MatrixView src, int64_t rows, MutableMatrixView dst) {
  __m256 row[8], column[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) row[i] = i < rows ? _mm256_loadu_ps(src.data + i * src.ld) : _mm256_setzero_ps();
  transpose_block(row, column);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(dst.data + i * dst.ld, column[i]);
}

// dst [16, 8] in fp32 = src [rows, 16]ᵀ in bf16 likewise: pairs of elements are moved as one 32-bit entry; shifts
// separate and widen them at the end.
inline void transpose16_bf16(Bf16View src, int64_t rows, MutableMatrixView dst) {
  __m256 row[8], column[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    row[i] = i < rows ? _mm256_loadu_ps(reinterpret_cast<const float*>(src.data + i * src.ld)) : _mm256_setzero_ps();
  }
  transpose_block(row, column);
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256i pair = _mm256_castps_si256(column[i]);
    _mm256_storeu_ps(dst.data + 2 * i * dst.ld, _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16)));
    _mm256_storeu_ps(dst.data + (2 * i + 1) * dst.ld, _mm256_castsi256_ps(_mm256_and_si256(pair, upper)));
  }
}

}  // namespace
}  // namespace lorasb
