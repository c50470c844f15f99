// mmfuse._C: how the build was made. The backends are libraries of their own, without Python.
#include <pybind11/pybind11.h>

#include <string>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How mmfuse was built.";
  m.def("build_info", &build_info, "Compiler and flags of this build.");
}
