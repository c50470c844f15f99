// The only place that starts a kernel; the rest of csrc/cuda never sees launch syntax.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace mmfuse::cuda {

// The bytes of parameters that a launch can carry on sm_70 and later since CUDA 12.1.
constexpr int kMaxParamBytes = 32764;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("mmfuse: ") + what + ": " + cudaGetErrorString(error));
  }
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Shared memory that is left to kernels' own arrays, which count towards every limit.
constexpr int kReservedBytes = 2048;

// Dynamic shared memory that a kernel may have without asking, and with.
constexpr int kFreeSharedBytes = 48 * 1024 - kReservedBytes;

inline int max_shared_bytes() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kReservedBytes;
}

template <typename... KernelArgs, typename... Args>
void launch_shared(const char* name, void (*kernel)(KernelArgs...), dim3 grid, dim3 block,
                   int shared_bytes, cudaStream_t stream, const Args&... args) {
  static_assert((sizeof(KernelArgs) + ...) <= kMaxParamBytes);
  if (shared_bytes > kFreeSharedBytes) {
    // Always for the most: of two threads, one would take back what the other is to launch with.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               max_shared_bytes()),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

template <typename... KernelArgs, typename... Args>
void launch(const char* name, void (*kernel)(KernelArgs...), dim3 grid, dim3 block,
            cudaStream_t stream, const Args&... args) {
  launch_shared(name, kernel, grid, block, 0, stream, args...);
}

// Blocks of a grid that strides over `work` pieces: as many as the device holds at once.
inline unsigned resident_blocks(int64_t work, int blocks_per_sm) {
  const int64_t multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t resident = multiprocessors * blocks_per_sm;
  return static_cast<unsigned>(std::min(work, resident));
}

}  // namespace mmfuse::cuda
