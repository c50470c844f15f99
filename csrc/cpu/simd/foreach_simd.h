// Compiles the header named by MMFUSE_KERNEL once per instruction set, in the namespaces generic,
// avx2 and avx512. Include this last: whatever a kernel needs must be compiled before the first
// target pragma, or the linker could keep an AVX-512 copy of a std function for every machine.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/dtype.h"
#include "common/moments.h"
#include "common/philox.h"
#include "half.h"
#include "simd.h"

#if MMFUSE_X86
#if !defined(__clang__)
// GCC 12 takes its own _mm512_undefined_ps for a mistake (PR 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#define MMFUSE_VECTOR_BYTES 16
namespace mmfuse::cpu::generic {
// The order is fixed: types, the level's own operations, what is built from them.
// clang-format off
#include "vec_types.h"
#include "vec_generic.h"
#include "vec.h"
#include MMFUSE_KERNEL
// clang-format on
}  // namespace mmfuse::cpu::generic
#undef MMFUSE_VECTOR_BYTES

#if MMFUSE_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define MMFUSE_VECTOR_BYTES 32
namespace mmfuse::cpu::avx2 {
// clang-format off
#include "vec_types.h"
#include "vec_avx2.h"
#include "vec.h"
#include MMFUSE_KERNEL
// clang-format on
}  // namespace mmfuse::cpu::avx2
#undef MMFUSE_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define MMFUSE_VECTOR_BYTES 64
namespace mmfuse::cpu::avx512 {
// clang-format off
#include "vec_types.h"
#include "vec_avx512.h"
#include "vec.h"
#include MMFUSE_KERNEL
// clang-format on
}  // namespace mmfuse::cpu::avx512
#undef MMFUSE_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // MMFUSE_X86
