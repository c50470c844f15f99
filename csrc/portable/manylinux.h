// Included before every source of a wheel that others get (MMFUSE_PORTABLE=1). PyTorch's own wheels
// need glibc 2.28 and the libstdc++ of GCC 8; a newer compiler would take these few things from
// newer ones.
#pragma once

#include <new>
#include <sstream>

#if defined(__GLIBC__) && defined(__x86_64__)
// Since 2.29 there are versions of these that set no errno; the results are the same.
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
__asm__(".symver pow,pow@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp,exp@GLIBC_2.17");
__asm__(".symver log,log@GLIBC_2.17");
__asm__(".symver pow,pow@GLIBC_2.17");
#endif

#define MMFUSE_OWN __attribute__((weak, visibility("hidden")))

extern "C" {

#if defined(__GLIBC__)
// Since 2.32 glibc says here if a process has one thread only, and shared_ptr counts without atomic
// instructions then. Zero is always right.
MMFUSE_OWN char __libc_single_threaded = 0;
#endif

#if defined(__GLIBCXX__)
// By their names in the library, as it has them since GCC 11: std::__throw_bad_array_new_length(),
MMFUSE_OWN void _ZSt28__throw_bad_array_new_lengthv() { throw std::bad_array_new_length(); }

// and of std::exception_ptr _M_addref() and _M_release(), which its copy constructor and its
// destructor have always called.
void _ZNSt15__exception_ptr13exception_ptrC1ERKS0_(void* self, const void* other) noexcept;
void _ZNSt15__exception_ptr13exception_ptrD1Ev(void* self) noexcept;
MMFUSE_OWN void _ZNSt15__exception_ptr13exception_ptr9_M_addrefEv(void* self) noexcept {
  void* never_destroyed = nullptr;
  _ZNSt15__exception_ptr13exception_ptrC1ERKS0_(&never_destroyed, self);
}
MMFUSE_OWN void _ZNSt15__exception_ptr13exception_ptr10_M_releaseEv(void* self) noexcept {
  _ZNSt15__exception_ptr13exception_ptrD1Ev(self);
}

// Since GCC 9 the constructors of string streams without an argument; those with one are older.
MMFUSE_OWN void _ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* self) {
  ::new (self) std::ostringstream(std::ios_base::out);
}
MMFUSE_OWN void _ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev(void* self) {
  ::new (self) std::stringstream(std::ios_base::in | std::ios_base::out);
}
#endif
}
