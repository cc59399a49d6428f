// AVX-512 with bf16 products (Cooper Lake, Sapphire Rapids, Zen 4 and newer).
#include "cpu/kernel_table.h"

#ifdef LORASB_X86
#include <immintrin.h>

#include "cpu/target.h"

#define LORASB_HAS_BF16 1
LORASB_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")

#include "cpu/vector_avx512.h"

namespace lorasb {
namespace {

constexpr int kStep = 128;           // elements of a row that one look-up of 64 bytes covers
constexpr int kAhead = 20480;        // bytes between what is read and what is fetched from memory
constexpr int kRowGroup = 16;        // rows of W whose sums are open at once
constexpr int kStreamBytes = 16384;  // of all rows of x together that stay in a first-level cache

inline __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }

inline __m512 widened(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

// Word i of 64 bytes holds elements 4i + 1, 4i, 4i + 3 and 4i + 2 in its nibbles from bit 0 up. Stream k has, for each
// word, the element of nibble k, so that one shift and one look-up of 32 words meet 32 entries of a stream.
void arrange_bf16(const uint16_t* x, int64_t columns, uint16_t* streams) {
  constexpr int kPlace[4] = {1, 0, 3, 2};
  for (int64_t step = 0; step * kStep < columns; ++step) {
    for (int k = 0; k < 4; ++k) {
      for (int i = 0; i < 32; ++i) {
        const int64_t column = step * kStep + 4 * i + kPlace[k];
        streams[step * kStep + 32 * k + i] = column < columns ? x[column] : 0;
      }
    }
  }
}

// The table times its balance rounded to bf16, twice over, as a look-up takes five bits. Rounding an entry costs little
// more than rounding every weight does.
inline __m512i rounded_table(const Packed& w) {
  const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(w.table), _mm512_set1_ps(w.balance));
  return (__m512i)_mm512_cvtne2ps_pbh(values, values);
}

// Whole vectors of elements of one block: two bytes' places in a word each, the high nibble's shifted down.
template <bool kPastCache>
inline void decode_vectors(const uint8_t* bytes, int64_t vectors, __m512i values, uint16_t* out) {
  const __m512i places =
      _mm512_set_epi32(0x800f800f, 0x800e800e, 0x800d800d, 0x800c800c, 0x800b800b, 0x800a800a, 0x80098009, 0x80088008,
                       0x80078007, 0x80068006, 0x80058005, 0x80048004, 0x80038003, 0x80028002, 0x80018001, 0x80008000);
  const __m512i shifts = _mm512_set1_epi32(4);
  for (int64_t v = 0; v < vectors; ++v) {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * v)));
    const __m512i nibbles = _mm512_srlv_epi16(_mm512_shuffle_epi8(all, places), shifts);
    const __m512i found = _mm512_permutexvar_epi16(nibbles, values);  // bit 4 tells the table's copies apart
    if constexpr (kPastCache) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + 32 * v), found);
    } else {
      _mm512_storeu_si512(out + 32 * v, found);
    }
  }
}

// As `decode`, with one rounding of the table for a block in place of one of each element.
template <bool kPastCache>
void decode_by_table(const Packed& w, int64_t first, int64_t count, uint16_t* out) {
  if (w.codes != nullptr || w.block % 32 != 0 || first % 32 != 0 || w.rounding == Rounding::fp16) {
    return decode<BF16>(w, first, count, out);
  }
  const __m512 table = _mm512_loadu_ps(w.table);
  const int64_t end = first + count;
  int64_t b = first / w.block, stop = (b + 1) * w.block;  // a division costs what four vectors do
  for (int64_t i = first; i < end; i = stop, stop += w.block, ++b) {
    const int64_t length = (stop < end ? stop : end) - i;
    const float scale = w.scale(b);
    const int64_t vectors = is_ordinary(scale) ? length / 32 : 0;
    const __m512 scaled = _mm512_mul_ps(table, _mm512_set1_ps(scale));
    uint16_t* to = out + i - first;
    if (kPastCache && i % 128 == 0) _mm_prefetch(reinterpret_cast<const char*>(w.bytes + i / 2 + kAhead), _MM_HINT_T0);
    decode_vectors<kPastCache>(w.bytes + i / 2, vectors, (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled), to);
    if (32 * vectors < length) decode<BF16>(w, i + 32 * vectors, length - 32 * vectors, to + 32 * vectors);
  }
  if (kPastCache) _mm_sfence();
}

// One step of 128 elements of kTaps rows of W against kRows rows of x, without the scales.
template <int kShift, int kRows, int kTaps>
inline void look_up_and_multiply(const __m512i* words, __m512i table, const uint16_t* streams, int64_t length,
                                 __m512 (*part)[kTaps]) {
  __m512bh values[kTaps];
  for (int t = 0; t < kTaps; ++t) {
    values[t] = as_bf16(_mm512_permutexvar_epi16(_mm512_srli_epi16(words[t], kShift), table));
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const __m512bh xs = as_bf16(_mm512_loadu_si512(streams + i * length + 8 * kShift));
    for (int t = 0; t < kTaps; ++t) part[i][t] = _mm512_dpbf16_ps(part[i][t], values[t], xs);
  }
}

// How the scales of a step reach their lanes: eight elements of one block a lane.
struct Lanes {
  __m512i block;  // of each lane
  int per_step;   // blocks of a step
  int shift;

  explicit Lanes(const Packed& w) : per_step(w.block >= kStep ? 1 : static_cast<int>(kStep / w.block)) {
    shift = w.block_shift();
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    block = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(w.block >= kStep ? 4 : shift - 3));
  }

  __m512 scales(const float* from, int count) const {
    return _mm512_permutexvar_ps(block, _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from));
  }
};

template <int kRows, int kTaps>
inline void dot_step(const uint8_t* const* bytes, __mmask64 there, __m512i table, const uint16_t* streams,
                     int64_t length, const __m512* scales, __m512 (*total)[kTaps]) {
  __m512i words[kTaps];
  for (int t = 0; t < kTaps; ++t) words[t] = _mm512_maskz_loadu_epi8(there, bytes[t]);
  __m512 part[kRows][kTaps];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kTaps; ++t) part[i][t] = _mm512_setzero_ps();
  }
  look_up_and_multiply<0, kRows, kTaps>(words, table, streams, length, part);
  look_up_and_multiply<4, kRows, kTaps>(words, table, streams, length, part);
  look_up_and_multiply<8, kRows, kTaps>(words, table, streams, length, part);
  look_up_and_multiply<12, kRows, kTaps>(words, table, streams, length, part);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kTaps; ++t) total[i][t] = _mm512_fmadd_ps(part[i][t], scales[t], total[i][t]);
  }
}

// Columns [chunk, chunk + count) of kTaps rows of W.
template <int kRows, int kTaps>
inline void dot_bf16_taps(const Packed& w, __m512i table, const Lanes& lanes, const uint16_t* streams, int64_t r,
                          int64_t chunk, int64_t count, __m512 (*sums)[kTaps]) {
  const int64_t length = stream_stride(w.columns), half = w.columns / 2, blocks = w.columns >> lanes.shift;
  float room[kTaps][kStreamBytes / 2 / 32];
  const float* from[kTaps];
  const uint8_t* bytes[kTaps];
  for (int t = 0; t < kTaps; ++t) {
    const int64_t first = (r + t) * blocks + (chunk >> lanes.shift);
    from[t] = w.scales_from(first, (count + w.block - 1) >> lanes.shift, room[t]);
    bytes[t] = w.bytes + (r + t) * half + chunk / 2;
  }
  __m512 total[kRows][kTaps], scales[kTaps];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kTaps; ++t) total[i][t] = sums[i][t];
  }
  const uint16_t* xs = streams + chunk;
  int64_t place = 0;
  for (; place + kStep <= count; place += kStep) {
    for (int t = 0; t < kTaps; ++t) {
      scales[t] = lanes.scales(from[t] + (place >> lanes.shift), lanes.per_step);
      _mm_prefetch(reinterpret_cast<const char*>(bytes[t] + kAhead), _MM_HINT_T1);
    }
    dot_step<kRows, kTaps>(bytes, ~0ull, table, xs + place, length, scales, total);
    for (int t = 0; t < kTaps; ++t) bytes[t] += kStep / 2;
  }
  if (place < count) {
    const int left = static_cast<int>(count - place);
    for (int t = 0; t < kTaps; ++t) scales[t] = lanes.scales(from[t] + (place >> lanes.shift), left >> lanes.shift);
    dot_step<kRows, kTaps>(bytes, (1ull << (left / 2)) - 1, table, xs + place, length, scales, total);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kTaps; ++t) sums[i][t] = total[i][t];
  }
}

// kTaps rows of W at a time, all of a group's before the next columns: x's stay in the first-level cache.
template <int kRows, int kTaps>
void dot_bf16_group(const Packed& w, const uint16_t* streams, int64_t low, int64_t groups, float* y, int64_t stride) {
  // A power of two, so that it and a block are whole numbers of one another.
  constexpr int64_t kChunk = kStreamBytes / 2 / (kRows > 4 ? 8 : kRows > 2 ? 4 : kRows);
  const __m512i table = rounded_table(w);
  const Lanes lanes(w);
  __m512 sums[kRowGroup / kTaps][kRows][kTaps];
  for (int64_t g = 0; g < groups; ++g) {
    for (int i = 0; i < kRows; ++i) {
      for (int t = 0; t < kTaps; ++t) sums[g][i][t] = _mm512_setzero_ps();
    }
  }
  for (int64_t chunk = 0; chunk < w.columns; chunk += kChunk) {
    const int64_t count = w.columns - chunk < kChunk ? w.columns - chunk : kChunk;
    for (int64_t g = 0; g < groups; ++g) {
      dot_bf16_taps<kRows, kTaps>(w, table, lanes, streams, low + g * kTaps, chunk, count, sums[g]);
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int i = 0; i < kRows; ++i) {
      for (int t = 0; t < kTaps; ++t)
        y[i * stride + low + g * kTaps + t] = _mm512_reduce_add_ps(sums[g][i][t]) / w.balance;
    }
  }
}

template <int kRows>
void dot_bf16_rows(const Packed& w, const uint16_t* streams, int64_t low, int64_t count, float* y, int64_t stride) {
  dot_bf16_group<kRows, 2>(w, streams, low, count / 2, y, stride);
  if (count % 2 != 0) dot_bf16_group<kRows, 1>(w, streams, low + count - 1, 1, y, stride);
}

void dot_bf16(const Packed& w, const uint16_t* streams, int64_t rows, int64_t low, int64_t high, float* y,
              int64_t stride) {
  using Dot = void (*)(const Packed&, const uint16_t*, int64_t, int64_t, float*, int64_t);
  static constexpr Dot kBy[6] = {dot_bf16_rows<1>, dot_bf16_rows<2>, dot_bf16_rows<3>,
                                 dot_bf16_rows<4>, dot_bf16_rows<5>, dot_bf16_rows<6>};
  const int64_t part = rows <= 6 ? rows : 4;  // the sums of more do not fit into registers
  for (int64_t r = low; r < high; r += kRowGroup) {
    const int64_t count = high - r < kRowGroup ? high - r : kRowGroup;
    for (int64_t i = 0; i < rows; i += part) {
      const int64_t taken = rows - i < part ? rows - i : part;
      kBy[taken - 1](w, streams + i * stream_stride(w.columns), r, count, y + i * stride, stride);
    }
  }
}

// Sums of the lanes of four vectors.
inline __m128 sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                   _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline __m512i load_bf16(const uint16_t* from, int64_t left) {
  if (left >= 32) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16((1u << left) - 1, from);
}

template <int kRows>
void dense_dot_rows(const uint16_t* x, int64_t x_stride, const uint16_t* d, int64_t columns, int64_t low, int64_t high,
                    float* y, int64_t stride, bool add) {
  for (int64_t r = low; r < high; r += kDenseTaps) {
    const int count = static_cast<int>(high - r < kDenseTaps ? high - r : kDenseTaps);
    __m512 sums[kRows][kDenseTaps];
    for (int i = 0; i < kRows; ++i) {
      for (int t = 0; t < kDenseTaps; ++t) sums[i][t] = _mm512_setzero_ps();
    }
    const uint16_t* rows[kDenseTaps];
    for (int t = 0; t < kDenseTaps; ++t) rows[t] = d + (r + (t < count ? t : 0)) * columns;
    for (int64_t k = 0; k < columns; k += 32) {
      __m512bh ds[kDenseTaps];
      for (int t = 0; t < kDenseTaps; ++t) ds[t] = as_bf16(load_bf16(rows[t] + k, columns - k));
      for (int i = 0; i < kRows; ++i) {
        const __m512bh xs = as_bf16(load_bf16(x + i * x_stride + k, columns - k));
        for (int t = 0; t < kDenseTaps; ++t) sums[i][t] = _mm512_dpbf16_ps(sums[i][t], xs, ds[t]);
      }
    }
    const __mmask8 there = static_cast<__mmask8>((1 << count) - 1);
    for (int i = 0; i < kRows; ++i) {
      float* target = y + i * stride + r;
      __m128 found = sum_four(sums[i][0], sums[i][1], sums[i][2], sums[i][3]);
      if (add) found = _mm_add_ps(found, _mm_maskz_loadu_ps(there, target));
      _mm_mask_storeu_ps(target, there, found);
    }
  }
}

void dense_dot_bf16(const uint16_t* x, int64_t x_stride, int64_t rows, const uint16_t* d, int64_t columns, int64_t low,
                    int64_t high, float* y, int64_t stride, bool add) {
  switch (rows) {
    case 1:
      return dense_dot_rows<1>(x, x_stride, d, columns, low, high, y, stride, add);
    case 2:
      return dense_dot_rows<2>(x, x_stride, d, columns, low, high, y, stride, add);
    case 3:
      return dense_dot_rows<3>(x, x_stride, d, columns, low, high, y, stride, add);
    default:
      return dense_dot_rows<4>(x, x_stride, d, columns, low, high, y, stride, add);
  }
}

template <int kTaps>
inline void dense_add_taps(const float* c, int64_t stride, int64_t rows, const uint16_t* d, int64_t columns,
                           int64_t width, float* sums) {
  for (int64_t j = 0; j < width; j += 16) {
    const __mmask16 there = static_cast<__mmask16>(width - j >= 16 ? 0xffff : (1u << (width - j)) - 1);
    __m512 values[kTaps];
    for (int t = 0; t < kTaps; ++t) {
      values[t] = widened(_mm256_maskz_loadu_epi16(there, d + t * columns + j));
    }
    for (int64_t i = 0; i < rows; ++i) {
      __m512 sum = _mm512_maskz_loadu_ps(there, sums + i * width + j);
      for (int t = 0; t < kTaps; ++t) sum = _mm512_fmadd_ps(values[t], _mm512_set1_ps(c[i * stride + t]), sum);
      _mm512_mask_storeu_ps(sums + i * width + j, there, sum);
    }
  }
}

void dense_add_bf16(const float* c, int64_t stride, int64_t rows, const uint16_t* d, int64_t columns, int64_t low,
                    int64_t high, int64_t first, int64_t width, float* sums) {
  int64_t r = low;
  for (; r + 8 <= high; r += 8) dense_add_taps<8>(c + r, stride, rows, d + r * columns + first, columns, width, sums);
  for (; r < high; ++r) dense_add_taps<1>(c + r, stride, rows, d + r * columns + first, columns, width, sums);
}

// kRows rows of a 64-column tile of G.
template <int kRows>
inline void outer_tile(const uint16_t* left, const uint16_t* right, int64_t m, int64_t n, int64_t pairs, int columns,
                       float* total, bool fresh) {
  __m512 sums[kRows][4];
  __mmask16 there[4];
  for (int c = 0; c < 4; ++c) {
    const int count = columns - 16 * c;
    there[c] = static_cast<__mmask16>(count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0);
    for (int i = 0; i < kRows; ++i) {
      sums[i][c] = fresh ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there[c], total + i * n + 16 * c);
    }
  }
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh xs[4];
    for (int c = 0; c < 4; ++c) xs[c] = as_bf16(_mm512_loadu_si512(right + (p * kOuterColumns + 16 * c) * 2));
    for (int i = 0; i < kRows; ++i) {
      int pair;
      __builtin_memcpy(&pair, left + (p * m + i) * 2, 4);
      const __m512bh dys = as_bf16(_mm512_set1_epi32(pair));
      for (int c = 0; c < 4; ++c) sums[i][c] = _mm512_dpbf16_ps(sums[i][c], dys, xs[c]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int c = 0; c < 4; ++c) _mm512_mask_storeu_ps(total + i * n + 16 * c, there[c], sums[i][c]);
  }
}

void outer_bf16(const uint16_t* left, const uint16_t* right, int64_t m, int64_t n, int64_t pairs, int64_t low,
                int64_t high, float* total, bool fresh) {
  for (int64_t j = 0; j < n; j += kOuterColumns) {
    const uint16_t* panel = right + j * pairs * 2;
    const int columns = static_cast<int>(n - j < kOuterColumns ? n - j : kOuterColumns);
    int64_t i = low;
    for (; i + 6 <= high; i += 6) {
      outer_tile<6>(left + 2 * i, panel, m, n, pairs, columns, total + i * n + j, fresh);
    }
    for (; i < high; ++i) outer_tile<1>(left + 2 * i, panel, m, n, pairs, columns, total + i * n + j, fresh);
  }
}

}  // namespace
}  // namespace lorasb

#include "cpu/bf16_microkernel_avx512.h"

namespace lorasb {

const Kernels& avx512_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels k = common_kernels("AVX-512 with bf16");
    k.decode_bf16 = decode_by_table<false>;
    k.pack_signs = pack_signs_avx512;
    k.stream_bf16 = decode_by_table<true>;
    k.arrange_bf16 = arrange_bf16;
    k.dot_bf16 = dot_bf16;
    k.dense_dot_bf16 = dense_dot_bf16;
    k.dense_add_bf16 = dense_add_bf16;
    k.outer_bf16 = outer_bf16;
    k.strips = &strip_kernels();
    return k;
  }();
  return kernels;
}

}  // namespace lorasb

LORASB_TARGET_END
#endif
