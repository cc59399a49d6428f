#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <vector>

#include "python/functions.h"

namespace lorasb {
namespace {

// Words of 64 bits. A list writes its length first and a tensor its number of dimensions, so that no two sequences of
// operands write the same words.
using Words = std::vector<uint64_t>;

constexpr uint64_t kNone = 1, kList = 2, kTensor = 3;

// The kind of a group of words, and four bytes of it.
uint64_t tag(uint64_t kind, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0, uint64_t d = 0) {
  return kind | a << 8 | b << 16 | c << 24 | d << 32;
}

// True under a mode, a functorch transform, forward-mode AD or torch.jit.trace.
bool is_intercepted() {
  if (c10::impl::dispatch_mode_enabled() || at::impl::torch_function_mode_enabled()) return true;
  if (torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr) return true;
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::Tracer) || included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

bool is_plain(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_nested() &&
         !tensor.key_set().has_any(c10::DispatchKeySet(
             {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::FuncTorchGradWrapper,
              c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Functionalize, c10::DispatchKey::Conjugate,
              c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor}));
}

bool add_one(PyObject* operand, Words& words) {
  if (operand == Py_None) {
    words.push_back(tag(kNone));
    return true;
  }
  if (!THPVariable_CheckTypeExact(Py_TYPE(operand))) return false;
  const at::Tensor& tensor = THPVariable_Unpack(operand);
  if (!tensor.defined() || !is_plain(tensor)) return false;
  const at::Device device = tensor.device();
  words.push_back(tag(kTensor, static_cast<uint64_t>(tensor.scalar_type()), static_cast<uint64_t>(device.type()),
                      static_cast<uint8_t>(device.index()), static_cast<uint64_t>(tensor.dim())));
  for (const c10::IntArrayRef sizes : {tensor.sizes(), tensor.strides()}) {
    words.insert(words.end(), sizes.begin(), sizes.end());
  }
  return true;
}

bool add_operand(PyObject* operand, Words& words) {
  if (!PyList_CheckExact(operand) && !PyTuple_CheckExact(operand)) return add_one(operand, words);
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(operand);
  words.push_back(tag(kList));
  words.push_back(static_cast<uint64_t>(count));
  PyObject** items = PySequence_Fast_ITEMS(operand);
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!add_one(items[i], words)) return false;
  }
  return true;
}

}  // namespace

PyObject* signature(PyObject* module, PyObject* const* operands, Py_ssize_t count) {
  if (is_intercepted()) Py_RETURN_NONE;
  return metadata(module, operands, count);
}

PyObject* metadata(PyObject*, PyObject* const* operands, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  thread_local Words words;  // all calls of a thread reuse its memory
  words.clear();
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!add_operand(operands[i], words)) Py_RETURN_NONE;
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()),
                                   static_cast<Py_ssize_t>(words.size() * sizeof(uint64_t)));
  END_HANDLE_TH_ERRORS
}

}  // namespace lorasb
