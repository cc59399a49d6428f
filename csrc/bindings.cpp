// What the extension adds to torch: kernels for the ops that lorasb defines in Python, in the namespace `lorasb`, and
// ops in `lorasb_csrc`: the choice of an instruction set, and dense layers.
#include <torch/library.h>

#include "cpu/dispatch.h"
#include "gemm/quantized_weight.h"
#include "gemm/unpacked_gemm.h"
#include "ops/linear.h"
#include "ops/linear_quantized.h"
#include "ops/linear_rows.h"
#include "ops/weight_gradient.h"

TORCH_LIBRARY(lorasb_csrc, m) {
  m.def("instruction_sets() -> str[]", &lorasb::instruction_sets);
  m.def("use_instruction_set(str name) -> ()", &lorasb::use_instruction_set);
  m.def("instruction_set() -> str", [] { return std::string(lorasb::kernels().name); });
  m.def("serves(ScalarType dtype) -> bool", &lorasb::serves);
  m.def("max_unpacked_tokens(int elements) -> int", &lorasb::max_unpacked_tokens);
  const auto on_cpu = [&m](const char* schema, auto kernel) {
    m.def(schema, torch::dispatch(c10::DispatchKey::CPU, kernel));
  };
  // For lorasb::adapted_linear where `serves` is true: y and u = x Aᵀ; backward dx and dR; a group returns them flat.
  on_cpu(
      "dense_linear(Tensor x, Tensor? weight, Tensor a, Tensor core, Tensor b, Tensor? bias, float scaling, "
      "float dropout, Tensor? seed) -> (Tensor, Tensor)",
      TORCH_FN(lorasb::dense_linear));
  on_cpu(
      "dense_linear_backward(Tensor dy, Tensor? weight, Tensor a, Tensor core, Tensor b, Tensor u, float scaling, "
      "float dropout, Tensor? seed, bool need_dx, bool need_dcore) -> (Tensor, Tensor)",
      TORCH_FN(lorasb::dense_linear_backward));
  on_cpu(
      "dense_group(Tensor x, Tensor[] weights, Tensor[] a, Tensor[] cores, Tensor[] b, Tensor[] biases, "
      "float[] scalings) -> Tensor[]",
      TORCH_FN(lorasb::dense_group));
  on_cpu(
      "dense_group_backward(Tensor[] dys, Tensor[] weights, Tensor[] a, Tensor[] cores, Tensor[] b, Tensor[] us, "
      "float[] scalings, bool need_dx, bool need_dcore) -> Tensor[]",
      TORCH_FN(lorasb::dense_group_backward));
  // The same over a quantized weight.
  on_cpu(
      "quantized_linear(Tensor x, Tensor[] quant, int[] layout, Tensor a, Tensor core, Tensor b, Tensor? bias, "
      "float scaling, float dropout, Tensor? seed) -> (Tensor, Tensor)",
      TORCH_FN(lorasb::linear));
  on_cpu(
      "quantized_linear_backward(Tensor dy, Tensor[] quant, int[] layout, Tensor a, Tensor core, Tensor b, Tensor u, "
      "float scaling, float dropout, Tensor? seed, bool need_dx, bool need_dcore) -> (Tensor, Tensor)",
      TORCH_FN(lorasb::linear_backward));
  // With an R for each row: forward; for backward thin products, products with R's, and base and adapter in one sum.
  on_cpu(
      "linear_rows(Tensor x, Tensor? weight, Tensor[] quant, int[] layout, Tensor a, Tensor cores, Tensor b, "
      "Tensor? bias, Tensor index, float scaling, bool by_torch) -> (Tensor, Tensor)",
      TORCH_FN(lorasb::linear_rows));
  on_cpu("add_rows(Tensor(a!) y, Tensor x, Tensor a, Tensor cores, Tensor[] b, int[] first, Tensor index) -> ()",
         TORCH_FN(lorasb::add_rows));
  on_cpu("thin_product(Tensor x, Tensor factor, bool plain) -> Tensor", TORCH_FN(lorasb::thin_product));
  on_cpu("times_cores(Tensor left, Tensor cores, Tensor index, float scale, bool plain) -> Tensor",
         TORCH_FN(lorasb::times_cores));
  on_cpu(
      "extended_product(Tensor x, Tensor? weight, Tensor[] quant, int[] layout, int rows, int columns, Tensor v, "
      "Tensor factor, Tensor? bias, bool plain) -> Tensor",
      TORCH_FN(lorasb::extended_product));
}

TORCH_LIBRARY_IMPL(lorasb, CPU, m) {
  // The ops of the backend `auto`, whose names have no suffix, and those of `cpp`.
  for (const std::string owner : {"", "_cpp"}) {
    m.impl(("serve_quantized" + owner).c_str(), TORCH_FN(lorasb::serve));
    m.impl(("dequantize" + owner).c_str(), TORCH_FN(lorasb::dequantize));
    m.impl(("gradient_add" + owner).c_str(), TORCH_FN(lorasb::gradient_add));
    m.impl(("gradient_signs" + owner).c_str(), TORCH_FN(lorasb::gradient_signs));
  }
}
