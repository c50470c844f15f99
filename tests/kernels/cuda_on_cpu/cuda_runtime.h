// Stands in for CUDA's header so that csrc/cuda compiles as plain C++ and runs on the CPU.
//
// A kernel launch runs its blocks one after another; the threads of a block are fibers that take
// turns and wait for each other only at barriers and warp operations. This checks indexing and
// arithmetic, and says nothing about speed. In another order (MMFUSE_SHIM_ORDER=reverse or random)
// a missing barrier changes results; memory errors are for `make sanitize`, races for `make races`.
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
#if defined(MMFUSE_RACES)
// Blocks of different crews share nothing, see races.h.
#define __shared__ static thread_local
#else
// Blocks run one at a time, so one copy of a block's memory is enough.
#define __shared__ static
#endif
// Makes the table a reference: fibers share the caller's copy, as threads share constant memory.
#define __grid_constant__ &

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The running fiber's place in the launch.
extern dim3 threadIdx;
extern dim3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace cuda_on_cpu {

constexpr int kWarpSize = 32;

// The multiprocessors that the fake device reports.
constexpr int kMultiprocessors = 4;

// The shared memory that a block may have there, and the part that takes no permission.
constexpr int kSharedBytes = 99 * 1024;
constexpr int kFreeSharedBytes = 48 * 1024;

// A kernel's __shared__ variables count towards both; only the compiler knows which it has, so that
// each is taken to have this much.
constexpr int kStaticBytes = 2 * 1024;

// Runs `body`, a call of `kernel`, once for every thread of the grid; false if the threads of a
// block did not meet.
bool run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
         const std::function<void()>& body);

// Permits launches of `kernel` with so much dynamic shared memory; false if no block may have it,
// or if it is less than before: another thread may be about to launch with that.
bool permit_shared(const void* kernel, size_t bytes);

// The running block's dynamic shared memory, filled with `poison` before each block.
void* dynamic_shared();

// The error of the last launch that failed.
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

// The host compiler keeps each operation's own rounding: FLAGS in build.py allow no other.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }

namespace cuda_on_cpu {

// The fast functions are off by as much as CUDA's programming guide allows, up or down as the
// argument's bits decide: what holds here does not depend on the hardware being better.
inline float off_by(double exact, double error, float argument) {
  uint32_t bits;
  std::memcpy(&bits, &argument, sizeof bits);
  return static_cast<float>(bits * 0x9E3779B9u >> 31 ? exact + error : exact - error);
}

inline float fast_log2(float x) {
  const double exact = std::log2(static_cast<double>(x));
  return off_by(exact, 0x1p-22 * (x >= 0.5f ? 1.0 : std::fabs(exact)), x);
}

inline float fast_sqrt(float x) {
  const double exact = std::sqrt(static_cast<double>(x));
  return off_by(exact, 0x1p-23 * exact, x);
}

}  // namespace cuda_on_cpu

inline float __sinf(float x) {
  return cuda_on_cpu::off_by(std::sin(static_cast<double>(x)), std::exp2(-21.41), x);
}
inline float __cosf(float x) {
  return cuda_on_cpu::off_by(std::cos(static_cast<double>(x)), std::exp2(-21.19), x);
}
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::llrintf(x)); }

#if defined(MMFUSE_RACES)
#include "ordering.h"
#else
inline void __syncthreads() { cuda_on_cpu::barrier(); }

// Fibers never interrupt each other, so plain arithmetic is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

// An addition that orders what was written and read before it, of all blocks.
template <typename T>
T add_in_order(T* address, T value) {
  return atomicAdd(address, value);
}

// A store that others may do at the same time, in one piece.
template <typename T>
void store_relaxed(T* address, T value) {
  *address = value;
}
#endif

// The part of the runtime interface that the launch helper uses.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

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

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::kMultiprocessors
                                                       : cuda_on_cpu::kSharedBytes;
  return cudaSuccess;
}

template <typename... KernelArgs>
cudaError_t cudaFuncSetAttribute(void (*kernel)(KernelArgs...), cudaFuncAttribute, int bytes) {
  const bool permitted = cuda_on_cpu::permit_shared(reinterpret_cast<const void*>(kernel), bytes);
  return permitted ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename... KernelArgs, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(KernelArgs...),
                               Args&&... args) {
  const bool met =
      cuda_on_cpu::run(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim,
                       config->dynamicSmemBytes, [&] { kernel(args...); });
  return met ? cudaSuccess : cudaErrorLaunchFailure;
}
