// Kernels in terms of a vector type V, which the including file defines for its instruction set. Everything is local to
// the including file: a function compiled for one instruction set must not be linked into another's code.
//
// V has `reg`, `width` (fp32 lanes), `table`, and these functions:
//   zero set1 load store mul add fma   of fp32 lanes; `portable` computes fma as a product and a sum, both rounded
//   sum(reg)                           over lanes, as a tree whose shape belongs to the instruction set
//   load_table(values)                 the 16 entries of a table
//   look_up(bytes, table, high, low)   the entries of both nibbles of `width` bytes
//   interleave_f32/bf16/f16(high, low, out)   high[0], low[0], high[1], ... in the output's dtype
//   round_bf16/round_f16(reg)          rounded to nearest even, still in fp32
//
// Results differ between instruction sets in the last bits, since the number of lanes is part of the order of a sum.
// Decoding does not differ: it has no sums. The build has -ffp-contract=off, so that only V::fma fuses a product and a
// sum, never the compiler, and scalar tails round like the loops before them.

#include "cpu/decode_quantized.h"

namespace lorasb {
namespace {

// Calls kernel(constant) for 1 to kMost rows: accumulators are in registers only if the compiler knows the number of
// rows.
template <int kMost, typename F>
inline void by_rows(int64_t rows, const F& kernel) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return by_rows<kMost - 1>(rows, kernel);
  }
  kernel(std::integral_constant<int, kMost>());
}

// Sums of a block are taken without its scale, which is applied once to them. Within a block even and odd columns have
// separate sums: two independent chains of FMAs.
template <int kRows>
void dot_rows(const Packed& w, SplitRows x, Range w_rows, MutableMatrixView y) {
  const typename V::table table = V::load_table(w.table);
  const int64_t half = w.columns / 2, step = w.block / 2, blocks = w.columns / w.block;
  for (int64_t r = w_rows.begin; r < w_rows.end; ++r) {
    typename V::reg total[kRows];
    for (int i = 0; i < kRows; ++i) total[i] = V::zero();
    for (int64_t b = 0; b < blocks; ++b) {
      typename V::reg even[kRows], odd[kRows];
      for (int i = 0; i < kRows; ++i) even[i] = odd[i] = V::zero();
      for (int64_t j = b * step; j < (b + 1) * step; j += V::width) {
        typename V::reg values[2];
        V::look_up(w.bytes + r * half + j, table, values[0], values[1]);
        for (int i = 0; i < kRows; ++i) {
          even[i] = V::fma(values[0], V::load(x.even + i * x.ld + j), even[i]);
          odd[i] = V::fma(values[1], V::load(x.odd + i * x.ld + j), odd[i]);
        }
      }
      const auto scale = V::set1(w.scale(r * blocks + b));
      for (int i = 0; i < kRows; ++i) total[i] = V::fma(V::add(even[i], odd[i]), scale, total[i]);
    }
    for (int i = 0; i < kRows; ++i) y.data[i * y.ld + r] = V::sum(total[i]);
  }
}

void dot(const Packed& w, SplitRows x, int64_t rows, Range w_rows, MutableMatrixView y) {
  by_rows<kDirectRows>(rows, [&](auto count) { dot_rows<decltype(count)::value>(w, x, w_rows, y); });
}

// How many rows of W ahead are prefetched: a row's piece is too short for the hardware prefetcher.
constexpr int kRowsFetched = 16;

// kTaps rows of W from r on at a time: the sums are loaded and stored once for all of them.
template <int kRows, int kTaps>
inline void add_rows(const Packed& w, const typename V::table& table, MatrixView dy, int64_t r, Range columns,
                     float* sums) {
  const int64_t half = w.columns / 2, step = w.block / 2, blocks = w.columns / w.block, width = columns.size();
  for (int64_t b = columns.begin / w.block; b < columns.end / w.block; ++b) {
    typename V::reg factors[kRows][kTaps];
    for (int t = 0; t < kTaps; ++t) {
      __builtin_prefetch(w.bytes + (r + t + kRowsFetched) * half + b * step);
      const float scale = w.scale((r + t) * blocks + b);
      for (int i = 0; i < kRows; ++i) factors[i][t] = V::set1(dy.data[i * dy.ld + r + t] * scale);
    }
    for (int64_t j = b * step; j < (b + 1) * step; j += V::width) {
      typename V::reg high[kTaps], low[kTaps];
      for (int t = 0; t < kTaps; ++t) V::look_up(w.bytes + (r + t) * half + j, table, high[t], low[t]);
      for (int i = 0; i < kRows; ++i) {
        float* even = sums + i * width + (j - columns.begin / 2);
        float* odd = even + width / 2;
        auto a = V::load(even), c = V::load(odd);
        for (int t = 0; t < kTaps; ++t) {
          a = V::fma(high[t], factors[i][t], a);
          c = V::fma(low[t], factors[i][t], c);
        }
        V::store(even, a);
        V::store(odd, c);
      }
    }
  }
}

// The order of a sum over W's rows is that of the rows, whatever kTaps is: each tap is an FMA onto the same sum.
template <int kRows>
void dot_transposed_rows(const Packed& w, MatrixView dy, Range columns, float* sums) {
  constexpr int kTaps = kRows == 1 ? 8 : 4;
  const typename V::table table = V::load_table(w.table);
  for (int64_t i = 0; i < kRows * columns.size(); ++i) sums[i] = 0.0f;
  int64_t r = 0;
  for (; r + kTaps <= w.rows; r += kTaps) add_rows<kRows, kTaps>(w, table, dy, r, columns, sums);
  for (; r < w.rows; ++r) add_rows<kRows, 1>(w, table, dy, r, columns, sums);
}

void dot_transposed(const Packed& w, MatrixView dy, int64_t rows, Range columns, float* sums) {
  by_rows<kDirectRows>(rows, [&](auto count) { dot_transposed_rows<decltype(count)::value>(w, dy, columns, sums); });
}

SignCounts pack_signs(const float* x, int64_t count, uint32_t* positive, uint32_t* nonzero) {
  SignCounts counts;
  for (int64_t start = 0; start < count; start += 32) {
    const int64_t end = start + 32 < count ? start + 32 : count;
    uint32_t above = 0, other = 0;
    double squares = 0.0;
    for (int64_t j = start; j < end; ++j) {
      const uint32_t bit = 1u << (j - start);
      above |= x[j] > 0.0f ? bit : 0u;
      other |= x[j] != 0.0f ? bit : 0u;
      counts.zeros += x[j] == 0.0f;
      counts.not_finite += (float_to_bits(x[j]) & 0x7f800000u) == 0x7f800000u;  // all bits of the exponent
      squares += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    }
    positive[start / 32] = above;
    nonzero[start / 32] = other;
    counts.squares += squares;
  }
  return counts;
}

}  // namespace
}  // namespace lorasb
