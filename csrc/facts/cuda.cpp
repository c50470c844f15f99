// The facts that libmmfuse_cuda.so exports about itself: one a line, a key and its value. Read with
// ctypes.
#include <cuda_runtime_api.h>

#include <string>

extern "C" __attribute__((visibility("default"))) const char* mmfuse_cuda_facts() {
  static const std::string text = "cuda_version " + std::to_string(CUDART_VERSION / 1000) + "." +
                                  std::to_string(CUDART_VERSION % 1000 / 10) +
                                  "\ncuda_architectures " MMFUSE_CUDA_ARCHS
                                  "\nsources " MMFUSE_SOURCES "\n";
  return text.c_str();
}
