// The kernels of gemm_kernels.h in terms of a vector type V (see vector_kernels.h, which comes first), which adds
//   micro_rows                             tokens in the micro-kernel's tile; its lanes are two registers
//   load_bf16/load_f16(from)               `width` elements in fp32
//   store_bf16/store_f16(to, reg)          rounded to nearest even
//   transpose8(from, ld, rows, to, to_ld)  8 elements of up to 8 rows of fp32, the missing rows zero
//   transpose16_bf16(likewise)             16 elements of bf16

namespace lorasb {
namespace {

constexpr int kNr = 2 * V::width;
constexpr int kMr = V::micro_rows;

template <Element kElement>
inline V::reg load_element(const void* from, int64_t place) {
  if constexpr (kElement == Element::f32) return V::load(static_cast<const float*>(from) + place);
  if constexpr (kElement == Element::bf16) return V::load_bf16(static_cast<const uint16_t*>(from) + place);
  return V::load_f16(static_cast<const uint16_t*>(from) + place);
}

template <Element kElement>
inline float element_at(const void* from, int64_t place) {
  if constexpr (kElement == Element::f32) return static_cast<const float*>(from)[place];
  if constexpr (kElement == Element::bf16) return from_bf16(static_cast<const uint16_t*>(from)[place]);
  return from_f16(static_cast<const uint16_t*>(from)[place]);
}

template <Element kElement>
void widen_elements(const void* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) V::store(to + i, load_element<kElement>(from, i));
  for (; i < count; ++i) to[i] = element_at<kElement>(from, i);
}

void widen(const void* from, Element element, int64_t count, float* to) {
  if (element == Element::f32) return widen_elements<Element::f32>(from, count, to);
  if (element == Element::bf16) return widen_elements<Element::bf16>(from, count, to);
  return widen_elements<Element::f16>(from, count, to);
}

void narrow(const float* from, Element element, int64_t count, void* to) {
  int64_t i = 0;
  if (element == Element::f32) {
    for (; i < count; ++i) static_cast<float*>(to)[i] = from[i];
    return;
  }
  auto* out = static_cast<uint16_t*>(to);
  if (element == Element::bf16) {
    for (; i + V::width <= count; i += V::width) V::store_bf16(out + i, V::load(from + i));
    for (; i < count; ++i) out[i] = to_bf16(from[i]);
  } else {
    for (; i + V::width <= count; i += V::width) V::store_f16(out + i, V::load(from + i));
    for (; i < count; ++i) out[i] = to_f16(from[i]);
  }
}

template <int kRows>
void multiply_rows_f32(const float* tokens, const float* lanes, int64_t depth, bool fresh, float* sums, int64_t ld) {
  typename V::reg total[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    total[i][0] = fresh ? V::zero() : V::load(sums + i * ld);
    total[i][1] = fresh ? V::zero() : V::load(sums + i * ld + V::width);
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    const typename V::reg first = V::load(lanes), second = V::load(lanes + V::width);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const typename V::reg token = V::set1(tokens[i]);
      total[i][0] = V::fma(token, first, total[i][0]);
      total[i][1] = V::fma(token, second, total[i][1]);
    }
    tokens += kMr;
    lanes += kNr;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    V::store(sums + i * ld, total[i][0]);
    V::store(sums + i * ld + V::width, total[i][1]);
  }
}

template <int kRows>
void multiply_up_to(const float* tokens, const float* lanes, int64_t depth, int64_t rows, bool fresh, float* sums,
                    int64_t ld) {
  if (rows == kRows) return multiply_rows_f32<kRows>(tokens, lanes, depth, fresh, sums, ld);
  if constexpr (kRows > 1) multiply_up_to<kRows - 1>(tokens, lanes, depth, rows, fresh, sums, ld);
}

void multiply_f32(const float* tokens, const float* lanes, int64_t depth, int64_t rows, bool fresh, float* sums,
                  int64_t ld) {
  multiply_up_to<kMr>(tokens, lanes, depth, rows, fresh, sums, ld);
}

// Panel [depth, kWidth] of up to kWidth rows, eight rows and eight elements of each at a time.
template <int kWidth>
void transpose_panel(const float* from, int64_t ld, int64_t rows, int64_t depth, float* to) {
  int64_t k = 0;
  for (; k + 8 <= depth; k += 8) {
    for (int first = 0; first < kWidth; first += 8) {
      const int64_t there = rows - first < 0 ? 0 : (rows - first < 8 ? rows - first : 8);
      if (first + 8 <= kWidth) {
        V::transpose8(from + first * ld + k, ld, there, to + k * kWidth + first, kWidth);
      } else {
        alignas(64) float block[8 * 8];
        V::transpose8(from + first * ld + k, ld, there, block, 8);
        for (int j = 0; j < 8; ++j) {
          __builtin_memcpy(to + (k + j) * kWidth + first, block + 8 * j, sizeof(float) * (kWidth % 8));
        }
      }
    }
  }
  for (; k < depth; ++k) {
    for (int64_t i = 0; i < kWidth; ++i) to[k * kWidth + i] = i < rows ? from[i * ld + k] : 0.0f;
  }
}

void transpose_lanes(const float* from, int64_t ld, int64_t rows, int64_t depth, float* to) {
  transpose_panel<kNr>(from, ld, rows, depth, to);
}

// kNr is a multiple of 8 everywhere.
void transpose_bf16_lanes(const uint16_t* from, int64_t ld, int64_t rows, int64_t depth, float* to) {
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    for (int first = 0; first < kNr; first += 8) {
      const int64_t there = rows - first < 0 ? 0 : (rows - first < 8 ? rows - first : 8);
      V::transpose16_bf16(from + first * ld + k, ld, there, to + k * kNr + first, kNr);
    }
  }
  for (; k < depth; ++k) {
    for (int64_t i = 0; i < kNr; ++i) to[k * kNr + i] = i < rows ? from_bf16(from[i * ld + k]) : 0.0f;
  }
}

void transpose_tokens(const float* from, int64_t ld, int64_t rows, int64_t depth, float* to) {
  transpose_panel<kMr>(from, ld, rows, depth, to);
}

template <Element kElement>
void spread_elements(const void* from, int64_t count, float* to, int64_t apart) {
  int64_t j = 0;
  for (; j + kNr <= count; j += kNr, to += apart) {
    V::store(to, load_element<kElement>(from, j));
    V::store(to + V::width, load_element<kElement>(from, j + V::width));
  }
  if (j == count) return;
  for (int64_t i = 0; i < kNr; ++i) to[i] = j + i < count ? element_at<kElement>(from, j + i) : 0.0f;
}

void spread_lanes(const void* from, Element element, int64_t count, float* to, int64_t apart) {
  if (element == Element::f32) return spread_elements<Element::f32>(from, count, to, apart);
  if (element == Element::bf16) return spread_elements<Element::bf16>(from, count, to, apart);
  return spread_elements<Element::f16>(from, count, to, apart);
}

constexpr int kLinesAhead = 512;  // bytes of a row that are fetched before they are needed

template <int kRows, Element kElement>
void dot_rows_of(const float* x, int64_t x_stride, const void* d, int64_t ld, int64_t columns, int64_t low,
                 int64_t high, bool add, float* sums, int64_t stride) {
  constexpr int kChains = kRows == 1 ? 4 : 2;  // sums side by side: an FMA's result is ready four cycles later
  for (int64_t r = low; r < high; ++r) {
    typename V::reg total[kRows][kChains];
    for (int i = 0; i < kRows; ++i) {
      for (int c = 0; c < kChains; ++c) total[i][c] = V::zero();
    }
    int64_t j = 0;
    for (; j + kChains * V::width <= columns; j += kChains * V::width) {
      __builtin_prefetch(static_cast<const char*>(d) + (r * ld + j) * size_of(kElement) + kLinesAhead);
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const typename V::reg value = load_element<kElement>(d, r * ld + j + c * V::width);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          total[i][c] = V::fma(value, V::load(x + i * x_stride + j + c * V::width), total[i][c]);
        }
      }
    }
    float rest[kRows] = {};
    for (; j < columns; ++j) {
      const float value = element_at<kElement>(d, r * ld + j);
      for (int i = 0; i < kRows; ++i) rest[i] += value * x[i * x_stride + j];
    }
    for (int i = 0; i < kRows; ++i) {
      typename V::reg all = V::add(total[i][0], total[i][1]);
      if constexpr (kChains == 4) all = V::add(all, V::add(total[i][2], total[i][3]));
      const float value = V::sum(all) + rest[i];
      sums[i * stride + r] = add ? sums[i * stride + r] + value : value;
    }
  }
}

template <int kRows, int kTaps, Element kElement>
inline void add_taps(const float* c, int64_t c_stride, const void* d, int64_t ld, int64_t row, int64_t first,
                     int64_t width, float* sums, int64_t stride) {
  typename V::reg factors[kRows][kTaps];
  for (int t = 0; t < kTaps; ++t) {
    for (int i = 0; i < kRows; ++i) factors[i][t] = V::set1(c[i * c_stride + row + t]);
  }
  int64_t j = 0;
  for (; j + V::width <= width; j += V::width) {
    typename V::reg values[kTaps];
    for (int t = 0; t < kTaps; ++t) values[t] = load_element<kElement>(d, (row + t) * ld + first + j);
    for (int i = 0; i < kRows; ++i) {
      typename V::reg total = V::load(sums + i * stride + j);
      for (int t = 0; t < kTaps; ++t) total = V::fma(values[t], factors[i][t], total);
      V::store(sums + i * stride + j, total);
    }
  }
  for (; j < width; ++j) {
    for (int t = 0; t < kTaps; ++t) {
      const float value = element_at<kElement>(d, (row + t) * ld + first + j);
      for (int i = 0; i < kRows; ++i) sums[i * stride + j] += value * c[i * c_stride + row + t];
    }
  }
}

template <int kRows, Element kElement>
void add_rows_of(const float* c, int64_t c_stride, const void* d, int64_t ld, int64_t low, int64_t high, int64_t first,
                 int64_t width, float* sums, int64_t stride) {
  constexpr int kTaps = kRows == 1 ? 8 : 4;  // rows of D at a time: the sums are loaded and stored once for all of them
  int64_t r = low;
  for (; r + kTaps <= high; r += kTaps) {
    for (int t = 0; t < kTaps; ++t) {  // the next rows' pieces are too short for the processor to guess
      const char* next = static_cast<const char*>(d) + ((r + t + kTaps) * ld + first) * size_of(kElement);
      if (r + t + kTaps < high) {
        for (int64_t line = 0; line < width * size_of(kElement); line += 64) __builtin_prefetch(next + line);
      }
    }
    add_taps<kRows, kTaps, kElement>(c, c_stride, d, ld, r, first, width, sums, stride);
  }
  for (; r < high; ++r) add_taps<kRows, 1, kElement>(c, c_stride, d, ld, r, first, width, sums, stride);
}

template <Element kElement>
void dot_rows_by(const float* x, int64_t x_stride, int64_t rows, const void* d, int64_t ld, int64_t columns,
                 int64_t low, int64_t high, bool add, float* sums, int64_t stride) {
  if (rows == 1) return dot_rows_of<1, kElement>(x, x_stride, d, ld, columns, low, high, add, sums, stride);
  if (rows == 2) return dot_rows_of<2, kElement>(x, x_stride, d, ld, columns, low, high, add, sums, stride);
  if (rows == 3) return dot_rows_of<3, kElement>(x, x_stride, d, ld, columns, low, high, add, sums, stride);
  return dot_rows_of<4, kElement>(x, x_stride, d, ld, columns, low, high, add, sums, stride);
}

void dot_rows(const float* x, int64_t x_stride, int64_t rows, const void* d, Element element, int64_t ld,
              int64_t columns, int64_t low, int64_t high, bool add, float* sums, int64_t stride) {
  const auto call = element == Element::f32    ? dot_rows_by<Element::f32>
                    : element == Element::bf16 ? dot_rows_by<Element::bf16>
                                               : dot_rows_by<Element::f16>;
  call(x, x_stride, rows, d, ld, columns, low, high, add, sums, stride);
}

template <Element kElement>
void add_rows_by(const float* c, int64_t c_stride, int64_t rows, const void* d, int64_t ld, int64_t low, int64_t high,
                 int64_t first, int64_t width, float* sums, int64_t stride) {
  if (rows == 1) return add_rows_of<1, kElement>(c, c_stride, d, ld, low, high, first, width, sums, stride);
  if (rows == 2) return add_rows_of<2, kElement>(c, c_stride, d, ld, low, high, first, width, sums, stride);
  if (rows == 3) return add_rows_of<3, kElement>(c, c_stride, d, ld, low, high, first, width, sums, stride);
  return add_rows_of<4, kElement>(c, c_stride, d, ld, low, high, first, width, sums, stride);
}

void add_dense_rows(const float* c, int64_t c_stride, int64_t rows, const void* d, Element element, int64_t ld,
                    int64_t low, int64_t high, int64_t first, int64_t width, float* sums, int64_t stride) {
  const auto call = element == Element::f32    ? add_rows_by<Element::f32>
                    : element == Element::bf16 ? add_rows_by<Element::bf16>
                                               : add_rows_by<Element::f16>;
  call(c, c_stride, rows, d, ld, low, high, first, width, sums, stride);
}

const GemmKernels& gemm_kernels() {
  static const GemmKernels kernels = {
      kMr,          kNr,    widen,    multiply_f32,  transpose_lanes, transpose_bf16_lanes, transpose_tokens,
      spread_lanes, narrow, dot_rows, add_dense_rows};
  return kernels;
}

}  // namespace
}  // namespace lorasb
