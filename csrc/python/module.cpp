// The Python module lorasb._C: functions that Python calls without the dispatcher, which takes longer than they do. The
// ops, which torch calls, are in bindings.cpp.
#include <Python.h>

#include "python/functions.h"

namespace {

// Casts a METH_FASTCALL function to the one type of all functions in a method table.
PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef functions[] = {
    {"metadata", fast(lorasb::metadata), METH_FASTCALL,
     "metadata(*operands) -> bytes | None: dtype, device, shape and strides of tensors, of lists of them and of None; "
     "None where one of them is a list of lists, a subclass of Tensor other than Parameter, sparse or lazily negated."},
    {"signature", fast(lorasb::signature), METH_FASTCALL,
     "signature(*operands) -> bytes | None: their metadata; None, too, under a mode, a transform or torch.jit.trace."},
    {"allocate", fast(lorasb::allocate), METH_FASTCALL,
     "allocate(like, shapes) -> list[Tensor]: not filled, of the dtype and on the device of `like`."},
    {"addresses", lorasb::addresses, METH_O,
     "addresses(tensors) -> list[int] | None: of a list of tensors; None if an address is not a multiple of 16."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Functions called without the dispatcher.", -1, functions};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
