// Kernels in terms of a vector type V, which the including file defines for its instruction set. Everything is local to
// the including file: a function compiled for one instruction set must not be linked into another's code.
//
// V has `reg`, `width`, `zero`, `set1`, `load`, `store`, `fma`, `sum` (over lanes) and
//   look_up(bytes, table, high, low)   the values of both nibbles of `width` bytes
//   interleave_f32/bf16/f16(high, low, out)   high[0], low[0], high[1], ... in the output's dtype
//   round_bf16/round_f16(reg)   rounded, still in fp32

namespace lorasb {
namespace {

constexpr float kPerOctet = 7.874015718698502e-3f;     // 1 / 127
constexpr float kSmallest = 1e-30f, kLargest = 1e30f;  // scales whose products are normal numbers, in bf16 too

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline uint16_t to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_bf16(uint16_t value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }

// Round to nearest even, subnormals and overflow included.
inline uint16_t to_f16(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 2^16 and above
  if (magnitude < 0x38800000u) {  // subnormal in fp16: adding 0.5 leaves the rounded mantissa in the low bits
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  magnitude += 0xc8000fffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (magnitude >> 13));
}

inline float from_f16(uint16_t value) {
  const uint32_t sign = (value & 0x8000u) << 16, magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));
  return bits_to_float(sign | float_to_bits(static_cast<float>(magnitude) * 5.9604644775390625e-8f));
}

inline float rounded(float value, Rounding rounding) {
  if (rounding == Rounding::bf16) return from_bf16(to_bf16(value));
  return rounding == Rounding::fp16 ? from_f16(to_f16(value)) : value;
}

struct F32 {
  using type = float;
  static type cast(float value) { return value; }
  static void interleave(V::reg high, V::reg low, type* out) { V::interleave_f32(high, low, out); }
};

struct BF16 {
  using type = uint16_t;
  static type cast(float value) { return to_bf16(value); }
  static void interleave(V::reg high, V::reg low, type* out) { V::interleave_bf16(high, low, out); }
};

struct F16 {
  using type = uint16_t;
  static type cast(float value) { return to_f16(value); }
  static void interleave(V::reg high, V::reg low, type* out) { V::interleave_f16(high, low, out); }
};

inline bool is_ordinary(float scale) {
  const float size = scale < 0 ? -scale : scale;
  return size > kSmallest && size < kLargest;
}

// `count` elements from an even place on, all of one block.
template <typename T, Rounding kRounding>
inline void decode_run(const Packed& w, const typename V::table& table, int64_t first, int64_t count, float scale,
                       typename T::type* out) {
  int64_t i = 0;
  if (is_ordinary(scale)) {
    const auto factor = V::set1(scale);
    for (; i + 2 * V::width <= count; i += 2 * V::width) {
      typename V::reg high, low;
      V::look_up(w.bytes + (first + i) / 2, table, high, low);
      high = V::mul(high, factor);
      low = V::mul(low, factor);
      if constexpr (kRounding == Rounding::bf16) {
        high = V::round_bf16(high);
        low = V::round_bf16(low);
      } else if constexpr (kRounding == Rounding::fp16) {
        high = V::round_f16(high);
        low = V::round_f16(low);
      }
      T::interleave(high, low, out + i);
    }
  }
  for (; i < count; ++i) {
    const uint8_t byte = w.bytes[(first + i) / 2];
    const uint8_t nibble = (first + i) % 2 == 0 ? byte >> 4 : byte & 15;
    out[i] = T::cast(rounded(w.table[nibble] * scale, kRounding));
  }
}

template <typename T, Rounding kRounding>
inline void decode_blocks(const Packed& w, int64_t first, int64_t count, typename T::type* out) {
  const typename V::table table = V::load_table(w.table);
  const int64_t end = first + count;
  for (int64_t i = first; i < end;) {
    const int64_t b = i / w.block;
    int64_t stop = (b + 1) * w.block;
    if (i % 2 != 0) stop = i + 1;  // up to a whole byte
    if (stop > end) stop = end;
    decode_run<T, kRounding>(w, table, i, stop - i, w.scale(b), out + (i - first));
    i = stop;
  }
}

// Row by row: a division for each element would take longer than all the rest.
template <typename T>
void decode_octets(const Packed& w, int64_t first, int64_t count, typename T::type* out) {
  for (int64_t done = 0; done < count;) {
    const int64_t place = first + done, row = place / w.columns;
    const int64_t row_end = (row + 1) * w.columns - first, end = row_end < count ? row_end : count;
    const float scale = w.scales[row];
    const int8_t* codes = w.codes + first;
    for (int64_t i = done; i < end; ++i) {
      out[i] = T::cast(rounded(static_cast<float>(codes[i]) * scale * kPerOctet, w.rounding));
    }
    done = end;
  }
}

template <typename T>
void decode(const Packed& w, int64_t first, int64_t count, typename T::type* out) {
  if (w.codes != nullptr) {
    decode_octets<T>(w, first, count, out);
  } else if (w.rounding == Rounding::bf16) {
    decode_blocks<T, Rounding::bf16>(w, first, count, out);
  } else if (w.rounding == Rounding::fp16) {
    decode_blocks<T, Rounding::fp16>(w, first, count, out);
  } else {
    decode_blocks<T, Rounding::none>(w, first, count, out);
  }
}

template <int kRows>
void dot_rows(const Packed& w, const float* even, const float* odd, int64_t low, int64_t high, float* y,
              int64_t stride) {
  const typename V::table table = V::load_table(w.table);
  const int64_t half = w.columns / 2, step = w.block / 2, blocks = w.columns / w.block;
  const int64_t apart = half_stride(w.columns);
  for (int64_t r = low; r < high; ++r) {
    typename V::reg total[kRows];
    for (int i = 0; i < kRows; ++i) total[i] = V::zero();
    for (int64_t b = 0; b < blocks; ++b) {
      typename V::reg part[kRows], other[kRows];
      for (int i = 0; i < kRows; ++i) part[i] = other[i] = V::zero();
      for (int64_t j = b * step; j < (b + 1) * step; j += V::width) {
        typename V::reg values[2];
        V::look_up(w.bytes + r * half + j, table, values[0], values[1]);
        for (int i = 0; i < kRows; ++i) {
          part[i] = V::fma(values[0], V::load(even + i * apart + j), part[i]);
          other[i] = V::fma(values[1], V::load(odd + i * apart + j), other[i]);
        }
      }
      const auto factor = V::set1(w.scale(r * blocks + b));
      for (int i = 0; i < kRows; ++i) total[i] = V::fma(V::add(part[i], other[i]), factor, total[i]);
    }
    for (int i = 0; i < kRows; ++i) y[i * stride + r] = V::sum(total[i]);
  }
}

void dot(const Packed& w, const float* even, const float* odd, int64_t rows, int64_t low, int64_t high, float* y,
         int64_t stride) {
  switch (rows) {
    case 1:
      return dot_rows<1>(w, even, odd, low, high, y, stride);
    case 2:
      return dot_rows<2>(w, even, odd, low, high, y, stride);
    case 3:
      return dot_rows<3>(w, even, odd, low, high, y, stride);
    default:
      return dot_rows<4>(w, even, odd, low, high, y, stride);
  }
}

constexpr int kRowsFetched = 16;  // of W, ahead of those at work: a row's piece is too short for the processor to guess

// kTaps rows of W at a time: the sums are loaded and stored once for all of them.
template <int kRows, int kTaps>
inline void add_rows(const Packed& w, const typename V::table& table, const float* dy, int64_t stride, int64_t r,
                     int64_t first, int64_t width, float* sums) {
  const int64_t half = w.columns / 2, step = w.block / 2, blocks = w.columns / w.block;
  for (int64_t b = first / w.block; b < (first + width) / w.block; ++b) {
    typename V::reg factors[kRows][kTaps];
    for (int t = 0; t < kTaps; ++t) {
      __builtin_prefetch(w.bytes + (r + t + kRowsFetched) * half + b * step);
      const float scale = w.scale((r + t) * blocks + b);
      for (int i = 0; i < kRows; ++i) factors[i][t] = V::set1(dy[i * stride + r + t] * scale);
    }
    for (int64_t j = b * step; j < (b + 1) * step; j += V::width) {
      typename V::reg high[kTaps], low[kTaps];
      for (int t = 0; t < kTaps; ++t) V::look_up(w.bytes + (r + t) * half + j, table, high[t], low[t]);
      for (int i = 0; i < kRows; ++i) {
        float* even = sums + i * width + (j - first / 2);
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

template <int kRows>
void dot_transposed_rows(const Packed& w, const float* dy, int64_t stride, int64_t first, int64_t width, float* sums) {
  constexpr int kTaps = kRows == 1 ? 8 : 4;
  const typename V::table table = V::load_table(w.table);
  for (int64_t i = 0; i < kRows * width; ++i) sums[i] = 0.0f;
  int64_t r = 0;
  for (; r + kTaps <= w.rows; r += kTaps) add_rows<kRows, kTaps>(w, table, dy, stride, r, first, width, sums);
  for (; r < w.rows; ++r) add_rows<kRows, 1>(w, table, dy, stride, r, first, width, sums);
}

void dot_transposed(const Packed& w, const float* dy, int64_t stride, int64_t rows, int64_t first, int64_t width,
                    float* sums) {
  switch (rows) {
    case 1:
      return dot_transposed_rows<1>(w, dy, stride, first, width, sums);
    case 2:
      return dot_transposed_rows<2>(w, dy, stride, first, width, sums);
    case 3:
      return dot_transposed_rows<3>(w, dy, stride, first, width, sums);
    default:
      return dot_transposed_rows<4>(w, dy, stride, first, width, sums);
  }
}

double pack_signs(const float* x, int64_t count, uint32_t* positive, uint32_t* nonzero, int64_t* zeros, int64_t* bad) {
  double squares = 0.0;
  for (int64_t start = 0; start < count; start += 32) {
    const int64_t end = start + 32 < count ? start + 32 : count;
    uint32_t above = 0, other = 0;
    double part = 0.0;
    for (int64_t j = start; j < end; ++j) {
      const uint32_t bit = 1u << (j - start);
      above |= x[j] > 0.0f ? bit : 0u;
      other |= x[j] != 0.0f ? bit : 0u;
      *zeros += x[j] == 0.0f;
      *bad += (float_to_bits(x[j]) & 0x7f800000u) == 0x7f800000u;
      part += static_cast<double>(x[j]) * static_cast<double>(x[j]);
    }
    positive[start / 32] = above;
    nonzero[start / 32] = other;
    squares += part;
  }
  return squares;
}

const GemmKernels& gemm_kernels();  // gemm_vector.h

// What every instruction set has; the richer ones add to it.
inline Kernels common_kernels(const char* name) {
  Kernels k;
  k.name = name;
  k.decode_f32 = decode<F32>;
  k.decode_bf16 = decode<BF16>;
  k.decode_f16 = decode<F16>;
  k.dot = dot;
  k.dot_transposed = dot_transposed;
  k.pack_signs = pack_signs;
  k.gemm = &gemm_kernels();
  return k;
}

}  // namespace
}  // namespace lorasb
