// Functions of the Python module lorasb._C, which module.cpp documents.
#pragma once

#include <Python.h>

namespace lorasb {

PyObject* metadata(PyObject* module, PyObject* const* operands, Py_ssize_t count);
PyObject* signature(PyObject* module, PyObject* const* operands, Py_ssize_t count);
PyObject* allocate(PyObject* module, PyObject* const* arguments, Py_ssize_t count);
PyObject* addresses(PyObject* module, PyObject* tensors);

}  // namespace lorasb
