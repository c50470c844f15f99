#include "simd.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if MMFUSE_X86
#include <cpuid.h>
#endif

namespace mmfuse::cpu {
namespace {

constexpr SimdLevel kLevels[] = {SimdLevel::kAvx512, SimdLevel::kAvx2, SimdLevel::kGeneric};

#if MMFUSE_X86
// Not every clang knows "f16c" as an argument of __builtin_cpu_supports.
bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool runs_here(SimdLevel level) {
#if MMFUSE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (level == SimdLevel::kAvx2) return avx2;
  if (level == SimdLevel::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return level == SimdLevel::kGeneric;
}

SimdLevel choose_level() {
  const char* wanted = std::getenv("MMFUSE_SIMD");
  std::string available;
  for (const SimdLevel level : kLevels) {
    if (!runs_here(level)) continue;
    if (wanted == nullptr || std::string(wanted) == simd_level_name(level)) return level;
    available += std::string(available.empty() ? "" : ", ") + simd_level_name(level);
  }
  throw std::runtime_error("mmfuse: MMFUSE_SIMD=" + std::string(wanted) +
                           " cannot run here; this machine and build have " + available);
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = choose_level();
  return level;
}

const char* simd_level_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kAvx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace mmfuse::cpu
