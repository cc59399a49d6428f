// Names of torch's tensors, as the products and the ops take and return them.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

namespace lorasb {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorPair = std::tuple<Tensor, Tensor>;

}  // namespace lorasb
