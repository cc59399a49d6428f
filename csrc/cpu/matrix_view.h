// How matrices, element types and ranges are passed to kernels. Plain C++: the kernels include this and no torch.
//
// The views have no member functions: an inline function of a template could be compiled inside the target region of
// one instruction set and then be linked into the code of another.
#pragma once

#include <cstdint>

namespace lorasb {

// A row-major matrix: element [i, j] is data[i * ld + j]. `ld` is the leading dimension, counted in elements.
template <typename T>
struct View {
  T* data;
  int64_t ld;
};

using MatrixView = View<const float>;
using MutableMatrixView = View<float>;
using Bf16View = View<const uint16_t>;
using MutableBf16View = View<uint16_t>;

enum class Element : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t size_of(Element element) { return element == Element::f32 ? 4 : 2; }

// A row-major matrix whose element type is known at run time only.
struct DenseView {
  const void* data;
  Element element;
  int64_t ld;
};

// Rows or columns [begin, end).
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// For pieces that are too short for the hardware prefetcher.
inline void prefetch_bytes(const void* src, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(static_cast<const char*>(src) + line);
}

}  // namespace lorasb
