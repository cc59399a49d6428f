// Dropout of the adapter's input, drawn from a seed.
#pragma once

#include <ATen/CPUGeneratorImpl.h>

#include "gemm/tensors.h"

namespace lorasb {

struct Dropout {
  double probability = 0.0;
  OptionalTensor seed;  // none: nothing is dropped

  // True where an element is kept. Each call seeds a generator, so that backward draws the same mask and torch's global
  // generator does not advance.
  OptionalTensor mask(at::IntArrayRef shape) const {
    if (!seed.has_value()) return std::nullopt;
    const auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed->item<int64_t>()));
    return at::empty(shape, at::TensorOptions().dtype(at::kBool)).bernoulli_(1.0 - probability, generator);
  }

  // What the adapter's part is multiplied by: s, divided by 1 - p.
  double scale(double scaling) const { return seed.has_value() ? scaling / (1.0 - probability) : scaling; }
};

}  // namespace lorasb
