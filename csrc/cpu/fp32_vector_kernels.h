// The kernels of cpu/fp32_microkernel.h in terms of a vector type V (see vector_kernels.h), which adds
//   micro_rows                          mr, the tokens of the micro-kernel's tile; nr is two registers
//   load_bf16/load_f16(src)             `width` elements in fp32
//   store_bf16/store_f16(dst, reg)      rounded to nearest even
// and of two functions that the including file also defines:
//   transpose8(src, rows, dst)          8 elements of up to 8 rows of fp32 as 8 rows; the missing rows are zero
//   transpose16_bf16(src, rows, dst)    16 elements of bf16 as 16 rows of fp32, likewise

#include "cpu/vector_kernels.h"

namespace lorasb {
namespace {

constexpr int kNr = 2 * V::width;
constexpr int kMr = V::micro_rows;

// Calls kernel(F32()), kernel(BF16()) or kernel(F16()): the one place where an element type becomes a template
// argument.
template <typename F>
inline void by_element(Element element, const F& kernel) {
  if (element == Element::f32) return kernel(F32());
  if (element == Element::bf16) return kernel(BF16());
  return kernel(F16());
}

template <typename T>
void widen_elements(const typename T::type* src, int64_t count, float* dst) {
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) V::store(dst + i, T::load(src + i));
  for (; i < count; ++i) dst[i] = T::widen(src[i]);
}

void widen(const void* src, Element element, int64_t count, float* dst) {
  by_element(element, [&](auto e) {
    using T = decltype(e);
    widen_elements<T>(static_cast<const typename T::type*>(src), count, dst);
  });
}

template <typename T>
void narrow_elements(const float* src, int64_t count, typename T::type* dst) {
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) T::store(dst + i, V::load(src + i));
  for (; i < count; ++i) dst[i] = T::cast(src[i]);
}

void narrow(const float* src, Element element, int64_t count, void* dst) {
  by_element(element, [&](auto e) {
    using T = decltype(e);
    narrow_elements<T>(src, count, static_cast<typename T::type*>(dst));
  });
}

// The micro-kernel of kRows tokens: a rank-1 update of kRows x nr sums for each k. Every sum is one chain of FMAs in
// the order of k; kRows * 2 independent chains hide their latency.
template <int kRows>
void micro_kernel_rows(const float* tokens, const float* weight, int64_t kc, bool overwrite, MutableMatrixView c) {
  typename V::reg acc[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    acc[i][0] = overwrite ? V::zero() : V::load(c.data + i * c.ld);
    acc[i][1] = overwrite ? V::zero() : V::load(c.data + i * c.ld + V::width);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < kc; ++k) {
    const typename V::reg first = V::load(weight), second = V::load(weight + V::width);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename V::reg token = V::set1(tokens[i]);
      acc[i][0] = V::fma(token, first, acc[i][0]);
      acc[i][1] = V::fma(token, second, acc[i][1]);
    }
    tokens += kMr;
    weight += kNr;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    V::store(c.data + i * c.ld, acc[i][0]);
    V::store(c.data + i * c.ld + V::width, acc[i][1]);
  }
}

void micro_kernel_fp32(const float* tokens, const float* weight, int64_t kc, int64_t rows, bool overwrite,
                       MutableMatrixView c) {
  by_rows<kMr>(rows, [&](auto count) { micro_kernel_rows<decltype(count)::value>(tokens, weight, kc, overwrite, c); });
}

// How many of the 8 rows from `first` on exist.
inline int64_t rows_of_eight(int64_t rows, int64_t first) {
  return rows - first < 0 ? 0 : (rows - first < 8 ? rows - first : 8);
}

// Panel [kc, kWidth] of up to kWidth rows, 8 rows and 8 elements of each at a time. mr may be no multiple of 8: the
// last block of rows then goes through a buffer, as its 8 columns would run over the next row of the panel.
template <int kWidth>
void transpose_panel(MatrixView src, int64_t rows, int64_t kc, float* panel) {
  int64_t k = 0;
  for (; k + 8 <= kc; k += 8) {
    for (int first = 0; first < kWidth; first += 8) {
      const MatrixView block{src.data + first * src.ld + k, src.ld};
      if (first + 8 <= kWidth) {
        transpose8(block, rows_of_eight(rows, first), {panel + k * kWidth + first, kWidth});
      } else {
        alignas(64) float columns[8 * 8];
        transpose8(block, rows_of_eight(rows, first), {columns, 8});
        for (int j = 0; j < 8; ++j) {
          __builtin_memcpy(panel + (k + j) * kWidth + first, columns + 8 * j, sizeof(float) * (kWidth % 8));
        }
      }
    }
  }
  for (; k < kc; ++k) {
    for (int64_t i = 0; i < kWidth; ++i) panel[k * kWidth + i] = i < rows ? src.data[i * src.ld + k] : 0.0f;
  }
}

void pack_transposed_bf16(Bf16View src, int64_t rows, int64_t kc, float* panel) {
  static_assert(kNr % 8 == 0, "blocks of 8 rows would run over the next row of the panel");
  int64_t k = 0;
  for (; k + 16 <= kc; k += 16) {
    for (int first = 0; first < kNr; first += 8) {
      transpose16_bf16({src.data + first * src.ld + k, src.ld}, rows_of_eight(rows, first),
                       {panel + k * kNr + first, kNr});
    }
  }
  for (; k < kc; ++k) {
    for (int64_t i = 0; i < kNr; ++i) panel[k * kNr + i] = i < rows ? from_bf16(src.data[i * src.ld + k]) : 0.0f;
  }
}

// The last micro-panel is filled up with zeros; whole ones take two vectors.
template <typename T>
void pack_row_elements(const typename T::type* src, int64_t count, float* dst, int64_t panel_stride) {
  int64_t j = 0;
  for (; j + kNr <= count; j += kNr, dst += panel_stride) {
    V::store(dst, T::load(src + j));
    V::store(dst + V::width, T::load(src + j + V::width));
  }
  if (j == count) return;
  for (int64_t i = 0; i < kNr; ++i) dst[i] = j + i < count ? T::widen(src[j + i]) : 0.0f;
}

void pack_row(const void* src, Element element, int64_t count, float* dst, int64_t panel_stride) {
  by_element(element, [&](auto e) {
    using T = decltype(e);
    pack_row_elements<T>(static_cast<const typename T::type*>(src), count, dst, panel_stride);
  });
}

// Calls kernel(type, rows, view) with types of D's elements and of the number of rows, and D in its type.
template <typename F>
inline void by_element_and_rows(DenseView d, int64_t rows, const F& kernel) {
  by_element(d.element, [&](auto e) {
    const View<const typename decltype(e)::type> view{static_cast<const typename decltype(e)::type*>(d.data), d.ld};
    by_rows<kFewRows>(rows, [&](auto count) { kernel(e, count, view); });
  });
}

constexpr int kBytesAhead = 512;  // of a row of D that are prefetched before they are needed

// Dot products of each row of D with kRows rows of x. The order of a sum: kChains * width lanes, added up pairwise, and
// the tail in order; it depends on `columns` and kRows alone.
template <int kRows, typename T>
void dot_rows_of(MatrixView x, View<const typename T::type> d, int64_t columns, Range d_rows, MutableMatrixView y) {
  constexpr int kChains = kRows == 1 ? 4 : 2;  // sums side by side: an FMA's result is ready four cycles later
  for (int64_t r = d_rows.begin; r < d_rows.end; ++r) {
    const typename T::type* row = d.data + r * d.ld;
    typename V::reg acc[kRows][kChains];
    for (int i = 0; i < kRows; ++i) {
      for (int c = 0; c < kChains; ++c) acc[i][c] = V::zero();
    }
    int64_t j = 0;
    for (; j + kChains * V::width <= columns; j += kChains * V::width) {
      __builtin_prefetch(reinterpret_cast<const char*>(row + j) + kBytesAhead);
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const typename V::reg value = T::load(row + j + c * V::width);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          acc[i][c] = V::fma(value, V::load(x.data + i * x.ld + j + c * V::width), acc[i][c]);
        }
      }
    }
    float tail[kRows] = {};
    for (; j < columns; ++j) {
      const float value = T::widen(row[j]);
      for (int i = 0; i < kRows; ++i) tail[i] += value * x.data[i * x.ld + j];
    }
    for (int i = 0; i < kRows; ++i) {
      typename V::reg all = V::add(acc[i][0], acc[i][1]);
      if constexpr (kChains == 4) all = V::add(all, V::add(acc[i][2], acc[i][3]));
      y.data[i * y.ld + r] += V::sum(all) + tail[i];
    }
  }
}

void dot_rows(MatrixView x, int64_t rows, DenseView d, int64_t columns, Range d_rows, MutableMatrixView y) {
  by_element_and_rows(d, rows, [&](auto e, auto count, auto view) {
    dot_rows_of<decltype(count)::value, decltype(e)>(x, view, columns, d_rows, y);
  });
}

// kTaps rows of D from `row` on; each tap is one FMA onto the same sum, in the order of rows.
template <int kRows, int kTaps, typename T>
inline void add_taps(MatrixView c, View<const typename T::type> d, int64_t row, Range d_columns, MutableMatrixView y) {
  const int64_t width = d_columns.size();
  typename V::reg factors[kRows][kTaps];
  for (int t = 0; t < kTaps; ++t) {
    for (int i = 0; i < kRows; ++i) factors[i][t] = V::set1(c.data[i * c.ld + row + t]);
  }
  int64_t j = 0;
  for (; j + V::width <= width; j += V::width) {
    typename V::reg values[kTaps];
    for (int t = 0; t < kTaps; ++t) values[t] = T::load(d.data + (row + t) * d.ld + d_columns.begin + j);
    for (int i = 0; i < kRows; ++i) {
      typename V::reg sum = V::load(y.data + i * y.ld + j);
      for (int t = 0; t < kTaps; ++t) sum = V::fma(values[t], factors[i][t], sum);
      V::store(y.data + i * y.ld + j, sum);
    }
  }
  for (; j < width; ++j) {
    for (int t = 0; t < kTaps; ++t) {
      const float value = T::widen(d.data[(row + t) * d.ld + d_columns.begin + j]);
      for (int i = 0; i < kRows; ++i) y.data[i * y.ld + j] += value * c.data[i * c.ld + row + t];
    }
  }
}

template <int kRows, typename T>
void add_rows_of(MatrixView c, View<const typename T::type> d, Range d_rows, Range d_columns, MutableMatrixView y) {
  constexpr int kTaps = kRows == 1 ? 8 : 4;  // rows of D at a time: the sums are loaded and stored once for all of them
  const int64_t row_bytes = d_columns.size() * sizeof(typename T::type);
  int64_t r = d_rows.begin;
  for (; r + kTaps <= d_rows.end; r += kTaps) {
    for (int64_t next = r + kTaps; next < r + 2 * kTaps && next < d_rows.end; ++next) {
      prefetch_bytes(d.data + next * d.ld + d_columns.begin, row_bytes);
    }
    add_taps<kRows, kTaps, T>(c, d, r, d_columns, y);
  }
  for (; r < d_rows.end; ++r) add_taps<kRows, 1, T>(c, d, r, d_columns, y);
}

void add_dense_rows(MatrixView c, int64_t rows, DenseView d, Range d_rows, Range d_columns, MutableMatrixView y) {
  by_element_and_rows(d, rows, [&](auto e, auto count, auto view) {
    add_rows_of<decltype(count)::value, decltype(e)>(c, view, d_rows, d_columns, y);
  });
}

// The kernels that every instruction set has; larger sets add more.
inline Kernels common_kernels(const char* name) {
  Kernels k;
  k.name = name;
  k.decode_f32 = decode<F32>;
  k.decode_bf16 = decode<BF16>;
  k.decode_f16 = decode<F16>;
  k.dot = dot;
  k.dot_transposed = dot_transposed;
  k.pack_signs = pack_signs;
  k.fp32_gemm.mr = kMr;
  k.fp32_gemm.nr = kNr;
  k.fp32_gemm.widen = widen;
  k.fp32_gemm.narrow = narrow;
  k.fp32_gemm.micro_kernel = micro_kernel_fp32;
  k.fp32_gemm.pack_transposed = transpose_panel<kNr>;
  k.fp32_gemm.pack_transposed_bf16 = pack_transposed_bf16;
  k.fp32_gemm.pack_tokens = transpose_panel<kMr>;
  k.fp32_gemm.pack_row = pack_row;
  k.fp32_gemm.dot_rows = dot_rows;
  k.fp32_gemm.add_rows = add_dense_rows;
  return k;
}

}  // namespace
}  // namespace lorasb
