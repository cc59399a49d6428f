// Products of a quantized W and up to kDotRows tokens in bf16; included inside a target region.
//
// W is read once from memory and never decoded into it: a step of 128 elements, 64 bytes of a row, is loaded as 32
// words, looked up in a table of bf16 and multiplied at once. The scale of a block is applied to sums in fp32, so that
// the table is the same for all of W.

namespace lorasb {
namespace {

constexpr int kStep = 128;           // elements of a row of W in 64 bytes
constexpr int kRowGroup = 16;        // rows of W whose sums are open at once
constexpr int kStreamBytes = 16384;  // of all rows of x together that stay in a first-level cache

// A step of x as four streams of 32, the last step padded with zeros:
//
//   word i of 64 bytes of W   nibbles from bit 0 up: elements 4i + 1, 4i, 4i + 3, 4i + 2
//   stream k of x             for each word i, the element of its nibble k
//
// One shift and one look-up of 32 words then give the 32 elements of W that one vector of x is multiplied by.
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

// Multiplies nibble kShift / 4 of each 16-bit word of kTaps rows of W by the same stream of kRows rows of x: 32
// products for each pair of rows, without the scales.
template <int kShift, int kRows, int kTaps>
inline void look_up_and_multiply(const __m512i* words, __m512i table, const uint16_t* streams, int64_t ld,
                                 __m512 (*part)[kTaps]) {
  __m512bh values[kTaps];
  for (int t = 0; t < kTaps; ++t) {
    values[t] = as_bf16(_mm512_permutexvar_epi16(_mm512_srli_epi16(words[t], kShift), table));
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const __m512bh xs = as_bf16(_mm512_loadu_si512(streams + i * ld + 8 * kShift));
    for (int t = 0; t < kTaps; ++t) part[i][t] = _mm512_dpbf16_ps(part[i][t], values[t], xs);
  }
}

// How the scales of a step reach their lanes. A lane sums the elements of four bytes, eight neighbors in a row of W, so
// that a lane has one scale: blocks have 32 elements at least.
struct ScaleLanes {
  __m512i block;  // the block of each lane, counted from the first one of the step
  int per_step;   // blocks of a step
  int shift;

  explicit ScaleLanes(const Packed& w) : per_step(w.block >= kStep ? 1 : static_cast<int>(kStep / w.block)) {
    shift = w.block_shift();
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    block = _mm512_srl_epi32(lane, _mm_cvtsi32_si128(w.block >= kStep ? 4 : shift - 3));
  }

  __m512 load(const float* scales, int count) const {
    return _mm512_permutexvar_ps(block, _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), scales));
  }
};

// One step of 128 elements: `valid` masks the bytes of W, so that nothing past its end is read.
template <int kRows, int kTaps>
inline void dot_step(const uint8_t* const* bytes, __mmask64 valid, __m512i table, const uint16_t* streams, int64_t ld,
                     const __m512* scales, __m512 (*total)[kTaps]) {
  __m512i words[kTaps];
  for (int t = 0; t < kTaps; ++t) words[t] = _mm512_maskz_loadu_epi8(valid, bytes[t]);
  __m512 part[kRows][kTaps];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kTaps; ++t) part[i][t] = _mm512_setzero_ps();
  }
  look_up_and_multiply<0, kRows, kTaps>(words, table, streams, ld, part);
  look_up_and_multiply<4, kRows, kTaps>(words, table, streams, ld, part);
  look_up_and_multiply<8, kRows, kTaps>(words, table, streams, ld, part);
  look_up_and_multiply<12, kRows, kTaps>(words, table, streams, ld, part);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kTaps; ++t) total[i][t] = _mm512_fmadd_ps(part[i][t], scales[t], total[i][t]);
  }
}

// Columns [chunk, chunk + count) of kTaps rows of W.
template <int kRows, int kTaps>
inline void dot_bf16_taps(const Packed& w, __m512i table, const ScaleLanes& lanes, const uint16_t* streams, int64_t r,
                          int64_t chunk, int64_t count, __m512 (*sums)[kTaps]) {
  const int64_t ld = stream_stride(w.columns), half = w.columns / 2, blocks = w.columns >> lanes.shift;
  float scratch[kTaps][kStreamBytes / 2 / 32];  // scales of a chunk's blocks, of 32 elements at least
  const float* block_scales[kTaps];
  const uint8_t* bytes[kTaps];
  for (int t = 0; t < kTaps; ++t) {
    const int64_t first = (r + t) * blocks + (chunk >> lanes.shift);
    block_scales[t] = w.scales_from(first, (count + w.block - 1) >> lanes.shift, scratch[t]);
    bytes[t] = w.bytes + (r + t) * half + chunk / 2;
  }
  __m512 total[kRows][kTaps], scales[kTaps];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kTaps; ++t) total[i][t] = sums[i][t];
  }
  const uint16_t* xs = streams + chunk;
  int64_t k = 0;
  for (; k + kStep <= count; k += kStep) {
    for (int t = 0; t < kTaps; ++t) {
      scales[t] = lanes.load(block_scales[t] + (k >> lanes.shift), lanes.per_step);
      _mm_prefetch(reinterpret_cast<const char*>(bytes[t] + kAhead), _MM_HINT_T1);
    }
    dot_step<kRows, kTaps>(bytes, ~0ull, table, xs + k, ld, scales, total);
    for (int t = 0; t < kTaps; ++t) bytes[t] += kStep / 2;
  }
  if (k < count) {
    const int left = static_cast<int>(count - k);
    for (int t = 0; t < kTaps; ++t) scales[t] = lanes.load(block_scales[t] + (k >> lanes.shift), left >> lanes.shift);
    dot_step<kRows, kTaps>(bytes, (1ull << (left / 2)) - 1, table, xs + k, ld, scales, total);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    for (int t = 0; t < kTaps; ++t) sums[i][t] = total[i][t];
  }
}

// kTaps rows of W at a time, `groups` times, and all of them before the next chunk of columns: a chunk of x stays in
// the first-level cache for kRowGroup rows of W.
template <int kRows, int kTaps>
void dot_bf16_group(const Packed& w, const uint16_t* streams, int64_t low, int64_t groups, MutableMatrixView y) {
  // A power of two, so that a chunk is whole blocks or a block is whole chunks.
  constexpr int64_t kChunk = kStreamBytes / 2 / (kRows > 4 ? 8 : kRows > 2 ? 4 : kRows);
  const __m512i table = rounded_table(w);
  const ScaleLanes lanes(w);
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
      for (int t = 0; t < kTaps; ++t) {
        y.data[i * y.ld + low + g * kTaps + t] = _mm512_reduce_add_ps(sums[g][i][t]) / w.balance;
      }
    }
  }
}

template <int kRows>
void dot_bf16_rows(const Packed& w, const uint16_t* streams, int64_t low, int64_t count, MutableMatrixView y) {
  dot_bf16_group<kRows, 2>(w, streams, low, count / 2, y);
  if (count % 2 != 0) dot_bf16_group<kRows, 1>(w, streams, low + count - 1, 1, y);
}

void dot_bf16(const Packed& w, const uint16_t* streams, int64_t rows, Range w_rows, MutableMatrixView y) {
  const int64_t part = rows <= 6 ? rows : 4, ld = stream_stride(w.columns);  // more rows' sums do not fit registers
  for (int64_t r = w_rows.begin; r < w_rows.end; r += kRowGroup) {
    const int64_t count = w_rows.end - r < kRowGroup ? w_rows.end - r : kRowGroup;
    for (int64_t i = 0; i < rows; i += part) {
      by_rows<6>(rows - i < part ? rows - i : part, [&](auto taken) {
        dot_bf16_rows<decltype(taken)::value>(w, streams + i * ld, r, count, {y.data + i * y.ld, y.ld});
      });
    }
  }
}

}  // namespace
}  // namespace lorasb
