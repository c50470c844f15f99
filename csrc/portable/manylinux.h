// Included before every source of a wheel that others get (MMFUSE_PORTABLE=1). What a compiler on a
// newer Linux would take from glibc 2.29 to 2.36 is taken from an older one, as PyTorch's wheels do.
#pragma once

#include <features.h>

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

#if defined(__GLIBC__) && defined(__cplusplus)
// Since 2.32 glibc says here if a process has one thread only, and shared_ptr counts without atomic
// instructions then. Zero is always right.
extern "C" {
__attribute__((weak, visibility("hidden"))) char __libc_single_threaded = 0;
}
#endif
