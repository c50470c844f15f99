// The facts that libmmfuse_cpu.so exports about itself: one a line, a key and its value. Read with
// ctypes.
#include <exception>
#include <string>

#include "cpu/simd/simd.h"
#include "glue/poison.h"

namespace {

std::string facts() {
  std::string text = "simd_built generic";
#if MMFUSE_X86
  text += " avx2 avx512";
#endif
  text += "\nsimd ";
  // An exception must not reach C; the first call of an op raises it.
  try {
    text += mmfuse::cpu::simd_level_name(mmfuse::cpu::simd_level());
  } catch (const std::exception& error) {
    text += std::string("none: ") + error.what();
  }
  return text + "\nsources " MMFUSE_SOURCES "\n";
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* mmfuse_cpu_facts() {
  static const std::string text = facts();
  return text.c_str();
}

extern "C" __attribute__((visibility("default"))) void mmfuse_cpu_poison(int on) {
  mmfuse::poisons = on != 0;
}
