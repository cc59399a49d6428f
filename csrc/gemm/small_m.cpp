#include "gemm/small_m.h"

#include <memory>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "gemm/bf16_gemm.h"

namespace lorasb {
namespace {

constexpr int64_t kWidth = 512;            // columns of dx at a time
constexpr int64_t kMaxBackwardTokens = 2;  // for more, the blocked product is faster

// x [M, n] in the order in which look-ups yield the elements of a row of W; rows of stream_stride(n).
Tensor arrange(const Packed& w, const Tensor& x) {
  Tensor streams = at::empty({x.size(0), stream_stride(w.columns)}, x.options());
  uint16_t* dst = mutable_bits(streams);
  at::parallel_for(0, x.size(0), grain(w.columns), [&](int64_t low, int64_t high) {
    for (int64_t i = low; i < high; ++i) {
      kernels().arrange_bf16(bits(x) + i * w.columns, w.columns, dst + i * streams.size(1));
    }
  });
  return streams;
}

// y [M, ..] = or += x [M, columns] D[d_rows]ᵀ for a contiguous D [.., columns].
void thin_product(Bf16View x, int64_t M, const uint16_t* d, int64_t columns, Range d_rows, bool accumulate,
                  MutableMatrixView y) {
  for (int64_t i = 0; i < M; i += kDirectRows) {
    const int64_t rows = std::min<int64_t>(kDirectRows, M - i);
    kernels().dense_dot_bf16({x.data + i * x.ld, x.ld}, rows, {d, columns}, columns, d_rows, accumulate,
                             {y.data + i * y.ld, y.ld});
  }
}

// Uninitialized, and longer, as `round_rows` loads full vectors, past the last sum.
std::unique_ptr<float[]> allocate_sums(int64_t count) { return std::unique_ptr<float[]>(new float[count + kBf16Nr]); }

// t [M, r] = dy B in fp32.
Tensor multiply_by_b(MatrixView dy, int64_t M, const Tensor& b, const at::TensorOptions& options) {
  const int64_t r = b.size(1);
  Tensor t = at::zeros({M, r}, options);
  if (r == 0) return t;
  add_row_parts(b.size(0), t,
                [&](Range rows, float* part) { kernels().dense_add_bf16(dy, M, {bits(b), r}, rows, {0, r}, part); });
  return t;
}

}  // namespace

bool small_m_supported(const Packed& w, const Tensor& x, bool backward) {
  const int64_t M = x.size(0), max_tokens = backward ? kMaxBackwardTokens : kernels().max_few_tokens;
  return kernels().dot_bf16 != nullptr && x.scalar_type() == at::kBFloat16 && M > 0 && M <= max_tokens && w.rows > 0 &&
         w.columns > 0 && w.whole_blocks();
}

TensorPair small_m_forward(const Packed& w, const Tensor& x, const Tensor& a, const Tensor& core, const Tensor& b,
                           const OptionalTensor& bias) {
  const int64_t M = x.size(0), m = w.rows, n = w.columns, r = a.size(0);
  const Tensor streams = arrange(w, x), a_rows = a.contiguous(), core_rows = core.contiguous(), b_rows = b.contiguous();
  Tensor u = at::empty({M, r}, x.options()), y = at::empty({M, m}, x.options());
  const auto sums = allocate_sums(M * std::max(m, r));
  const MutableMatrixView thin_sums{sums.get(), r}, y_sums{sums.get(), m};
  const std::unique_ptr<uint16_t[]> v(new uint16_t[M * r]);
  over_rows(r, n, 4, [&](int64_t low, int64_t high) {
    thin_product({bits(x), n}, M, bits(a_rows), n, {low, high}, false, thin_sums);
  });
  round_rows({sums.get(), r}, M, r, nullptr, {mutable_bits(u), r});
  thin_product({bits(u), r}, M, bits(core_rows), r, {0, r}, false, thin_sums);
  round_rows({sums.get(), r}, M, r, nullptr, {v.get(), r});
  const Tensor bias_row = bias.has_value() ? bias->contiguous() : Tensor();
  uint16_t* dst = mutable_bits(y);
  // Steps of 32 rows, full vectors of sums: only the last step loads past its sums, and masks what it loads there.
  over_rows(m, n, kBf16Nr, [&](int64_t low, int64_t high) {
    kernels().dot_bf16(w, bits(streams), M, {low, high}, y_sums);
    if (r > 0) thin_product({v.get(), r}, M, bits(b_rows), r, {low, high}, true, y_sums);
    round_rows({sums.get() + low, m}, M, high - low, bias.has_value() ? bits(bias_row) + low : nullptr, {dst + low, m});
  });
  return {y, u};
}

TensorPair small_m_backward(const Packed& w, const Tensor& dy, const Tensor& a, const Tensor& core, const Tensor& b,
                            bool need_dx) {
  const int64_t M = dy.size(0), m = w.rows, n = w.columns, r = a.size(0);
  const Tensor dy_fp32 = dy.to(at::kFloat), b_rows = b.contiguous(), a_rows = a.contiguous();
  const MatrixView dy_rows{dy_fp32.const_data_ptr<float>(), m};
  const Tensor t = multiply_by_b(dy_rows, M, b_rows, dy_fp32.options());
  Tensor dx = at::empty({need_dx ? M : 0, n}, dy.options());
  if (!need_dx) return {dx, t};
  const Tensor c = at::mm(t, core.to(at::kFloat));
  const MatrixView c_rows{c.const_data_ptr<float>(), r};
  auto* dst = reinterpret_cast<at::BFloat16*>(mutable_bits(dx));
  const int64_t width = std::max(w.block, kWidth / w.block * w.block);  // whole blocks
  at::parallel_for(0, ceil_div(n, width), grain(width * m), [&](int64_t begin, int64_t end) {
    std::vector<float> base(M * width), adapter(M * width);  // the base's even columns come first
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const Range columns{chunk * width, std::min((chunk + 1) * width, n)};
      const int64_t count = columns.size(), half = count / 2;
      std::fill(adapter.begin(), adapter.end(), 0.0f);
      kernels().dense_add_bf16(c_rows, M, {bits(a_rows), n}, {0, r}, columns, adapter.data());
      kernels().dot_transposed(w, dy_rows, M, columns, base.data());
      for (int64_t i = 0; i < M; ++i) {
        const float *even = base.data() + i * count, *odd = even + half, *added = adapter.data() + i * count;
        at::BFloat16* row = dst + i * n + columns.begin;
        for (int64_t j = 0; j < half; ++j) {
          row[2 * j] = even[j] + added[2 * j];
          row[2 * j + 1] = odd[j] + added[2 * j + 1];
        }
      }
    }
  });
  return {dx, t};
}

}  // namespace lorasb
