// mmfuse._C: how the build was made, and what is read from Python's objects. The backends are
// libraries of their own, without Python.
#include <pybind11/pybind11.h>

#include <string>

#include "python/gradients.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("g++ ") + __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["flags"] = MMFUSE_FLAGS;
  return info;
}

mmfuse::python::Reader reader;

bool find_tensors(const py::object& tensor_type, const py::object& parameter_type) {
  return reader.find(tensor_type.ptr(), parameter_type.ptr());
}

py::object read_gradients(const py::object& parameters, const py::object& anchors) {
  PyObject* found = mmfuse::python::read_gradients(reader, parameters.ptr(), anchors.ptr());
  if (found == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

py::object read_list(const py::object& grads, const py::object& params, const py::object& anchors) {
  PyObject* found = mmfuse::python::read_list(reader, grads.ptr(), params.ptr(), anchors.ptr());
  if (found == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

py::object read_apart(const py::object& grads, const py::object& params,
                      const py::object& anchors) {
  PyObject* found =
      mmfuse::python::read_list(reader, grads.ptr(), params.ptr(), anchors.ptr(), true);
  if (found == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How mmfuse was built, and what it reads of Python's objects quickly.";
  m.def("build_info", &build_info, "Compiler and flags of this build.");
  m.def("find_tensors", &find_tensors, "Looks up how tensors are read; whether they can be.");
  m.def("read_gradients", &read_gradients, py::arg("parameters"), py::arg("anchors") = py::none(),
        "Gradients of parameters and a table of them, or None.");
  m.def("read_list", &read_list, py::arg("grads"), py::arg("params") = py::none(),
        py::arg("anchors") = py::none(),
        "True if a list of gradients has a float64 one; and a table, or None.");
  m.def("read_apart", &read_apart, py::arg("grads"), py::arg("params") = py::none(),
        py::arg("anchors") = py::none(),
        "The same; None if a gradient shares memory with another tensor.");
}
