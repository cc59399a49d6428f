// What two calls have in common if the second needs no checks and no choice of kernels: all but the values.
#pragma once

#include <Python.h>

namespace lorasb {

// Of tensors, None, and lists or tuples of them: for each its dtype, device, shape and strides, as bytes.
// Returns None if one is anything else: a list of lists, a subclass of Tensor other than Parameter, a sparse or a
// lazily negated tensor.
PyObject* metadata(PyObject* module, PyObject* const* operands, Py_ssize_t count);

// The same; None, too, under a mode, a functorch transform or torch.jit.trace.
PyObject* signature(PyObject* module, PyObject* const* operands, Py_ssize_t count);

}  // namespace lorasb
