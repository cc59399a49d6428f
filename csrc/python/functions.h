// Functions of the Python module lorasb._C (module.cpp).
#pragma once

#include <Python.h>

namespace lorasb {

// What two calls have in common if the second needs no checks and no choice of kernels: all but the values. Of tensors,
// None, and lists or tuples of them: for each its dtype, device, shape and strides, as bytes. Returns None if one is
// anything else: a list of lists, a subclass of Tensor other than Parameter, a sparse or a lazily negated tensor.
PyObject* metadata(PyObject* module, PyObject* const* operands, Py_ssize_t count);

// The same; None, too, under a mode, a functorch transform or torch.jit.trace.
PyObject* signature(PyObject* module, PyObject* const* operands, Py_ssize_t count);

// Of a tensor and a sequence of shapes: a list of tensors of that dtype and device, not filled, by one call from
// Python: torch's own takes a microsecond for each.
PyObject* allocate(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace lorasb
