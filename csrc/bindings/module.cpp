// The Python module: which instruction set kernels use. Loading it registers the CPU ops. Only
// Python's limited API is used.
#include <Python.h>

#include <string>

#include "bindings/execution.h"

namespace sparse_attn {

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(cpu::isa_name(active_isa()));
}

PyObject* supported_cpu_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (int level = 0; level < cpu::kNumIsas; ++level) {
    const cpu::Isa isa = static_cast<cpu::Isa>(level);
    if (!cpu::is_supported(isa)) continue;
    PyObject* name = PyUnicode_FromString(cpu::isa_name(isa));
    const int failed = name == nullptr || PyList_Append(names, name) != 0;
    Py_XDECREF(name);
    if (failed) {
      Py_DECREF(names);
      return nullptr;
    }
  }
  PyObject* result = PyList_AsTuple(names);
  Py_DECREF(names);
  return result;
}

PyObject* set_cpu_isa(PyObject*, PyObject* name) {
  if (name == Py_None) {
    active_isa() = cpu::best_isa();
    Py_RETURN_NONE;
  }
  const char* text = PyUnicode_AsUTF8AndSize(name, nullptr);
  if (text == nullptr) return nullptr;
  for (int level = 0; level < cpu::kNumIsas; ++level) {
    const cpu::Isa isa = static_cast<cpu::Isa>(level);
    if (std::string(text) != cpu::isa_name(isa)) continue;
    if (!cpu::is_supported(isa)) {
      PyErr_Format(PyExc_ValueError, "this processor does not support '%s'", text);
      return nullptr;
    }
    active_isa() = isa;
    Py_RETURN_NONE;
  }
  std::string names = cpu::kIsaNames[0];
  for (int level = 1; level < cpu::kNumIsas; ++level) {
    names += (level + 1 < cpu::kNumIsas ? ", " : " or ") + std::string(cpu::kIsaNames[level]);
  }
  PyErr_Format(PyExc_ValueError, "unknown instruction set '%s': expected %s", text, names.c_str());
  return nullptr;
}

PyMethodDef kMethods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Name of the instruction set that kernels may use now."},
    {"supported_cpu_isas", supported_cpu_isas, METH_NOARGS,
     "Names of all instruction sets that this processor supports and kernels exist for."},
    {"set_cpu_isa", set_cpu_isa, METH_O,
     "Limit kernels to the named instruction set; None means the best supported one."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, kMethods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

}  // namespace sparse_attn

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&sparse_attn::kModule); }
