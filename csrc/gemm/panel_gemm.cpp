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

// Measured on two Zen 4 cores at 4096 x 4096.
constexpr int64_t kDirectTokens = 8;      // in fp32, and backward in bf16; for more, panels and the BLAS are faster
constexpr int64_t kPanelBytes = 4 << 20;  // of W at a time: stays in a last-level cache, and costs the BLAS 2%
constexpr int64_t kMinPanel = 512;        // rows or columns of a panel, however long they are
constexpr int64_t kDirectWidth = 512;     // columns of dx at a time

bool direct_dtype(const Tensor& x) { return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat; }

Tensor as_float(const Tensor& x) { return x.to(at::kFloat).contiguous(); }

// y += x Wᵀ by look-ups, added in fp32 and rounded once.
void direct_product(const Packed& w, const Tensor& x, Tensor& y) {
  const int64_t tokens = x.size(0), half = w.columns / 2, ld = half_stride(w.columns);
  const Tensor x_fp32 = as_float(x);
  Tensor split = at::empty({2, tokens, ld}, x_fp32.options());  // even columns of x, then odd ones
  float *even = split.mutable_data_ptr<float>(), *odd = even + tokens * ld;
  const float* src = x_fp32.const_data_ptr<float>();
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t j = 0; j < half; ++j) {
      even[i * ld + j] = src[i * w.columns + 2 * j];
      odd[i * ld + j] = src[i * w.columns + 2 * j + 1];
    }
  }
  Tensor sums = at::empty({tokens, w.rows}, x_fp32.options());
  float* dst = sums.mutable_data_ptr<float>();
  for (int64_t i = 0; i < tokens; i += kDirectRows) {
    const int64_t count = std::min<int64_t>(kDirectRows, tokens - i);
    over_rows(w.rows, w.columns, 16, [&](int64_t low, int64_t high) {
      kernels().dot(w, {even + i * ld, odd + i * ld, ld}, count, {low, high}, {dst + i * w.rows, w.rows});
    });
  }
  y.add_(sums);
}

// dx += dy W by look-ups; a task has its own columns, so that it sums over all rows of W in order.
void direct_product_transposed(const Packed& w, const Tensor& dy, Tensor& dx) {
  const int64_t tokens = dy.size(0);
  const Tensor dy_fp32 = as_float(dy);
  Tensor result = at::empty({tokens, w.columns}, dy_fp32.options());
  const float* src = dy_fp32.const_data_ptr<float>();
  float* dst = result.mutable_data_ptr<float>();
  const int64_t width = std::max(w.block, kDirectWidth / w.block * w.block);  // whole blocks
  at::parallel_for(0, ceil_div(w.columns, width), grain(width * w.rows), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(kDirectRows * width);
    for (int64_t c = begin; c < end; ++c) {
      const Range columns{c * width, std::min((c + 1) * width, w.columns)};
      const int64_t count = columns.size(), half = count / 2;
      for (int64_t i = 0; i < tokens; i += kDirectRows) {
        const int64_t rows = std::min<int64_t>(kDirectRows, tokens - i);
        kernels().dot_transposed(w, {src + i * w.rows, w.rows}, rows, columns, sums.data());
        for (int64_t t = 0; t < rows; ++t) {  // even and odd columns in order again
          float* row = dst + (i + t) * w.columns + columns.begin;
          const float *even = sums.data() + t * count, *odd = even + half;
          for (int64_t j = 0; j < half; ++j) {
            row[2 * j] = even[j];
            row[2 * j + 1] = odd[j];
          }
        }
      }
    }
  });
  dx.add_(result);
}

// Scratch memory in x's dtype, or in fp32 if W cannot be decoded to that. It is in huge pages: a panel's page layout
// decides how fast the BLAS reads it.
Tensor panel_scratch(const Tensor& x, int64_t size) {
  const auto dtype = direct_dtype(x) ? x.scalar_type() : at::kFloat;
  void* memory = thread_scratch(size * at::elementSize(dtype), Scratch::weight_block);
  return at::from_blob(memory, {size}, x.options().dtype(dtype));
}

// y += x Wᵀ, or x W if `plain`, by the BLAS: some rows, or columns, of W at a time, decoded into the same memory.
void blas_product(const Packed& w, const Tensor& x, Tensor& y, bool plain) {
  const int64_t length = x.size(1), available = y.size(1);
  const int64_t wanted = kPanelBytes / std::max<int64_t>(1, length * x.element_size());
  const int64_t size = std::min(available, std::max<int64_t>(kMinPanel, wanted / 64 * 64));
  const Tensor scratch = panel_scratch(x, size * length);
  for (int64_t low = 0; low < available; low += size) {
    const Range part{low, std::min(low + size, available)}, whole{0, length}, rows = plain ? whole : part;
    Tensor panel = scratch.narrow(0, 0, part.size() * length).view({rows.size(), -1});
    decode_panel(w, rows, plain ? part : whole, panel);
    const Tensor right = panel.to(x.scalar_type());
    y.narrow(1, low, part.size()).addmm_(x, plain ? right : right.t());
  }
}

}  // namespace

bool takes_fp32_gemm(const Packed& w, at::ScalarType dtype, int64_t M) {
  const bool widened = dtype == at::kFloat || dtype == at::kHalf;  // fp16 is computed in fp32 on every processor
  if (!widened && dtype != at::kBFloat16) return false;
  if (M <= kDirectTokens && w.whole_blocks() && dtype != at::kHalf) return false;
  return widened ? kernels().fp32_gemm_beats_blas : !kernels().multiplies_bf16();
}

void panel_gemm_add(const Packed& w, const Tensor& x, Tensor& y, bool plain) {
  const int64_t M = x.size(0);
  if (M == 0 || w.rows == 0 || w.columns == 0) return;
  if (plain && bf16_gemm_supported(w, x.scalar_type(), M)) return bf16_gemm_add(w, x, y);
  if (!direct_dtype(x) || M > kDirectTokens || !w.whole_blocks()) return blas_product(w, x, y, plain);
  (plain ? direct_product_transposed : direct_product)(w, x, y);
}

Tensor base_and_adapter(const Packed& w, const Tensor& x, const Tensor& v, const Tensor& factor,
                        const OptionalTensor& bias, bool plain) {
  if (bf16_gemm_supported(w, x.scalar_type(), x.size(0))) return bf16_gemm(w, x, v, factor, bias, plain);
  const Tensor right = plain ? factor : factor.t();
  Tensor y = bias.has_value() ? at::addmm(*bias, v, right) : at::mm(v, right);
  panel_gemm_add(w, x, y, plain);
  return y;
}

}  // namespace lorasb
