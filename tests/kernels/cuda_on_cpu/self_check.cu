// Kernels that check the shim itself; test_shim.py calls run_<kernel>, .ci/sanitize.py and
// .ci/races.py those at the end, which do what a sanitizer must report.
#include <cuda_runtime.h>

namespace {

template <typename... KernelArgs, typename... Args>
const char* run_shared(size_t bytes, void (*kernel)(KernelArgs...), dim3 grid, dim3 block,
                       const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  return cudaGetErrorString(cudaLaunchKernelEx(&config, kernel, args...));
}

template <typename... KernelArgs, typename... Args>
const char* run(void (*kernel)(KernelArgs...), dim3 grid, dim3 block, const Args&... args) {
  return run_shared(0, kernel, grid, block, args...);
}

__global__ void reverse_warps_kernel(int* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = __shfl_xor_sync(0xFFFFFFFFu, i, 31);
}

__global__ void broadcast_kernel(double* out) {
  const double value = threadIdx.x + 0.5;
  out[threadIdx.x] = __shfl_sync(0xFFFFFFFFu, value, 3);
}

__global__ void ballot_kernel(unsigned* out) {
  out[threadIdx.x] = __ballot_sync(0xFFFFFFFFu, threadIdx.x % 3 == 0);
}

// Right only if every thread has written before the first one reads.
__global__ void rotate_block_kernel(int* all) {
  __shared__ int values[256];
  int* const out = all + blockIdx.x * blockDim.x;
  for (unsigned round = 0; round < 5; ++round) {
    values[threadIdx.x] = threadIdx.x + round;
    __syncthreads();
    out[threadIdx.x] = values[(threadIdx.x + 100) % blockDim.x];
    __syncthreads();
  }
}

__global__ void count_kernel(int* total) { atomicAdd(total, 1); }

__global__ void positions_kernel(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  atomicAdd(&out[block * threads + thread], 1);
}

__global__ void skipped_barrier_kernel() {
  if (threadIdx.x != 7) __syncthreads();
}

__global__ void skipped_shuffle_kernel() {
  if (threadIdx.x != 7) __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
}

__global__ void wrong_mask_kernel() { __shfl_xor_sync(0xFFFFu, 1, 1); }

// Any kernel that takes dynamic shared memory.
__global__ void permitted_kernel() { __syncthreads(); }

// A barrier is missing; threads that go in order do not notice.
__global__ void unordered_kernel(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = threadIdx.x == 0 ? -1 : values[threadIdx.x - 1];
  __syncthreads();
}

// All blocks but the first one read what they have not written.
__global__ void unwritten_kernel(int* out) {
  __shared__ int value;
  if (blockIdx.x == 0) value = 7;
  __syncthreads();
  out[blockIdx.x] = value;
}

// It reads memory that nobody has written.
__global__ void unwritten_local_kernel(int* out) {
  int few[16];
  int* volatile first = few;
  out[threadIdx.x] = first[threadIdx.x % 16];
}

// Pointers, because the sanitizer of undefined behaviour knows an array's size without memory's.
__global__ void beyond_static_kernel(int* out) {
  __shared__ int few[64];
  few[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const int* const first = few;
  out[threadIdx.x] = first[threadIdx.x + 1];
}

__global__ void beyond_dynamic_kernel(int* out) {
  const int* const first = static_cast<const int*>(cuda_on_cpu::dynamic_shared());
  out[threadIdx.x] = first[threadIdx.x + 1];
}

// The shim must still know the memory beyond the variable after other threads have run.
__global__ void beyond_local_kernel(int* out) {
  int few[4] = {1, 2, 3, 4};
  const int* volatile first = few;
  __syncthreads();
  out[threadIdx.x] = first[threadIdx.x % 5];
}

__global__ void overflow_kernel(int* out) { out[threadIdx.x] += 0x7FFFFFFF; }

// A shuffle lets the lanes meet, and orders nothing of what they have written.
__global__ void unordered_warp_kernel(int* out) {
  __shared__ int values[32];
  values[threadIdx.x] = threadIdx.x;
  const int other = __shfl_xor_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x), 1);
  out[threadIdx.x] = values[other];
}

// Each block reads what its neighbour writes.
__global__ void unordered_blocks_kernel(int* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  __syncthreads();
  out[i] = out[(i + blockDim.x) % (gridDim.x * blockDim.x)] + 1;
}

// An addition that is lost where two threads do it at once; each in a block of its own.
__global__ void plain_count_kernel(int* total) { *total += 1; }

// The values of the next round are written while some threads still read those of the last one.
__global__ void half_barrier_kernel(int* out) {
  __shared__ int values[64];
  for (unsigned round = 0; round < 3; ++round) {
    values[threadIdx.x] = threadIdx.x + round;
    __syncthreads();
    out[threadIdx.x] = values[(threadIdx.x + 1) % blockDim.x];
  }
}

}  // namespace

extern "C" {
const char* run_reverse_warps(int* out) { return run(reverse_warps_kernel, 2, 64, out); }
const char* run_broadcast(double* out) { return run(broadcast_kernel, 1, 32, out); }
const char* run_ballot(unsigned* out) { return run(ballot_kernel, 1, 32, out); }
const char* run_rotate_block(int* out) { return run(rotate_block_kernel, 3, 256, out); }
const char* run_count(int* out) { return run(count_kernel, 5, 96, out); }
const char* run_positions(int* out) {
  return run(positions_kernel, dim3(2, 3, 4), dim3(4, 2, 3), out);
}
const char* run_unordered(int* out) { return run(unordered_kernel, 1, 64, out); }
const char* run_unwritten(int* out) { return run(unwritten_kernel, 3, 32, out); }
const char* run_unwritten_local(int* out) { return run(unwritten_local_kernel, 3, 32, out); }
const char* run_skipped_barrier() { return run(skipped_barrier_kernel, 1, 64); }
const char* run_skipped_shuffle() { return run(skipped_shuffle_kernel, 1, 64); }
const char* run_wrong_mask() { return run(wrong_mask_kernel, 1, 32); }
const char* run_beyond_static(int* out) { return run(beyond_static_kernel, 1, 64, out); }
const char* run_beyond_dynamic(int* out) {
  return run_shared(64 * sizeof(int), beyond_dynamic_kernel, 1, 64, out);
}
// Asks for bytes[1] of dynamic shared memory unless they are 0, and launches with bytes[0].
const char* run_permitted(const int* bytes) {
  const cudaFuncAttribute attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  cudaError_t asked = cudaSuccess;
  if (bytes[1] > 0) asked = cudaFuncSetAttribute(permitted_kernel, attribute, bytes[1]);
  if (asked != cudaSuccess) return cudaGetErrorString(asked);
  return run_shared(bytes[0], permitted_kernel, 1, 32);
}
const char* run_beyond_local(int* out) { return run(beyond_local_kernel, 1, 64, out); }
const char* run_overflow(int* out) { return run(overflow_kernel, 1, 64, out); }
const char* run_unordered_warp(int* out) { return run(unordered_warp_kernel, 1, 32, out); }
const char* run_unordered_blocks(int* out) { return run(unordered_blocks_kernel, 4, 32, out); }
const char* run_plain_count(int* out) { return run(plain_count_kernel, 2, 1, out); }
const char* run_half_barrier(int* out) { return run(half_barrier_kernel, 1, 64, out); }
}
