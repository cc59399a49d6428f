#include "ops/weight_gradient.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/dispatch.h"

namespace lorasb {
namespace {

constexpr int64_t kRowElements = 1 << 20;  // of G at a time, where it or a product is not kept: 4 MB
constexpr int64_t kRowStep = 6;            // rows of G that a tile has

const uint16_t* bits(const at::Tensor& x) {
  return reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>());
}

void check(const at::Tensor& dy, const at::Tensor& x, const std::optional<at::Tensor>& total) {
  TORCH_CHECK_VALUE(dy.dim() == 2 && x.dim() == 2 && dy.size(0) == x.size(0),
                    "expected dy [M, m] and x [M, n] of as many tokens, got ", dy.sizes(), " and ", x.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(dy.scalar_type()) && at::isFloatingType(x.scalar_type()),
                   "expected floating-point dy and x, got ", dy.scalar_type(), " and ", x.scalar_type());
  if (!total.has_value()) return;
  const auto dtype = total->scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, "expected an fp32 or fp64 sum, got ", dtype);
  TORCH_CHECK_VALUE(
      total->dim() == 2 && total->size(0) == dy.size(1) && total->size(1) == x.size(1) && total->is_contiguous(),
      "expected a sum [", dy.size(1), ", ", x.size(1), "] in one piece, got ", total->sizes());
}

// What both ways of adding up share: rows [low, high) of dyᵀ x into `target`, in fp32 (fp64).
struct Operands {
  at::Tensor dy, x;  // in the sum's dtype; undefined where pairs are multiplied
  at::Tensor left, right;
  int64_t m, n, pairs = 0;

  Operands(const at::Tensor& dy_, const at::Tensor& x_, at::ScalarType wide) : m(dy_.size(1)), n(x_.size(1)) {
    const bool halves = dy_.scalar_type() == at::kBFloat16 && x_.scalar_type() == at::kBFloat16;
    if (halves && wide == at::kFloat && kernels().outer_bf16 != nullptr && dy_.size(0) > 0) {
      arrange(dy_.contiguous(), x_.contiguous());
    } else {
      dy = dy_.to(wide);
      x = x_.to(wide);
    }
  }

  void arrange(const at::Tensor& dy_, const at::Tensor& x_) {
    const int64_t M = dy_.size(0), wide_panels = (n + kOuterColumns - 1) / kOuterColumns;
    pairs = (M + 1) / 2;
    left = at::empty({pairs, m, 2}, dy_.options());
    right = at::empty({wide_panels, pairs, kOuterColumns, 2}, x_.options());
    auto* l = reinterpret_cast<uint16_t*>(left.mutable_data_ptr<at::BFloat16>());
    auto* r = reinterpret_cast<uint16_t*>(right.mutable_data_ptr<at::BFloat16>());
    const uint16_t *from_dy = bits(dy_), *from_x = bits(x_);
    at::parallel_for(0, pairs, 16, [&](int64_t low, int64_t high) {
      for (int64_t p = low; p < high; ++p) {
        const bool whole = 2 * p + 1 < M;
        const uint16_t *a = from_dy + 2 * p * m, *b = from_x + 2 * p * n;
        for (int64_t i = 0; i < m; ++i) {
          l[(p * m + i) * 2] = a[i];
          l[(p * m + i) * 2 + 1] = whole ? a[m + i] : 0;
        }
        for (int64_t c = 0; c < wide_panels; ++c) {
          uint16_t* to = r + (c * pairs + p) * kOuterColumns * 2;
          const int64_t first = c * kOuterColumns, count = std::min<int64_t>(kOuterColumns, n - first);
          for (int64_t j = 0; j < kOuterColumns; ++j) {
            to[2 * j] = j < count ? b[first + j] : 0;
            to[2 * j + 1] = j < count && whole ? b[n + first + j] : 0;
          }
        }
      }
    });
  }

  void add(int64_t low, int64_t high, at::Tensor& target, bool fresh) const {
    if (!left.defined()) {
      if (dy.size(0) == 0) {
        if (fresh) target.zero_();
      } else if (fresh) {
        at::mm_out(target, dy.narrow(1, low, high - low).t(), x);
      } else {
        // A product of its own, rounded and then added, as autograd does; a part at a time, so that it stays in a
        // cache.
        const int64_t step = std::max<int64_t>(32, kRowElements / std::max<int64_t>(1, x.size(1)));
        for (int64_t from = low; from < high; from += step) {
          const int64_t count = std::min(step, high - from);
          target.narrow(0, from - low, count).add_(at::mm(dy.narrow(1, from, count).t(), x));
        }
      }
      return;
    }
    float* to = target.mutable_data_ptr<float>() - low * n;
    const int64_t groups = (high - low + kRowStep - 1) / kRowStep;
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      kernels().outer_bf16(reinterpret_cast<const uint16_t*>(left.const_data_ptr<at::BFloat16>()),
                           reinterpret_cast<const uint16_t*>(right.const_data_ptr<at::BFloat16>()), m, n, pairs,
                           low + begin * kRowStep, std::min(low + end * kRowStep, high), to, fresh);
    });
  }
};

struct Counts {
  double squares = 0.0;
  int64_t zeros = 0, bad = 0;
};

// Rows are added in their order, whatever the number of threads.
Counts pack_rows(const at::Tensor& part, int64_t low, at::Tensor& words, at::Tensor& nonzero) {
  const int64_t rows = part.size(0), n = part.size(1), width = words.size(1);
  const at::Tensor narrow = part.to(at::kFloat);
  const float* from = narrow.const_data_ptr<float>();
  auto* to = reinterpret_cast<uint32_t*>(words.mutable_data_ptr<int32_t>()) + low * width;
  auto* other = reinterpret_cast<uint32_t*>(nonzero.mutable_data_ptr<int32_t>()) + low * width;
  std::vector<Counts> found(rows);
  at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, n)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Counts& c = found[i];
      c.squares = kernels().pack_signs(from + i * n, n, to + i * width, other + i * width, &c.zeros, &c.bad);
    }
  });
  Counts total;
  for (const Counts& c : found) {
    total.squares += c.squares;
    total.zeros += c.zeros;
    total.bad += c.bad;
  }
  return total;
}

}  // namespace

void gradient_add(const at::Tensor& dy, const at::Tensor& x, at::Tensor& total, bool fresh) {
  const at::AutoDispatchBelowAutograd below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
  check(dy, x, total);
  Operands(dy, x, total.scalar_type()).add(0, total.size(0), total, fresh);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gradient_signs(const at::Tensor& dy, const at::Tensor& x,
                                                              const std::optional<at::Tensor>& total, bool fresh) {
  const at::AutoDispatchBelowAutograd below_autograd;
  const c10::impl::ExcludeDispatchKeyGuard without_autocast(c10::autocast_dispatch_keyset);
  check(dy, x, total);
  const auto wide = total.has_value()                ? total->scalar_type()
                    : x.scalar_type() == at::kDouble ? at::kDouble
                                                     : at::kFloat;
  const int64_t m = dy.size(1), n = x.size(1);
  const Operands operands(dy, x, wide);
  at::Tensor words = at::empty({m, (n + 31) / 32}, x.options().dtype(at::kInt)), nonzero = at::empty_like(words);
  const int64_t step = std::max<int64_t>(kRowStep, kRowElements / std::max<int64_t>(1, n) / kRowStep * kRowStep);
  at::Tensor room;
  if (!total.has_value()) room = at::empty({std::min(step, m), n}, x.options().dtype(wide));
  Counts counts;
  for (int64_t low = 0; low < m; low += step) {
    const int64_t rows = std::min(step, m - low);
    at::Tensor part = total.has_value() ? total->narrow(0, low, rows) : room.narrow(0, 0, rows);
    const bool nothing = total.has_value() && !fresh && dy.size(0) == 0;
    if (!nothing) operands.add(low, low + rows, part, fresh || !total.has_value());
    const Counts found = pack_rows(part, low, words, nonzero);
    counts.squares += found.squares;
    counts.zeros += found.zeros;
    counts.bad += found.bad;
  }
  at::Tensor told = at::empty({3}, x.options().dtype(at::kDouble));
  double* to = told.mutable_data_ptr<double>();
  to[0] = counts.squares;
  to[1] = static_cast<double>(counts.zeros);
  to[2] = static_cast<double>(counts.bad);
  return {words, nonzero, told};
}

}  // namespace lorasb
