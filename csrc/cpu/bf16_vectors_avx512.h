// Vectors of bf16 and their masks on AVX-512; included inside a target region.

namespace lorasb {
namespace {

inline __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }

inline __m512 widened(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

inline __mmask32 first_of_32(int64_t count) { return count >= 32 ? 0xffffffffu : count > 0 ? (1u << count) - 1 : 0u; }

}  // namespace
}  // namespace lorasb
