// Packed 4-bit and 8-bit weights to dense fp32, bf16 or fp16, in terms of the vector type V of cpu/vector_kernels.h,
// which includes this file.

namespace lorasb {
namespace {

constexpr float kPerCode = 7.874015718698502e-3f;      // 1 / 127, of 8-bit codes
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

// Round to nearest even; the carry of the addition goes into the exponent, and overflow gives infinity.
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

// The types that `decode` writes.
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

// With such a scale vectors round as scalars do. Others take the scalar path: the bf16 conversions of AVX-512 take
// subnormals for zero, and those by integer additions do not know what is not finite.
inline bool is_ordinary(float scale) {
  const float magnitude = scale < 0 ? -scale : scale;
  return magnitude > kSmallest && magnitude < kLargest;
}

// `count` elements of one block. Vectors need an even `first`, a whole byte; decode_blocks sees to that. Whole vectors
// of bytes are read, none past the end: a vector holds as many bytes as it yields pairs of elements.
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

// Elements [first, first + count), cut where blocks end: each piece has one scale.
template <typename T, Rounding kRounding>
inline void decode_blocks(const Packed& w, int64_t first, int64_t count, typename T::type* out) {
  const typename V::table table = V::load_table(w.table);
  const int64_t end = first + count;
  for (int64_t i = first; i < end;) {
    const int64_t b = i / w.block;
    int64_t stop = (b + 1) * w.block;
    if (i % 2 != 0) stop = i + 1;  // the low nibble of a byte alone; blocks are even, so the next piece begins a byte
    if (stop > end) stop = end;
    decode_run<T, kRounding>(w, table, i, stop - i, w.scale(b), out + (i - first));
    i = stop;
  }
}

// 8 bits. Row by row: a division for each element would take longer than all the rest.
template <typename T>
void decode_codes(const Packed& w, int64_t first, int64_t count, typename T::type* out) {
  for (int64_t done = 0; done < count;) {
    const int64_t place = first + done, row = place / w.columns;
    const int64_t row_end = (row + 1) * w.columns - first, end = row_end < count ? row_end : count;
    const float scale = w.scales[row];
    const int8_t* codes = w.codes + first;
    for (int64_t i = done; i < end; ++i) {
      out[i] = T::cast(rounded(static_cast<float>(codes[i]) * scale * kPerCode, w.rounding));
    }
    done = end;
  }
}

template <typename T>
void decode(const Packed& w, int64_t first, int64_t count, typename T::type* out) {
  if (w.codes != nullptr) {
    decode_codes<T>(w, first, count, out);
  } else if (w.rounding == Rounding::bf16) {
    decode_blocks<T, Rounding::bf16>(w, first, count, out);
  } else if (w.rounding == Rounding::fp16) {
    decode_blocks<T, Rounding::fp16>(w, first, count, out);
  } else {
    decode_blocks<T, Rounding::none>(w, first, count, out);
  }
}

}  // namespace
}  // namespace lorasb
