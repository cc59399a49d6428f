// The kernels of cpu/fp32_microkernel.h in terms of a vector type V (see vector_kernels.h, which comes first), which
// adds
//   micro_rows                          mr, the tokens of the micro-kernel's tile; nr is two registers
//   load_bf16/load_f16(src)             `width` elements in fp32
//   store_bf16/store_f16(dst, reg)      rounded to nearest even
//   transpose8(src, rows, dst)          8 elements of up to 8 rows of fp32 as 8 rows; the missing rows are zero
//   transpose16_bf16(src, rows, dst)    16 elements of bf16 as 16 rows of fp32, likewise

namespace lorasb {
namespace {

constexpr int kNr = 2 * V::width;
constexpr int kMr = V::micro_rows;

template <Element kElement>
struct ElementConstant {
  static constexpr Element value = kElement;
};

// Calls kernel(ElementConstant<element>()): the one place where an element type becomes a template argument.
template <typename F>
inline void by_element(Element element, const F& kernel) {
  if (element == Element::f32) return kernel(ElementConstant<Element::f32>());
  if (element == Element::bf16) return kernel(ElementConstant<Element::bf16>());
  return kernel(ElementConstant<Element::f16>());
}

// Elements i to i + width of a row, in fp32.
template <Element kElement>
inline V::reg load_element(const void* src, int64_t i) {
  if constexpr (kElement == Element::f32) return V::load(static_cast<const float*>(src) + i);
  if constexpr (kElement == Element::bf16) return V::load_bf16(static_cast<const uint16_t*>(src) + i);
  return V::load_f16(static_cast<const uint16_t*>(src) + i);
}

template <Element kElement>
inline float element_at(const void* src, int64_t i) {
  if constexpr (kElement == Element::f32) return static_cast<const float*>(src)[i];
  if constexpr (kElement == Element::bf16) return from_bf16(static_cast<const uint16_t*>(src)[i]);
  return from_f16(static_cast<const uint16_t*>(src)[i]);
}

template <Element kElement>
void widen_elements(const void* src, int64_t count, float* dst) {
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) V::store(dst + i, load_element<kElement>(src, i));
  for (; i < count; ++i) dst[i] = element_at<kElement>(src, i);
}

void widen(const void* src, Element element, int64_t count, float* dst) {
  by_element(element, [&](auto e) { widen_elements<decltype(e)::value>(src, count, dst); });
}

void narrow(const float* src, Element element, int64_t count, void* dst) {
  int64_t i = 0;
  if (element == Element::f32) {
    for (; i < count; ++i) static_cast<float*>(dst)[i] = src[i];
    return;
  }
  auto* halves = static_cast<uint16_t*>(dst);
  if (element == Element::bf16) {
    for (; i + V::width <= count; i += V::width) V::store_bf16(halves + i, V::load(src + i));
    for (; i < count; ++i) halves[i] = to_bf16(src[i]);
  } else {
    for (; i + V::width <= count; i += V::width) V::store_f16(halves + i, V::load(src + i));
    for (; i < count; ++i) halves[i] = to_f16(src[i]);
  }
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

// Chooses the instance for `rows` tokens, from mr down.
template <int kRows>
void micro_kernel_up_to(const float* tokens, const float* weight, int64_t kc, int64_t rows, bool overwrite,
                        MutableMatrixView c) {
  if (rows == kRows) return micro_kernel_rows<kRows>(tokens, weight, kc, overwrite, c);
  if constexpr (kRows > 1) micro_kernel_up_to<kRows - 1>(tokens, weight, kc, rows, overwrite, c);
}

void micro_kernel_fp32(const float* tokens, const float* weight, int64_t kc, int64_t rows, bool overwrite,
                       MutableMatrixView c) {
  micro_kernel_up_to<kMr>(tokens, weight, kc, rows, overwrite, c);
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
        V::transpose8(block, rows_of_eight(rows, first), {panel + k * kWidth + first, kWidth});
      } else {
        alignas(64) float columns[8 * 8];
        V::transpose8(block, rows_of_eight(rows, first), {columns, 8});
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

void pack_transposed(MatrixView src, int64_t rows, int64_t kc, float* panel) {
  transpose_panel<kNr>(src, rows, kc, panel);
}

void pack_tokens(MatrixView src, int64_t rows, int64_t kc, float* panel) { transpose_panel<kMr>(src, rows, kc, panel); }

void pack_transposed_bf16(Bf16View src, int64_t rows, int64_t kc, float* panel) {
  static_assert(kNr % 8 == 0, "blocks of 8 rows would run over the next row of the panel");
  int64_t k = 0;
  for (; k + 16 <= kc; k += 16) {
    for (int first = 0; first < kNr; first += 8) {
      V::transpose16_bf16({src.data + first * src.ld + k, src.ld}, rows_of_eight(rows, first),
                          {panel + k * kNr + first, kNr});
    }
  }
  for (; k < kc; ++k) {
    for (int64_t i = 0; i < kNr; ++i) panel[k * kNr + i] = i < rows ? from_bf16(src.data[i * src.ld + k]) : 0.0f;
  }
}

// The last micro-panel is filled up with zeros; whole ones take two vectors.
template <Element kElement>
void pack_row_elements(const void* src, int64_t count, float* dst, int64_t panel_stride) {
  int64_t j = 0;
  for (; j + kNr <= count; j += kNr, dst += panel_stride) {
    V::store(dst, load_element<kElement>(src, j));
    V::store(dst + V::width, load_element<kElement>(src, j + V::width));
  }
  if (j == count) return;
  for (int64_t i = 0; i < kNr; ++i) dst[i] = j + i < count ? element_at<kElement>(src, j + i) : 0.0f;
}

void pack_row(const void* src, Element element, int64_t count, float* dst, int64_t panel_stride) {
  by_element(element, [&](auto e) { pack_row_elements<decltype(e)::value>(src, count, dst, panel_stride); });
}

constexpr int kBytesAhead = 512;  // of a row of D that are prefetched before they are needed

// Dot products of each row of D with kRows rows of x. The order of a sum: kChains * width lanes, added up pairwise, and
// the tail in order; it depends on `columns` and kRows alone.
template <int kRows, Element kElement>
void dot_rows_of(MatrixView x, DenseView d, int64_t columns, Range d_rows, MutableMatrixView y) {
  constexpr int kChains = kRows == 1 ? 4 : 2;  // sums side by side: an FMA's result is ready four cycles later
  for (int64_t r = d_rows.begin; r < d_rows.end; ++r) {
    typename V::reg acc[kRows][kChains];
    for (int i = 0; i < kRows; ++i) {
      for (int c = 0; c < kChains; ++c) acc[i][c] = V::zero();
    }
    int64_t j = 0;
    for (; j + kChains * V::width <= columns; j += kChains * V::width) {
      __builtin_prefetch(static_cast<const char*>(d.data) + (r * d.ld + j) * size_of(kElement) + kBytesAhead);
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const typename V::reg value = load_element<kElement>(d.data, r * d.ld + j + c * V::width);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          acc[i][c] = V::fma(value, V::load(x.data + i * x.ld + j + c * V::width), acc[i][c]);
        }
      }
    }
    float tail[kRows] = {};
    for (; j < columns; ++j) {
      const float value = element_at<kElement>(d.data, r * d.ld + j);
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
  by_element(d.element, [&](auto e) {
    by_rows(rows,
            [&](auto count) { dot_rows_of<decltype(count)::value, decltype(e)::value>(x, d, columns, d_rows, y); });
  });
}

// kTaps rows of D from `row` on; each tap is one FMA onto the same sum, in the order of rows.
template <int kRows, int kTaps, Element kElement>
inline void add_taps(MatrixView c, DenseView d, int64_t row, Range d_columns, MutableMatrixView y) {
  const int64_t width = d_columns.size();
  typename V::reg factors[kRows][kTaps];
  for (int t = 0; t < kTaps; ++t) {
    for (int i = 0; i < kRows; ++i) factors[i][t] = V::set1(c.data[i * c.ld + row + t]);
  }
  int64_t j = 0;
  for (; j + V::width <= width; j += V::width) {
    typename V::reg values[kTaps];
    for (int t = 0; t < kTaps; ++t) values[t] = load_element<kElement>(d.data, (row + t) * d.ld + d_columns.begin + j);
    for (int i = 0; i < kRows; ++i) {
      typename V::reg sum = V::load(y.data + i * y.ld + j);
      for (int t = 0; t < kTaps; ++t) sum = V::fma(values[t], factors[i][t], sum);
      V::store(y.data + i * y.ld + j, sum);
    }
  }
  for (; j < width; ++j) {
    for (int t = 0; t < kTaps; ++t) {
      const float value = element_at<kElement>(d.data, (row + t) * d.ld + d_columns.begin + j);
      for (int i = 0; i < kRows; ++i) y.data[i * y.ld + j] += value * c.data[i * c.ld + row + t];
    }
  }
}

template <int kRows, Element kElement>
void add_rows_of(MatrixView c, DenseView d, Range d_rows, Range d_columns, MutableMatrixView y) {
  constexpr int kTaps = kRows == 1 ? 8 : 4;  // rows of D at a time: the sums are loaded and stored once for all of them
  const int64_t row_bytes = d_columns.size() * size_of(kElement);
  int64_t r = d_rows.begin;
  for (; r + kTaps <= d_rows.end; r += kTaps) {
    for (int t = 0; t < kTaps; ++t) {  // the next rows' pieces are too short for the hardware prefetcher
      const char* next =
          static_cast<const char*>(d.data) + ((r + t + kTaps) * d.ld + d_columns.begin) * size_of(kElement);
      if (r + t + kTaps < d_rows.end) {
        for (int64_t line = 0; line < row_bytes; line += 64) __builtin_prefetch(next + line);
      }
    }
    add_taps<kRows, kTaps, kElement>(c, d, r, d_columns, y);
  }
  for (; r < d_rows.end; ++r) add_taps<kRows, 1, kElement>(c, d, r, d_columns, y);
}

void add_dense_rows(MatrixView c, int64_t rows, DenseView d, Range d_rows, Range d_columns, MutableMatrixView y) {
  by_element(d.element, [&](auto e) {
    by_rows(rows,
            [&](auto count) { add_rows_of<decltype(count)::value, decltype(e)::value>(c, d, d_rows, d_columns, y); });
  });
}

const Fp32GemmKernels& fp32_gemm_kernels() {
  static const Fp32GemmKernels kernels = [] {
    Fp32GemmKernels k;
    k.mr = kMr;
    k.nr = kNr;
    k.widen = widen;
    k.narrow = narrow;
    k.micro_kernel = micro_kernel_fp32;
    k.pack_transposed = pack_transposed;
    k.pack_transposed_bf16 = pack_transposed_bf16;
    k.pack_tokens = pack_tokens;
    k.pack_row = pack_row;
    k.dot_rows = dot_rows;
    k.add_rows = add_dense_rows;
    return k;
  }();
  return kernels;
}

}  // namespace
}  // namespace lorasb
