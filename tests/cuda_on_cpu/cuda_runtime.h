// Stands in for CUDA's header so that csrc/cuda compiles as plain C++ and runs on the CPU.
//
// A kernel launch runs its blocks one after another; the threads of a block are fibers that take
// turns and wait for each other only at barriers and warp operations. This checks indexing and
// arithmetic. It cannot find races or memory errors, and says nothing about speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one at a time, so one copy of a block's memory is enough.
#define __shared__ static
// Makes the table a reference: fibers share the caller's copy, as threads share constant memory.
#define __grid_constant__ &

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Where the running fiber is in the launch.
extern dim3 threadIdx;
extern dim3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace cuda_on_cpu {

constexpr int kWarpSize = 32;

// The multiprocessors that the fake device reports.
constexpr int kMultiprocessors = 4;

// Runs `body` once for every thread of the grid; false if the threads of a block did not meet.
bool run(dim3 grid, dim3 block, const std::function<void()>& body);

// What went wrong in the last launch that failed.
const char* failure();

// Waits for all threads of the block.
void barrier();

// Gives every lane the values of all lanes of its warp; `mask` must name exactly these lanes.
const uint64_t* exchange(unsigned mask, uint64_t value);

template <typename T>
T from_lane(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* lanes = exchange(mask, bits);
  std::memcpy(&value, &lanes[lane], sizeof value);
  return value;
}

inline int lane() { return threadIdx.x % kWarpSize; }

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return cuda_on_cpu::from_lane(mask, value, cuda_on_cpu::lane() ^ lane_mask);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_on_cpu::from_lane(mask, value, lane % cuda_on_cpu::kWarpSize);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const uint64_t* lanes = cuda_on_cpu::exchange(mask, predicate);
  unsigned votes = 0;
  for (int lane = 0; lane < cuda_on_cpu::kWarpSize; ++lane) {
    if (mask >> lane & 1u && lanes[lane]) votes |= 1u << lane;
  }
  return votes;
}

// Fibers never interrupt each other, so plain arithmetic is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

// The part of the runtime interface that the launch helper uses.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_on_cpu::failure();
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = cuda_on_cpu::kMultiprocessors;
  return cudaSuccess;
}

template <typename... KernelArgs, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(KernelArgs...),
                               Args&&... args) {
  return cuda_on_cpu::run(config->gridDim, config->blockDim, [&] { kernel(args...); })
             ? cudaSuccess
             : cudaErrorLaunchFailure;
}
