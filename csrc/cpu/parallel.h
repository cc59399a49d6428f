// How work is cut into tasks: at::parallel_for runs on torch's own threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/packed_weight.h"

namespace lorasb {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items a task, where each stands for so many elements of a weight.
inline int64_t grain(int64_t per_item) { return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, per_item)); }

// Calls task(low, high) over the rows of W, in whole groups of `step`.
template <typename F>
void over_rows(int64_t rows, int64_t columns, int64_t step, const F& task) {
  at::parallel_for(0, ceil_div(rows, step), grain(step * columns),
                   [&](int64_t low, int64_t high) { task(low * step, std::min(high * step, rows)); });
}

inline const uint16_t* bits(const at::Tensor& x) {
  return reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>());
}

inline uint16_t* mutable_bits(at::Tensor& x) { return reinterpret_cast<uint16_t*>(x.mutable_data_ptr<at::BFloat16>()); }

}  // namespace lorasb
