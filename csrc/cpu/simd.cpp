#include "simd.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace mmfuse::cpu {
namespace {

bool runs_here(SimdLevel level) {
#if MMFUSE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (level == SimdLevel::kAvx2) return avx2;
  if (level == SimdLevel::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return level == SimdLevel::kGeneric;
}

SimdLevel choose_level() {
  const SimdLevel levels[] = {SimdLevel::kAvx512, SimdLevel::kAvx2, SimdLevel::kGeneric};
  const char* wanted = std::getenv("MMFUSE_SIMD");
  for (const SimdLevel level : levels) {
    const bool named = wanted != nullptr && std::string(wanted) == simd_level_name(level);
    if ((wanted == nullptr || named) && runs_here(level)) return level;
  }
  throw std::runtime_error(std::string("MMFUSE_SIMD=") + wanted +
                           " is not one of generic, avx2, avx512, or this machine cannot run it");
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
