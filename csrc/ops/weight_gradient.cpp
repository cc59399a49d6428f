#include "ops/weight_gradient.h"

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "ops/operands.h"

namespace lorasb {
namespace {

// Elements of G [m, n] that are computed at a time if G, or a product to add to it, is not stored: 4 MB in fp32.
constexpr int64_t kChunkElements = 1 << 20;
constexpr int64_t kPackedGrain = 16;  // pairs of tokens that a task packs

void check(const Tensor& dy, const Tensor& x, const OptionalTensor& total) {
  TORCH_CHECK_VALUE(dy.dim() == 2 && x.dim() == 2 && dy.size(0) == x.size(0),
                    "expected dy [M, m] and x [M, n] with the same M, got ", dy.sizes(), " and ", x.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(dy.scalar_type()) && at::isFloatingType(x.scalar_type()),
                   "expected floating-point dy and x, got ", dy.scalar_type(), " and ", x.scalar_type());
  if (!total.has_value()) return;
  const auto dtype = total->scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "expected an fp32 or fp64 sum, got ", dtype);
  TORCH_CHECK_VALUE(
      total->dim() == 2 && total->size(0) == dy.size(1) && total->size(1) == x.size(1) && total->is_contiguous(),
      "expected a sum [", dy.size(1), ", ", x.size(1), "], contiguous, got ", total->sizes());
}

// Rows of G = dyᵀ x in fp32 or fp64, in one of two ways:
//   bf16, where the processor multiplies it   outer products of pairs of tokens (Kernels::outer_bf16)
//   otherwise                                 the BLAS, in the dtype of the sum
class WeightGradient {
 public:
  WeightGradient(const Tensor& dy, const Tensor& x, at::ScalarType sum_dtype) : m_(dy.size(1)), n_(x.size(1)) {
    const bool bf16 = dy.scalar_type() == at::kBFloat16 && x.scalar_type() == at::kBFloat16;
    if (bf16 && sum_dtype == at::kFloat && kernels().outer_bf16 != nullptr && dy.size(0) > 0) {
      pack(dy.contiguous(), x.contiguous());
    } else {
      dy_ = dy.to(sum_dtype);
      x_ = x.to(sum_dtype);
    }
  }

  // target [rows.size(), n] = or += G[rows]. Each element is one chain of sums over pairs of tokens, or a product of
  // the BLAS, no matter where a task's rows begin.
  void add(Range rows, Tensor& target, bool overwrite) const {
    if (!left_.defined()) return add_by_blas(rows, target, overwrite);
    const OuterOperands operands{bits(left_), bits(right_), m_, n_, pairs_};
    float* total = target.mutable_data_ptr<float>() - rows.begin * n_;  // where row 0 of G would be
    at::parallel_for(0, ceil_div(rows.size(), kOuterRows), 1, [&](int64_t begin, int64_t end) {
      const Range part{rows.begin + begin * kOuterRows, std::min(rows.begin + end * kOuterRows, rows.end)};
      kernels().outer_bf16(operands, part, overwrite, total);
    });
  }

 private:
  // Packs pairs of tokens side by side: left [pairs, m, 2] and right [n / 64][pairs, 64, 2] (OuterOperands).
  void pack(const Tensor& dy, const Tensor& x) {
    const int64_t tokens = dy.size(0), panels = ceil_div(n_, kOuterColumns);
    pairs_ = ceil_div(tokens, 2);
    left_ = at::empty({pairs_, m_, 2}, dy.options());
    right_ = at::empty({panels, pairs_, kOuterColumns, 2}, x.options());
    uint16_t *left = mutable_bits(left_), *right = mutable_bits(right_);
    at::parallel_for(0, pairs_, kPackedGrain, [&](int64_t low, int64_t high) {
      for (int64_t p = low; p < high; ++p) {
        const bool whole = 2 * p + 1 < tokens;  // the last pair may be one token and zeros
        pack_pair(bits(dy) + 2 * p * m_, m_, m_, whole, left + p * m_ * 2);
        for (int64_t c = 0; c < panels; ++c) {
          const int64_t first = c * kOuterColumns, count = std::min<int64_t>(kOuterColumns, n_ - first);
          uint16_t* dst = right + (c * pairs_ + p) * kOuterColumns * 2;
          pack_pair(bits(x) + 2 * p * n_ + first, n_, count, whole, dst);
          std::fill(dst + 2 * count, dst + 2 * kOuterColumns, 0);
        }
      }
    });
  }

  static void pack_pair(const uint16_t* row, int64_t ld, int64_t count, bool whole, uint16_t* dst) {
    for (int64_t j = 0; j < count; ++j) {
      dst[2 * j] = row[j];
      dst[2 * j + 1] = whole ? row[ld + j] : 0;
    }
  }

  void add_by_blas(Range rows, Tensor& target, bool overwrite) const {
    if (dy_.size(0) == 0) {
      if (overwrite) target.zero_();
    } else if (overwrite) {
      at::mm_out(target, dy_.narrow(1, rows.begin, rows.size()).t(), x_);
    } else {
      // A separate product, rounded and then added, as autograd does: beta = 1 would round once on some BLAS. A part
      // at a time, so that it stays in cache.
      const int64_t step = std::max<int64_t>(32, kChunkElements / std::max<int64_t>(1, n_));
      for (int64_t low = rows.begin; low < rows.end; low += step) {
        const int64_t count = std::min(step, rows.end - low);
        target.narrow(0, low - rows.begin, count).add_(at::mm(dy_.narrow(1, low, count).t(), x_));
      }
    }
  }

  Tensor dy_, x_;        // in the sum's dtype; undefined where pairs are multiplied
  Tensor left_, right_;  // packed pairs; undefined where the BLAS multiplies
  int64_t m_, n_, pairs_ = 0;
};

// Signs of rows of G from `low` on. Each row has its own counts, which are added in the order of rows, whatever the
// number of threads.
SignCounts pack_rows(const Tensor& rows, int64_t low, Tensor& words, Tensor& nonzero) {
  const int64_t count = rows.size(0), n = rows.size(1), width = words.size(1);
  const Tensor rows_fp32 = rows.to(at::kFloat);
  const float* src = rows_fp32.const_data_ptr<float>();
  auto* positive_bits = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>()) + low * width;
  auto* nonzero_bits = reinterpret_cast<uint32_t*>(nonzero.mutable_data_ptr<int32_t>()) + low * width;
  std::vector<SignCounts> row_counts(count);
  at::parallel_for(0, count, grain(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      row_counts[i] = kernels().pack_signs(src + i * n, n, positive_bits + i * width, nonzero_bits + i * width);
    }
  });
  SignCounts total;
  for (const SignCounts& row : row_counts) total.add(row);
  return total;
}

}  // namespace

void gradient_add(const Tensor& dy, const Tensor& x, Tensor& total, bool fresh) {
  const BelowAutograd below_autograd;
  check(dy, x, total);
  WeightGradient(dy, x, total.scalar_type()).add({0, total.size(0)}, total, fresh);
}

std::tuple<Tensor, Tensor, Tensor> gradient_signs(const Tensor& dy, const Tensor& x, const OptionalTensor& total,
                                                  bool fresh) {
  const BelowAutograd below_autograd;
  check(dy, x, total);
  const auto sum_dtype = total.has_value()                ? total->scalar_type()
                         : x.scalar_type() == at::kDouble ? at::kDouble
                                                          : at::kFloat;
  const int64_t m = dy.size(1), n = x.size(1);
  const WeightGradient gradient(dy, x, sum_dtype);
  Tensor words = at::empty({m, ceil_div(n, 32)}, x.options().dtype(at::kInt)), nonzero = at::empty_like(words);
  const int64_t step =
      std::max<int64_t>(kOuterRows, kChunkElements / std::max<int64_t>(1, n) / kOuterRows * kOuterRows);
  Tensor scratch;
  if (!total.has_value()) scratch = at::empty({std::min(step, m), n}, x.options().dtype(sum_dtype));
  const bool unchanged = total.has_value() && !fresh && dy.size(0) == 0;
  SignCounts counts;
  for (int64_t low = 0; low < m; low += step) {
    const int64_t rows = std::min(step, m - low);
    Tensor part = total.has_value() ? total->narrow(0, low, rows) : scratch.narrow(0, 0, rows);
    if (!unchanged) gradient.add({low, low + rows}, part, fresh || !total.has_value());
    counts.add(pack_rows(part, low, words, nonzero));
  }
  const std::array<double, 3> statistics{counts.squares, static_cast<double>(counts.zeros),
                                         static_cast<double>(counts.not_finite)};
  return {words, nonzero, at::tensor(at::ArrayRef<double>(statistics), at::kDouble)};
}

}  // namespace lorasb
