// The calls by which a kernel orders its memory, in the build that looks for races. Each knows its
// place in the source, so that a test can leave one out, and see that the race is found.
#pragma once

namespace cuda_on_cpu {

// True where shim_leave_out has named this place. Notes that it was reached.
bool left_out(const char* file, int line);

void barrier();

}  // namespace cuda_on_cpu

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!cuda_on_cpu::left_out(file, line)) cuda_on_cpu::barrier();
}

template <typename T>
T atomicAdd(T* address, T value, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (!cuda_on_cpu::left_out(file, line)) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  }
  const T old = *address;
  *address = old + value;
  return old;
}

template <typename T>
T add_in_order(T* address, T value, const char* file = __builtin_FILE(),
               int line = __builtin_LINE()) {
  if (!cuda_on_cpu::left_out(file, line)) {
    return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
  }
  const T old = *address;
  *address = old + value;
  return old;
}

template <typename T>
void store_relaxed(T* address, T value, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  if (!cuda_on_cpu::left_out(file, line)) {
    __atomic_store_n(address, value, __ATOMIC_RELAXED);
  } else {
    *address = value;
  }
}
