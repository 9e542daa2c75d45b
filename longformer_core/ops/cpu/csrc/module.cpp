// The module `longformer_core.ops.cpu._kernels`: for CPUs with AVX-512, loaded by features.py.

#include "module.h"

namespace {

PyMethodDef methods[] = {
    {"few_rows_linear", few_rows_linear, METH_VARARGS,
     "few_rows_linear(x, w, bias or 0, out, rows, weights, length, is_bfloat16, threads)"},
    {"few_rows_attend", few_rows_attend, METH_VARARGS,
     "few_rows_attend(q, k, v, out, lengths, documents, rows, heads, head_dim, document_stride, "
     "head_stride, scale, is_bfloat16, threads)"},
    {"many_rows_linear", many_rows_linear, METH_VARARGS,
     "many_rows_linear(x, w, bias or 0, out, rows, weights, length, is_bfloat16, threads)"},
    {"window_attend", window_attend, METH_VARARGS,
     "window_attend(q, k, v, out, lse or 0, starts, global_starts, globals, documents, heads, "
     "head_dim, radius, is_causal, scale, is_bfloat16, threads)"},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyObject* call_linear(PyObject* args, Linear* of_float32, Linear* of_bfloat16) {
  unsigned long long x, w, bias, out;
  long long num_rows, num_weights, length;
  int is_bfloat16, num_threads;
  if (!PyArg_ParseTuple(args, "KKKKLLLpi", &x, &w, &bias, &out, &num_rows, &num_weights, &length,
                        &is_bfloat16, &num_threads))
    return nullptr;
  Linear* const run = is_bfloat16 ? of_bfloat16 : of_float32;
  Py_BEGIN_ALLOW_THREADS;
  run(reinterpret_cast<void*>(x), reinterpret_cast<void*>(w), reinterpret_cast<void*>(bias),
      reinterpret_cast<void*>(out), num_rows, num_weights, length, num_threads);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMODINIT_FUNC PyInit__kernels() { return PyModule_Create(&definition); }
