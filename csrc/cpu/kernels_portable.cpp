// C++ alone, for any processor; the compiler makes vectors of the loops where it can. Conversions are those of
// vector_kernels.h, which needs V first: hence the definitions after it.
#include "cpu/kernel_table.h"

namespace lorasb {
namespace {

struct V {
  static constexpr int width = 8;
  static constexpr int micro_rows = 4;
  struct reg {
    float lane[width];
  };
  using table = const float*;

  static table load_table(const float* values) { return values; }
  static reg set1(float value) {
    reg result;
    for (float& lane : result.lane) lane = value;
    return result;
  }
  static reg zero() { return set1(0.0f); }
  static reg load(const float* src) {
    reg result;
    for (int i = 0; i < width; ++i) result.lane[i] = src[i];
    return result;
  }
  static void store(float* dst, const reg& value) {
    for (int i = 0; i < width; ++i) dst[i] = value.lane[i];
  }
  static reg mul(const reg& a, const reg& b) {
    reg result;
    for (int i = 0; i < width; ++i) result.lane[i] = a.lane[i] * b.lane[i];
    return result;
  }
  static reg add(const reg& a, const reg& b) {
    reg result;
    for (int i = 0; i < width; ++i) result.lane[i] = a.lane[i] + b.lane[i];
    return result;
  }
  // Two roundings: without the instruction, std::fma is a call of many cycles for each lane.
  static reg fma(const reg& a, const reg& b, const reg& c) { return add(mul(a, b), c); }
  // The tree by which AVX2 sums its eight lanes.
  static float sum(const reg& a) {
    return ((a.lane[0] + a.lane[4]) + (a.lane[2] + a.lane[6])) + ((a.lane[1] + a.lane[5]) + (a.lane[3] + a.lane[7]));
  }
  static void look_up(const uint8_t* bytes, table values, reg& high, reg& low) {
    for (int i = 0; i < width; ++i) {
      high.lane[i] = values[bytes[i] >> 4];
      low.lane[i] = values[bytes[i] & 15];
    }
  }
  static void interleave_f32(const reg& high, const reg& low, float* out);
  static void interleave_bf16(const reg& high, const reg& low, uint16_t* out);
  static void interleave_f16(const reg& high, const reg& low, uint16_t* out);
  static reg round_bf16(const reg& a);
  static reg round_f16(const reg& a);
  static reg load_bf16(const uint16_t* src);
  static reg load_f16(const uint16_t* src);
  static void store_bf16(uint16_t* dst, const reg& a);
  static void store_f16(uint16_t* dst, const reg& a);
  static void transpose8(MatrixView src, int64_t rows, MutableMatrixView dst) {
    for (int64_t j = 0; j < 8; ++j) {
      for (int64_t i = 0; i < 8; ++i) dst.data[j * dst.ld + i] = i < rows ? src.data[i * src.ld + j] : 0.0f;
    }
  }
  static void transpose16_bf16(Bf16View src, int64_t rows, MutableMatrixView dst);
};

}  // namespace
}  // namespace lorasb

// clang-format off
#include "cpu/vector_kernels.h"
#include "cpu/fp32_vector_kernels.h"
// clang-format on

namespace lorasb {
namespace {

void V::interleave_f32(const reg& high, const reg& low, float* out) {
  for (int i = 0; i < width; ++i) {
    out[2 * i] = high.lane[i];
    out[2 * i + 1] = low.lane[i];
  }
}

void V::interleave_bf16(const reg& high, const reg& low, uint16_t* out) {
  for (int i = 0; i < width; ++i) {
    out[2 * i] = to_bf16(high.lane[i]);
    out[2 * i + 1] = to_bf16(low.lane[i]);
  }
}

void V::interleave_f16(const reg& high, const reg& low, uint16_t* out) {
  for (int i = 0; i < width; ++i) {
    out[2 * i] = to_f16(high.lane[i]);
    out[2 * i + 1] = to_f16(low.lane[i]);
  }
}

V::reg V::round_bf16(const reg& a) {
  reg result;
  for (int i = 0; i < width; ++i) result.lane[i] = from_bf16(to_bf16(a.lane[i]));
  return result;
}

V::reg V::round_f16(const reg& a) {
  reg result;
  for (int i = 0; i < width; ++i) result.lane[i] = from_f16(to_f16(a.lane[i]));
  return result;
}

V::reg V::load_bf16(const uint16_t* src) {
  reg result;
  for (int i = 0; i < width; ++i) result.lane[i] = from_bf16(src[i]);
  return result;
}

void V::transpose16_bf16(Bf16View src, int64_t rows, MutableMatrixView dst) {
  for (int64_t j = 0; j < 16; ++j) {
    for (int64_t i = 0; i < 8; ++i) dst.data[j * dst.ld + i] = i < rows ? from_bf16(src.data[i * src.ld + j]) : 0.0f;
  }
}

V::reg V::load_f16(const uint16_t* src) {
  reg result;
  for (int i = 0; i < width; ++i) result.lane[i] = from_f16(src[i]);
  return result;
}

void V::store_bf16(uint16_t* dst, const reg& a) {
  for (int i = 0; i < width; ++i) dst[i] = to_bf16(a.lane[i]);
}

void V::store_f16(uint16_t* dst, const reg& a) {
  for (int i = 0; i < width; ++i) dst[i] = to_f16(a.lane[i]);
}

}  // namespace

const Kernels& portable_kernels() {
  static const Kernels kernels = common_kernels("portable");
  return kernels;
}

}  // namespace lorasb
