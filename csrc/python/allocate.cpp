#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/object_ptr.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/utils/python_numbers.h>

#include <vector>

#include "python/functions.h"

namespace lorasb {
namespace {

using Shape = c10::SmallVector<int64_t, 5>;

Shape shape_of(PyObject* shape) {
  TORCH_CHECK_TYPE(PyTuple_Check(shape), "expected shapes as tuples, got ", Py_TYPE(shape)->tp_name);
  Shape sizes;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(shape); ++i) {
    sizes.push_back(THPUtils_unpackLong(PyTuple_GET_ITEM(shape, i)));
  }
  return sizes;
}

}  // namespace

PyObject* allocate(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 2 && THPVariable_Check(arguments[0]) && (PyList_Check(arguments[1]) || PyTuple_Check(arguments[1])),
      "expected allocate(tensor, shapes)");
  const at::TensorOptions options = THPVariable_Unpack(arguments[0]).options();
  const Py_ssize_t length = PySequence_Fast_GET_SIZE(arguments[1]);
  std::vector<Shape> shapes;
  for (Py_ssize_t i = 0; i < length; ++i) shapes.push_back(shape_of(PySequence_Fast_GET_ITEM(arguments[1], i)));
  std::vector<at::Tensor> tensors;
  {
    const pybind11::gil_scoped_release no_gil;  // an allocation may wait for a GPU
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (const Shape& shape : shapes) tensors.push_back(at::empty(shape, options));
  }
  THPObjectPtr found(PyList_New(length));
  if (!found) throw python_error();
  for (Py_ssize_t i = 0; i < length; ++i) {
    PyObject* tensor = THPVariable_Wrap(tensors[i]);
    if (tensor == nullptr) throw python_error();
    PyList_SET_ITEM(found.get(), i, tensor);
  }
  return found.release();
  END_HANDLE_TH_ERRORS
}

PyObject* addresses(PyObject*, PyObject* tensors) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyList_Check(tensors), "expected addresses(a list of tensors)");
  const Py_ssize_t length = PyList_GET_SIZE(tensors);
  THPObjectPtr found(PyList_New(length));
  if (!found) throw python_error();
  uintptr_t bits = 0;
  for (Py_ssize_t i = 0; i < length; ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors, i);
    TORCH_CHECK_TYPE(THPVariable_Check(tensor), "expected addresses(a list of tensors)");
    const auto address = reinterpret_cast<uintptr_t>(THPVariable_Unpack(tensor).data_ptr());
    bits |= address;
    PyList_SET_ITEM(found.get(), i, PyLong_FromUnsignedLongLong(address));
  }
  return bits % 16 != 0 ? Py_NewRef(Py_None) : found.release();
  END_HANDLE_TH_ERRORS
}

}  // namespace lorasb
