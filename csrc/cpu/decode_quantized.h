// Packed 4-bit and 8-bit weights to dense fp32, bf16 or fp16, in terms of the vector type V of cpu/vector_kernels.h,
// which includes this file.

#include "cpu/scalar_conversions.h"

namespace lorasb {
namespace {

constexpr float kPerCode = 7.874015718698502e-3f;      // 1 / 127, of 8-bit codes
constexpr float kSmallest = 1e-30f, kLargest = 1e30f;  // scales whose products are normal numbers, in bf16 too

inline float rounded(float value, Rounding rounding) {
  if (rounding == Rounding::bf16) return from_bf16(to_bf16(value));
  return rounding == Rounding::fp16 ? from_f16(to_f16(value)) : value;
}

// The types of elements in memory.
struct F32 {
  using type = float;
  static type cast(float value) { return value; }
  static float widen(type value) { return value; }
  static V::reg load(const type* src) { return V::load(src); }
  static void store(type* dst, V::reg value) { V::store(dst, value); }
  static void interleave(V::reg high, V::reg low, type* out) { V::interleave_f32(high, low, out); }
};

struct BF16 {
  using type = uint16_t;
  static type cast(float value) { return to_bf16(value); }
  static float widen(type value) { return from_bf16(value); }
  static V::reg load(const type* src) { return V::load_bf16(src); }
  static void store(type* dst, V::reg value) { V::store_bf16(dst, value); }
  static void interleave(V::reg high, V::reg low, type* out) { V::interleave_bf16(high, low, out); }
};

struct F16 {
  using type = uint16_t;
  static type cast(float value) { return to_f16(value); }
  static float widen(type value) { return from_f16(value); }
  static V::reg load(const type* src) { return V::load_f16(src); }
  static void store(type* dst, V::reg value) { V::store_f16(dst, value); }
  static void interleave(V::reg high, V::reg low, type* out) { V::interleave_f16(high, low, out); }
};

// With such a scale, vectors round as scalars do. Others take the scalar path: the bf16 conversions of AVX-512 treat
// subnormals as zero, and those by integer additions handle only finite numbers.
inline bool is_ordinary(float scale) {
  const float magnitude = scale < 0 ? -scale : scale;
  return magnitude > kSmallest && magnitude < kLargest;
}

// Decodes `count` elements of one block. Vectors need an even `first`, at a byte's start: decode_blocks ensures it.
// Full vectors of bytes are read, none past the end: a vector holds as many bytes as it yields pairs of elements.
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
    if (i % 2 != 0) stop = i + 1;  // only a byte's low nibble; blocks are even, so the next piece begins a byte
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
