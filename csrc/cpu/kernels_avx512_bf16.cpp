// AVX-512 with bf16 products (Cooper Lake, Sapphire Rapids, Zen 4 and newer): decoding to bf16, and the table of
// kernels. The products are in headers that are compiled inside this file's target region:
//
//   bf16_small_m_avx512.h      a quantized W against up to 8 tokens
//   bf16_dense_avx512.h        thin products with a dense matrix, and dyᵀ x
//   bf16_packing_avx512.h      micro-panels of W and of tokens
//   bf16_microkernel_avx512.h  the micro-kernel of the blocked product
#include "cpu/kernel_table.h"

#ifdef LORASB_X86
#include <immintrin.h>

#include "cpu/target.h"

#define LORASB_HAS_BF16 1
LORASB_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

// clang-format off
#include "cpu/vector_avx512.h"
#include "cpu/bf16_vectors_avx512.h"
// clang-format on

namespace lorasb {
namespace {

constexpr int kAhead = 20480;  // bytes from where W is read to where it is prefetched

// The table times its balance, rounded to bf16. It is in the register twice, as a look-up among 32 words takes five
// bits. Rounding the table in place of every weight adds little error: the balance is chosen for that.
inline __m512i rounded_table(const Packed& w) {
  const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(w.table), _mm512_set1_ps(w.balance));
  return (__m512i)_mm512_cvtne2ps_pbh(values, values);
}

// Full vectors of one block. A byte is copied into both 16-bit words of its two elements; a shift by 4 in
// every other word brings the high nibble down, and one look-up of 32 words gives 32 elements in order.
template <bool kPastCache>
inline void decode_vectors(const uint8_t* bytes, int64_t vectors, __m512i values, uint16_t* dst) {
  const __m512i byte_of_word =
      _mm512_set_epi32(0x800f800f, 0x800e800e, 0x800d800d, 0x800c800c, 0x800b800b, 0x800a800a, 0x80098009, 0x80088008,
                       0x80078007, 0x80068006, 0x80058005, 0x80048004, 0x80038003, 0x80028002, 0x80018001, 0x80008000);
  const __m512i shifts = _mm512_set1_epi32(4);
  for (int64_t v = 0; v < vectors; ++v) {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * v)));
    const __m512i nibbles = _mm512_srlv_epi16(_mm512_shuffle_epi8(all, byte_of_word), shifts);
    const __m512i elements = _mm512_permutexvar_epi16(nibbles, values);  // bit 4 chooses between equal copies
    if constexpr (kPastCache) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + 32 * v), elements);
    } else {
      _mm512_storeu_si512(dst + 32 * v, elements);
    }
  }
}

// As `decode`, but rounds the table once per block instead of each element: the 16 products of table and scale are all
// the values that a block has. With kPastCache stores are non-temporal: `dst` is aligned to 64 bytes, and the fence at
// the end orders them before what the caller does next.
template <bool kPastCache>
void decode_by_table(const Packed& w, int64_t first, int64_t count, uint16_t* dst) {
  // Rounding to fp16 comes before rounding to bf16: two roundings of a product are not one of the table.
  if (w.codes != nullptr || w.block % 32 != 0 || first % 32 != 0 || w.rounding == Rounding::fp16) {
    return decode<BF16>(w, first, count, dst);
  }
  const __m512 table = _mm512_loadu_ps(w.table);
  const int64_t end = first + count;
  int64_t b = first / w.block, stop = (b + 1) * w.block;  // a division in the loop would cost as much as four vectors
  for (int64_t i = first; i < end; i = stop, stop += w.block, ++b) {
    const int64_t length = (stop < end ? stop : end) - i;
    const float scale = w.scale(b);
    const int64_t vectors = is_ordinary(scale) ? length / 32 : 0;
    const __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(scale));
    uint16_t* block_dst = dst + i - first;
    if (kPastCache && i % 128 == 0) _mm_prefetch(reinterpret_cast<const char*>(w.bytes + i / 2 + kAhead), _MM_HINT_T0);
    decode_vectors<kPastCache>(w.bytes + i / 2, vectors, (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled), block_dst);
    if (32 * vectors < length) decode<BF16>(w, i + 32 * vectors, length - 32 * vectors, block_dst + 32 * vectors);
  }
  if (kPastCache) _mm_sfence();
}

}  // namespace
}  // namespace lorasb

// clang-format off
#include "cpu/bf16_small_m_avx512.h"
#include "cpu/bf16_packing_avx512.h"
#include "cpu/bf16_microkernel_avx512.h"
#include "cpu/bf16_dense_avx512.h"
// clang-format on

namespace lorasb {

Kernels avx512_bf16_kernels() {
  Kernels k = common_kernels("AVX-512 with bf16");
  k.decode_bf16 = decode_by_table<false>;
  k.pack_signs = pack_signs_avx512;
  k.stream_bf16 = decode_by_table<true>;
  k.arrange_bf16 = arrange_bf16;
  k.dot_bf16 = dot_bf16;
  k.dense_dot_bf16 = dense_dot_bf16;
  k.dense_add_bf16 = dense_add_bf16;
  k.min_unpacked_tokens = 16;             // measured on two cores of an Emerald Rapids, without its tiles
  k.max_unpacked_tokens = 128;            // and on two of a Zen 5
  k.max_unpacked_products = 100'000'000;  // from 576 x 192 to 2048 x 2048
  k.arrange_tokens = arrange_rows_of_tokens;
  k.multiply_unpacked = multiply_by_dots;
  k.outer_bf16 = outer_bf16;
  k.bf16_gemm = bf16_gemm_kernels();
  return k;
}

}  // namespace lorasb

LORASB_TARGET_END
#endif
