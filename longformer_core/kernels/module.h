// The functions that Python calls, each defined beside the kernel that it runs.
//
// Addresses come as integers: tensors know theirs, and no header of torch's is needed.

#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

PyObject* few_rows_linear(PyObject*, PyObject* args);
PyObject* few_rows_attend(PyObject*, PyObject* args);
PyObject* many_rows_linear(PyObject*, PyObject* args);
PyObject* window_attend(PyObject*, PyObject* args);
