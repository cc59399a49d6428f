// Several tensors without values by one call from Python: torch's own takes a microsecond for each.
#pragma once

#include <Python.h>

namespace lorasb {

// Of a tensor and a sequence of shapes: a list of tensors of that dtype and device, not filled.
PyObject* allocate(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace lorasb
