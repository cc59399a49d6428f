// Masks of dropout, drawn from a seed.
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

namespace lorasb {

// True where dropout keeps an element. The generator is seeded by the call, so that backward draws the same mask and
// torch's global generator does not advance.
inline at::Tensor keep_mask(at::IntArrayRef shape, double dropout, const at::Tensor& seed) {
  const auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(seed.item<int64_t>()));
  return at::empty(shape, at::TensorOptions().dtype(at::kBool)).bernoulli_(1.0 - dropout, generator);
}

}  // namespace lorasb
