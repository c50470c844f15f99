// The instruction sets that the CPU kernels are compiled for, side by side, in one library.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define MMFUSE_X86 1
#else
#define MMFUSE_X86 0
#endif

// Before a loop over a few vectors that must stay in registers.
#if defined(__clang__)
#define MMFUSE_UNROLL _Pragma("unroll")
#else
#define MMFUSE_UNROLL _Pragma("GCC unroll 8")
#endif

namespace mmfuse::cpu {

enum class SimdLevel { kGeneric, kAvx2, kAvx512 };

// The widest level that this machine runs, or the one named by MMFUSE_SIMD; decided once.
SimdLevel simd_level();

const char* simd_level_name(SimdLevel level);

}  // namespace mmfuse::cpu

// The address of `function` as compiled for the chosen level; see foreach_simd.h.
#if MMFUSE_X86
#define MMFUSE_SIMD_SELECT(function)                                     \
  (simd_level() == SimdLevel::kAvx512 ? &::mmfuse::cpu::avx512::function \
   : simd_level() == SimdLevel::kAvx2 ? &::mmfuse::cpu::avx2::function   \
                                      : &::mmfuse::cpu::generic::function)
#else
#define MMFUSE_SIMD_SELECT(function) (&::mmfuse::cpu::generic::function)
#endif
