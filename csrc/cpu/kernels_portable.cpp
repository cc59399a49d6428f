// Plain C++, for any processor; the compiler vectorizes the loops where it can.
#include "cpu/kernel_table.h"
#include "cpu/scalar_conversions.h"

namespace lorasb {
namespace {

struct V {
  static constexpr int width = 8;
  static constexpr int micro_rows = 4;
  struct reg {
    float lane[width];
  };
  using table = const float*;

  // Lane i is value(i).
  template <typename F>
  static reg lanes(const F& value) {
    reg result;
    for (int i = 0; i < width; ++i) result.lane[i] = value(i);
    return result;
  }
  template <typename T, typename F>
  static void interleave(const reg& high, const reg& low, T* out, const F& cast) {
    for (int i = 0; i < width; ++i) {
      out[2 * i] = cast(high.lane[i]);
      out[2 * i + 1] = cast(low.lane[i]);
    }
  }

  static table load_table(const float* values) { return values; }
  static reg set1(float value) {
    return lanes([&](int) { return value; });
  }
  static reg zero() { return set1(0.0f); }
  static reg load(const float* src) {
    return lanes([&](int i) { return src[i]; });
  }
  static void store(float* dst, const reg& value) {
    for (int i = 0; i < width; ++i) dst[i] = value.lane[i];
  }
  static reg mul(const reg& a, const reg& b) {
    return lanes([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static reg add(const reg& a, const reg& b) {
    return lanes([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  // Two roundings: without the instruction, std::fma is a call of many cycles for each lane.
  static reg fma(const reg& a, const reg& b, const reg& c) { return add(mul(a, b), c); }
  // The same tree in which AVX2 sums its eight lanes.
  static float sum(const reg& a) {
    return ((a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6])) + ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]));
  }
  static void look_up(const uint8_t* bytes, table values, reg& high, reg& low) {
    for (int i = 0; i < width; ++i) {
      high.lane[i] = values[bytes[i] >> 4];
      low.lane[i] = values[bytes[i] & 15];
    }
  }
  static void interleave_f32(const reg& high, const reg& low, float* out) {
    interleave(high, low, out, [](float value) { return value; });
  }
  static void interleave_bf16(const reg& high, const reg& low, uint16_t* out) { interleave(high, low, out, to_bf16); }
  static void interleave_f16(const reg& high, const reg& low, uint16_t* out) { interleave(high, low, out, to_f16); }
  static reg round_bf16(const reg& a) {
    return lanes([&](int i) { return from_bf16(to_bf16(a.lane[i])); });
  }
  static reg round_f16(const reg& a) {
    return lanes([&](int i) { return from_f16(to_f16(a.lane[i])); });
  }
  static reg load_bf16(const uint16_t* src) {
    return lanes([&](int i) { return from_bf16(src[i]); });
  }
  static reg load_f16(const uint16_t* src) {
    return lanes([&](int i) { return from_f16(src[i]); });
  }
  static void store_bf16(uint16_t* dst, const reg& a) {
    for (int i = 0; i < width; ++i) dst[i] = to_bf16(a.lane[i]);
  }
  static void store_f16(uint16_t* dst, const reg& a) {
    for (int i = 0; i < width; ++i) dst[i] = to_f16(a.lane[i]);
  }
};

// dst [columns, 8] = src [rows, columns]ᵀ in fp32 for up to 8 rows; the missing rows are zero.
template <typename T, typename F>
void transpose(View<const T> src, int64_t rows, int64_t columns, MutableMatrixView dst, const F& widen) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < 8; ++i) dst.data[j * dst.ld + i] = i < rows ? widen(src.data[i * src.ld + j]) : 0.0f;
  }
}

void transpose8(MatrixView src, int64_t rows, MutableMatrixView dst) {
  transpose(src, rows, 8, dst, [](float value) { return value; });
}

void transpose16_bf16(Bf16View src, int64_t rows, MutableMatrixView dst) { transpose(src, rows, 16, dst, from_bf16); }

}  // namespace
}  // namespace lorasb

#include "cpu/fp32_vector_kernels.h"

namespace lorasb {

Kernels portable_kernels() { return common_kernels("portable"); }

}  // namespace lorasb
