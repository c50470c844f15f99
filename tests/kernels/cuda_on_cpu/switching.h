// A sanitizer has to be told when one fiber leaves the processor and another one arrives.
#pragma once

#include <setjmp.h>

#include <cstddef>
#if defined(__SANITIZE_ADDRESS__)
#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#elif defined(MMFUSE_RACES)
#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>
#endif

namespace cuda_on_cpu {

// A stack's place, for AddressSanitizer, and the frames that it keeps elsewhere; and the stack's
// owner, for ThreadSanitizer.
struct Stack {
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* frames = nullptr;
  void* thread = nullptr;
};

#if defined(__SANITIZE_ADDRESS__) || defined(MMFUSE_RACES)
constexpr size_t kStackBytes = 256 * 1024;  // its frames are larger

// glibc's own. The sanitizer's would take it that the frames on the stack are left for good, and
// would no longer see what goes beyond their variables.
using Jump = void (*)(jmp_buf, int);
inline const Jump jump = reinterpret_cast<Jump>(dlsym(dlopen("libc.so.6", RTLD_LAZY), "_longjmp"));
#else
constexpr size_t kStackBytes = 64 * 1024;

[[noreturn]] inline void jump(jmp_buf state, int value) { _longjmp(state, value); }
#endif

#if defined(__SANITIZE_ADDRESS__)
inline void leave(Stack& stack, const Stack& next) {
  __sanitizer_start_switch_fiber(&stack.frames, next.bottom, next.bytes);
}
inline void arrive(const Stack& stack, Stack& last) {
  __sanitizer_finish_switch_fiber(stack.frames, &last.bottom, &last.bytes);
}
#elif defined(MMFUSE_RACES)
inline void leave(Stack&, const Stack& next) {
  // Without one of its own, it is the same thread to the sanitizer.
  if (next.thread != nullptr) {
    __tsan_switch_to_fiber(next.thread, __tsan_switch_to_fiber_no_sync);
  }
}
inline void arrive(const Stack&, Stack&) {}
#else
inline void leave(Stack&, const Stack&) {}
inline void arrive(const Stack&, Stack&) {}
#endif

}  // namespace cuda_on_cpu
