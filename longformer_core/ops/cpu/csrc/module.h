// The functions that Python calls, each defined beside the kernel that it runs.
//
// Addresses come as integers: tensors know theirs, and no header of torch's is needed.

#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cstdint>

// out[R, N] = x[R, K] w[N, K]^T + bias[N], of one dtype; without a bias it is null.
using Linear = void(const void* x, const void* w, const void* bias, void* out, int64_t num_rows,
                    int64_t num_weights, int64_t length, int num_threads);

// Run the product for the dtype that `args` of Python's call name.
PyObject* call_linear(PyObject* args, Linear* of_float32, Linear* of_bfloat16);

PyObject* few_rows_linear(PyObject*, PyObject* args);
PyObject* few_rows_attend(PyObject*, PyObject* args);
PyObject* many_rows_linear(PyObject*, PyObject* args);
PyObject* window_attend(PyObject*, PyObject* args);
