// The adapted linear over a dense weight where torch's own products are slow: 16 bits on processors that do not
// multiply them, where W is widened to fp32 a packed panel at a time; fp32 where the blocked product was measured to be
// faster than the BLAS; and forward for few tokens in bf16 where the processor multiplies it. All sums are in fp32.
#pragma once

#include <vector>

#include "gemm/tensors.h"

namespace lorasb {

// True if these ops should be used for a dtype. False for 16 bits where the processor, and so torch, multiplies them;
// the ops below do not check this, so that tests reach them everywhere.
bool serves(at::ScalarType dtype);

// y [..., m] and u = x Aᵀ [M, r]: lorasb::adapted_linear for one member.
TensorPair dense_linear(const Tensor& x, const OptionalTensor& weight, const Tensor& a, const Tensor& core,
                        const Tensor& b, const OptionalTensor& bias, double scaling, double probability,
                        const OptionalTensor& seed);

TensorPair dense_linear_backward(const Tensor& dy, const OptionalTensor& weight, const Tensor& a, const Tensor& core,
                                 const Tensor& b, const Tensor& u, double scaling, double probability,
                                 const OptionalTensor& seed, bool need_dx, bool need_dcore);

// lorasb::adapted_linear for a group.
std::vector<Tensor> dense_group(const Tensor& x, at::TensorList weights, at::TensorList a, at::TensorList cores,
                                at::TensorList b, at::TensorList biases, at::ArrayRef<double> scalings);

std::vector<Tensor> dense_group_backward(at::TensorList dys, at::TensorList weights, at::TensorList a,
                                         at::TensorList cores, at::TensorList b, at::TensorList us,
                                         at::ArrayRef<double> scalings, bool need_dx, bool need_dcore);

}  // namespace lorasb
