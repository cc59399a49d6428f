// How work is cut into tasks: at::parallel_for runs on torch's own threads.
//
// Bits do not depend on the number of threads as long as every element of a result is summed by one task, in an order
// that the shape alone decides. Where a reduction itself is cut, it is cut into parts of a fixed length whose sums are
// added in order (add_row_parts).
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/matrix_view.h"

namespace lorasb {

constexpr int64_t kTaskElements = int64_t{1} << 15;  // elements of a weight that make a task

constexpr int64_t kPartRows = 256;  // rows of a matrix that add_row_parts sums separately

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items per task, where each item is `per_item` elements of a weight.
inline int64_t grain(int64_t per_item) { return std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, per_item)); }

// Calls task(low, high) over the rows of W [rows, columns], in whole groups of `step`.
template <typename F>
void over_rows(int64_t rows, int64_t columns, int64_t step, const F& task) {
  at::parallel_for(0, ceil_div(rows, step), grain(step * columns),
                   [&](int64_t low, int64_t high) { task(low * step, std::min(high * step, rows)); });
}

// sums [tokens, width] += a sum over `rows` rows of a matrix. add_part(part, out) adds the rows of one part to `out`
// [tokens, width], which is zero. Used where a result is too narrow to give each thread its own columns.
template <typename F>
void add_row_parts(int64_t rows, at::Tensor& sums, const F& add_part) {
  const int64_t parts = ceil_div(rows, kPartRows), tokens = sums.size(0), width = sums.size(1);
  at::Tensor partial = at::zeros({parts, tokens, width}, sums.options());
  float* out = partial.mutable_data_ptr<float>();
  at::parallel_for(0, parts, grain(kPartRows * width), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      add_part(Range{p * kPartRows, std::min((p + 1) * kPartRows, rows)}, out + p * tokens * width);
    }
  });
  for (int64_t p = 0; p < parts; ++p) sums.add_(partial[p]);  // one after the other: this is the order of the sum
}

inline const uint16_t* bits(const at::Tensor& x) {
  return reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>());
}

inline uint16_t* mutable_bits(at::Tensor& x) { return reinterpret_cast<uint16_t*>(x.mutable_data_ptr<at::BFloat16>()); }

}  // namespace lorasb
