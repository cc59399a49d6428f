#include "gemm/panel_gemm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch_memory.h"
#include "gemm/bf16_gemm.h"
#include "gemm/quantized_weight.h"

namespace lorasb {
namespace {

// Measured on two Zen 4 cores at 4096 x 4096; beyond these numbers of tokens panels and the BLAS are faster.
constexpr int64_t kDirectTokens = 8;      // fp32: look-ups straight into products
constexpr int64_t kTransposedTokens = 8;  // backward, fp32 and bf16
constexpr int64_t kPanelBytes = 4 << 20;  // of W at a time: stays in a last-level cache, and the BLAS loses 2%
constexpr int64_t kDirectWidth = 512;     // columns of dx at a time

bool direct_dtype(const at::Tensor& x) { return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat; }

at::Tensor as_float(const at::Tensor& x) { return x.to(at::kFloat).contiguous(); }

void dot_products(const Packed& w, const at::Tensor& x, at::Tensor& y) {
  const int64_t rows = x.size(0), half = w.columns / 2;
  const at::Tensor wide = as_float(x);
  const int64_t apart = half_stride(w.columns);
  at::Tensor parts = at::empty({2, rows, apart}, wide.options());
  float *even = parts.mutable_data_ptr<float>(), *odd = even + rows * apart;
  const float* from = wide.const_data_ptr<float>();
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < half; ++j) {
      even[i * apart + j] = from[i * w.columns + 2 * j];
      odd[i * apart + j] = from[i * w.columns + 2 * j + 1];
    }
  }
  at::Tensor found = at::empty({rows, w.rows}, wide.options());
  float* to = found.mutable_data_ptr<float>();
  for (int64_t i = 0; i < rows; i += kDirectRows) {
    const int64_t count = std::min<int64_t>(kDirectRows, rows - i);
    over_rows(w.rows, w.columns, 16, [&](int64_t low, int64_t high) {
      kernels().dot(w, even + i * apart, odd + i * apart, count, low, high, to + i * w.rows, w.rows);
    });
  }
  y.add_(found);
}

// A panel of W in x's dtype; `room` is used again for the next one.
at::Tensor panel(const Packed& w, int64_t low, int64_t high, int64_t first, int64_t width, at::Tensor& room,
                 at::ScalarType dtype) {
  at::Tensor part = room.narrow(0, 0, (high - low) * width).view({high - low, width});
  decode_panel(w, low, high, first, width, part);
  return part.to(dtype);
}

// How a panel's pages lie decides what the BLAS makes of it.
at::Tensor panel_room(const at::Tensor& like, int64_t size) {
  const auto dtype = direct_dtype(like) ? like.scalar_type() : at::kFloat;
  return at::from_blob(kept_room(size * at::elementSize(dtype)), {size}, like.options().dtype(dtype));
}

int64_t panel_length(const at::Tensor& like, int64_t across, int64_t along) {
  const int64_t wanted = kPanelBytes / std::max<int64_t>(1, across * like.element_size());
  return std::min(along, std::max<int64_t>(512, wanted / 64 * 64));
}

void panels(const Packed& w, const at::Tensor& x, at::Tensor& y) {
  const int64_t length = panel_length(x, w.columns, w.rows);
  at::Tensor room = panel_room(x, length * w.columns);
  for (int64_t low = 0; low < w.rows; low += length) {
    const int64_t high = std::min(low + length, w.rows);
    const at::Tensor part = panel(w, low, high, 0, w.columns, room, x.scalar_type());
    y.narrow(1, low, high - low).addmm_(x, part.t());
  }
}

void dot_products_transposed(const Packed& w, const at::Tensor& dy, at::Tensor& dx) {
  const int64_t rows = dy.size(0);
  const at::Tensor wide = as_float(dy);
  at::Tensor found = at::empty({rows, w.columns}, wide.options());
  const float* from = wide.const_data_ptr<float>();
  float* to = found.mutable_data_ptr<float>();
  const int64_t width = std::max(w.block, kDirectWidth / w.block * w.block);
  const int64_t chunks = (w.columns + width - 1) / width;
  at::parallel_for(0, chunks, grain(width * w.rows), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(kDirectRows * width);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = c * width, count = std::min(width, w.columns - first), half = count / 2;
      for (int64_t i = 0; i < rows; i += kDirectRows) {
        const int64_t taken = std::min<int64_t>(kDirectRows, rows - i);
        kernels().dot_transposed(w, from + i * w.rows, w.rows, taken, first, count, sums.data());
        for (int64_t t = 0; t < taken; ++t) {
          float* target = to + (i + t) * w.columns + first;
          const float* source = sums.data() + t * count;
          for (int64_t j = 0; j < half; ++j) {
            target[2 * j] = source[j];
            target[2 * j + 1] = source[half + j];
          }
        }
      }
    }
  });
  dx.add_(found);
}

void panels_transposed(const Packed& w, const at::Tensor& dy, at::Tensor& dx) {
  const int64_t length = panel_length(dy, w.rows, w.columns);
  at::Tensor room = panel_room(dy, length * w.rows);
  for (int64_t first = 0; first < w.columns; first += length) {
    const int64_t width = std::min(length, w.columns - first);
    const at::Tensor part = panel(w, 0, w.rows, first, width, room, dy.scalar_type());
    dx.narrow(1, first, width).addmm_(dy, part);
  }
}

}  // namespace

bool takes_panels(const Packed& w, at::ScalarType dtype, int64_t M) {
  const bool single = dtype == at::kFloat || dtype == at::kHalf;
  if (!single && dtype != at::kBFloat16) return false;
  if (M <= kDirectTokens && w.whole_blocks() && dtype != at::kHalf) return false;
  return single ? kernels().gemm_beats_blas : kernels().strips == nullptr;
}

void add_product(const Packed& w, const at::Tensor& x, at::Tensor& y) {
  const int64_t M = x.size(0);
  if (M == 0 || w.rows == 0 || w.columns == 0) return;
  if (direct_dtype(x) && M <= kDirectTokens && w.whole_blocks()) {
    dot_products(w, x, y);
  } else {
    panels(w, x, y);
  }
}

void add_product_transposed(const Packed& w, const at::Tensor& dy, at::Tensor& dx) {
  const int64_t M = dy.size(0);
  if (M == 0 || w.rows == 0 || w.columns == 0) return;
  if (takes_strips(w, dy.scalar_type(), M)) {
    add_strips_product_transposed(w, dy, dx);
  } else if (direct_dtype(dy) && M <= kTransposedTokens && w.whole_blocks()) {
    dot_products_transposed(w, dy, dx);
  } else {
    panels_transposed(w, dy, dx);
  }
}

}  // namespace lorasb
