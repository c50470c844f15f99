// mmfuse._C: says how the library was built. The ops register themselves with PyTorch on loading.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/simd.h"

#if defined(MMFUSE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

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
  using mmfuse::cpu::simd_level_name;
  using mmfuse::cpu::SimdLevel;
  py::list built;
  built.append(simd_level_name(SimdLevel::kGeneric));
#if MMFUSE_X86
  built.append(simd_level_name(SimdLevel::kAvx2));
  built.append(simd_level_name(SimdLevel::kAvx512));
#endif
  py::dict info;
  info["compiler"] = compiler();
  info["flags"] = MMFUSE_FLAGS;
  info["has_cpu"] = true;
  info["simd"] = simd_level_name(mmfuse::cpu::simd_level());
  info["simd_built"] = built;
#if defined(MMFUSE_WITH_CUDA)
  info["has_cuda"] = true;
  info["cuda_version"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["cuda_architectures"] = MMFUSE_CUDA_ARCHS;
#else
  info["has_cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled backends of mmfuse.";
  m.def("build_info", &build_info, "Compiler, flags and instruction sets of this build.");
}
