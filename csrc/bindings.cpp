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

namespace lorasb {
namespace {

void use_or_raise(const std::string& name) {
  TORCH_CHECK_VALUE(use_instruction_set(name), "this processor has no instruction set '", name, "', expected one of ",
                    instruction_sets());
}

std::string name_in_use() { return kernels().name; }

}  // namespace
}  // namespace lorasb

TORCH_LIBRARY(lorasb_csrc, m) {
  m.def("instruction_sets() -> str[]", [] { return lorasb::instruction_sets(); });
  m.def("use_instruction_set(str name) -> ()", [](const std::string& name) { lorasb::use_or_raise(name); });
  m.def("instruction_set() -> str", [] { return lorasb::name_in_use(); });
  m.def("serves(ScalarType dtype) -> bool", [](at::ScalarType dtype) { return lorasb::serves(dtype); });
  m.def("max_unpacked_tokens(int elements) -> int", &lorasb::max_unpacked_tokens);
  // The backend calls these for lorasb::adapted_linear where `serves` says so. Forward returns y and
  // u = x Aᵀ, backward dx and dR; a group returns them flat.
  m.def(
      "dense_linear(Tensor x, Tensor? weight, Tensor a, Tensor core, Tensor b, Tensor? bias, float scaling, "
      "float dropout, Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "dense_linear_backward(Tensor dy, Tensor? weight, Tensor a, Tensor core, Tensor b, Tensor u, float scaling, "
      "float dropout, Tensor? seed, bool need_dx, bool need_dcore) -> (Tensor, Tensor)");
  m.def(
      "dense_group(Tensor x, Tensor[] weights, Tensor[] a, Tensor[] cores, Tensor[] b, Tensor[] biases, "
      "float[] scalings) -> Tensor[]");
  m.def(
      "dense_group_backward(Tensor[] dys, Tensor[] weights, Tensor[] a, Tensor[] cores, Tensor[] b, Tensor[] us, "
      "float[] scalings, bool need_dx, bool need_dcore) -> Tensor[]");
  // The same over a quantized weight.
  m.def(
      "quantized_linear(Tensor x, Tensor[] quant, int[] layout, Tensor a, Tensor core, Tensor b, Tensor? bias, "
      "float scaling, float dropout, Tensor? seed) -> (Tensor, Tensor)");
  m.def(
      "quantized_linear_backward(Tensor dy, Tensor[] quant, int[] layout, Tensor a, Tensor core, Tensor b, Tensor u, "
      "float scaling, float dropout, Tensor? seed, bool need_dx, bool need_dcore) -> (Tensor, Tensor)");
  // With an R for each row: its forward, and for its backward the thin products in fp32, that with each row's own R,
  // and base and adapter in one sum.
  m.def(
      "linear_rows(Tensor x, Tensor? weight, Tensor[] quant, int[] layout, Tensor a, Tensor cores, Tensor b, "
      "Tensor? bias, Tensor index, float scaling, bool by_torch) -> (Tensor, Tensor)");
  m.def("add_rows(Tensor(a!) y, Tensor x, Tensor a, Tensor cores, Tensor[] b, int[] first, Tensor index) -> ()");
  m.def("thin_product(Tensor x, Tensor factor, bool plain) -> Tensor");
  m.def("times_cores(Tensor left, Tensor cores, Tensor index, float scale, bool plain) -> Tensor");
  m.def(
      "extended_product(Tensor x, Tensor? weight, Tensor[] quant, int[] layout, int rows, int columns, Tensor v, "
      "Tensor factor, Tensor? bias, bool plain) -> Tensor");
}

TORCH_LIBRARY_IMPL(lorasb_csrc, CPU, m) {
  m.impl("dense_linear", TORCH_FN(lorasb::dense_linear));
  m.impl("dense_linear_backward", TORCH_FN(lorasb::dense_linear_backward));
  m.impl("dense_group", TORCH_FN(lorasb::dense_group));
  m.impl("dense_group_backward", TORCH_FN(lorasb::dense_group_backward));
  m.impl("quantized_linear", TORCH_FN(lorasb::linear));
  m.impl("quantized_linear_backward", TORCH_FN(lorasb::linear_backward));
  m.impl("linear_rows", TORCH_FN(lorasb::linear_rows));
  m.impl("add_rows", TORCH_FN(lorasb::add_rows));
  m.impl("thin_product", TORCH_FN(lorasb::thin_product));
  m.impl("times_cores", TORCH_FN(lorasb::times_cores));
  m.impl("extended_product", TORCH_FN(lorasb::extended_product));
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
