#include "gemm/small_m.h"

#include <memory>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace lorasb {
namespace {

constexpr int64_t kWidth = 512;       // columns of dx at a time
constexpr int64_t kPartRows = 256;    // rows of B whose part of t is added on its own, in order
constexpr int64_t kBackwardRows = 2;  // of dy: for more, strips are faster

// x [M, n] in bf16 in the order in which look-ups yield the elements of a row of W; rows of stream_stride(n).
at::Tensor arranged(const Packed& w, const at::Tensor& x) {
  at::Tensor streams = at::empty({x.size(0), stream_stride(w.columns)}, x.options());
  uint16_t* target = mutable_bits(streams);
  at::parallel_for(0, x.size(0), grain(w.columns), [&](int64_t low, int64_t high) {
    for (int64_t i = low; i < high; ++i) {
      kernels().arrange_bf16(bits(x) + i * w.columns, w.columns, target + i * streams.size(1));
    }
  });
  return streams;
}

// y [M, stride of y] (+)= x [M, n] D[low:high]ᵀ for a dense D.
void thin_rows(const uint16_t* x, int64_t M, const uint16_t* d, int64_t n, int64_t low, int64_t high, float* y,
               int64_t stride, bool add) {
  for (int64_t i = 0; i < M; i += kDirectRows) {
    const int64_t rows = std::min<int64_t>(kDirectRows, M - i);
    kernels().dense_dot_bf16(x + i * n, n, rows, d, n, low, high, y + i * stride, stride, add);
  }
}

// Sums [M, columns] + bias in bf16.
void round_rows(const float* sums, int64_t stride, int64_t M, int64_t columns, const uint16_t* bias, uint16_t* y,
                int64_t y_stride) {
  for (int64_t j = 0; j < columns; j += kStripLanes) {
    kernels().strips->finish(sums + j, stride, M, columns - j, false, bias == nullptr ? nullptr : bias + j, false,
                             y + j, y_stride);
  }
}

// Memory for so many sums, and for what a vector reads beyond the last.
std::unique_ptr<float[]> room_for(int64_t count) { return std::unique_ptr<float[]>(new float[count + kStripLanes]); }

}  // namespace

bool takes_few_tokens(const Packed& w, const at::Tensor& x, bool backward) {
  const int64_t M = x.size(0);
  return kernels().dot_bf16 != nullptr && x.scalar_type() == at::kBFloat16 && M > 0 &&
         M <= (backward ? kBackwardRows : kernels().few_tokens) && w.rows > 0 && w.columns > 0 && w.whole_blocks();
}

std::tuple<at::Tensor, at::Tensor> few_tokens(const Packed& w, const at::Tensor& x, const at::Tensor& a,
                                              const at::Tensor& core, const at::Tensor& b,
                                              const std::optional<at::Tensor>& bias) {
  const int64_t M = x.size(0), m = w.rows, n = w.columns, r = a.size(0);
  const at::Tensor streams = arranged(w, x), first = a.contiguous(), middle = core.contiguous(), last = b.contiguous();
  at::Tensor u = at::empty({M, r}, x.options()), y = at::empty({M, m}, x.options());
  const auto sums = room_for(M * std::max(m, r));
  const std::unique_ptr<uint16_t[]> v(new uint16_t[M * r]);
  over_rows(r, n, 4,
            [&](int64_t low, int64_t high) { thin_rows(bits(x), M, bits(first), n, low, high, sums.get(), r, false); });
  round_rows(sums.get(), r, M, r, nullptr, mutable_bits(u), r);
  thin_rows(bits(u), M, bits(middle), r, 0, r, sums.get(), r, false);
  round_rows(sums.get(), r, M, r, nullptr, v.get(), r);
  const at::Tensor offset = bias.has_value() ? bias->contiguous() : at::Tensor();
  uint16_t* to = mutable_bits(y);
  over_rows(m, n, kStripLanes, [&](int64_t low, int64_t high) {
    kernels().dot_bf16(w, bits(streams), M, low, high, sums.get(), m);
    if (r > 0) thin_rows(v.get(), M, bits(last), r, low, high, sums.get(), m, true);
    round_rows(sums.get() + low, m, M, high - low, bias.has_value() ? bits(offset) + low : nullptr, to + low, m);
  });
  return {y, u};
}

std::tuple<at::Tensor, at::Tensor> few_tokens_backward(const Packed& w, const at::Tensor& dy, const at::Tensor& a,
                                                       const at::Tensor& core, const at::Tensor& b, bool need_dx) {
  const int64_t M = dy.size(0), m = w.rows, n = w.columns, r = a.size(0);
  const at::Tensor wide = dy.to(at::kFloat), factor = b.contiguous(), other = a.contiguous();
  const float* from = wide.const_data_ptr<float>();
  at::Tensor t = at::zeros({M, r}, wide.options());
  if (r > 0) {
    const int64_t parts = (m + kPartRows - 1) / kPartRows;
    at::Tensor room = at::zeros({parts, M, r}, wide.options());
    float* to = room.mutable_data_ptr<float>();
    at::parallel_for(0, parts, grain(kPartRows * r), [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const int64_t low = p * kPartRows, high = std::min(low + kPartRows, m);
        kernels().dense_add_bf16(from, m, M, bits(factor), r, low, high, 0, r, to + p * M * r);
      }
    });
    for (int64_t p = 0; p < parts; ++p) t.add_(room[p]);
  }
  at::Tensor dx = at::empty({need_dx ? M : 0, n}, dy.options());
  if (!need_dx) return {dx, t};
  const at::Tensor c = at::mm(t, core.to(at::kFloat));
  uint16_t* target = mutable_bits(dx);
  const int64_t width = std::max(w.block, kWidth / w.block * w.block), chunks = (n + width - 1) / width;
  at::parallel_for(0, chunks, grain(width * m), [&](int64_t begin, int64_t end) {
    std::vector<float> apart(M * width), natural(M * width);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * width, count = std::min(width, n - first), half = count / 2;
      std::fill(natural.begin(), natural.end(), 0.0f);
      kernels().dense_add_bf16(c.const_data_ptr<float>(), r, M, bits(other), n, 0, r, first, count, natural.data());
      kernels().dot_transposed(w, from, m, M, first, count, apart.data());
      for (int64_t i = 0; i < M; ++i) {
        const float *even = apart.data() + i * count, *odd = even + half, *rest = natural.data() + i * count;
        at::BFloat16* to = reinterpret_cast<at::BFloat16*>(target) + i * n + first;
        for (int64_t j = 0; j < half; ++j) {
          to[2 * j] = even[j] + rest[2 * j];
          to[2 * j + 1] = odd[j] + rest[2 * j + 1];
        }
      }
    }
  });
  return {dx, t};
}

}  // namespace lorasb
