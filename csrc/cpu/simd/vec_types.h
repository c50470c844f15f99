// Vector types of one instruction set; no include guard, see foreach_simd.h. Arithmetic, bit
// operations and comparisons are the compiler's own operators on these types.
constexpr int kVectorBytes = MMFUSE_VECTOR_BYTES;
constexpr int kLanes = kVectorBytes / 4;

using F32 = float __attribute__((vector_size(kVectorBytes)));
using I32 = int32_t __attribute__((vector_size(kVectorBytes)));
using U32 = uint32_t __attribute__((vector_size(kVectorBytes)));
using F64 = double __attribute__((vector_size(kVectorBytes)));
using I64 = int64_t __attribute__((vector_size(kVectorBytes)));
using U64 = uint64_t __attribute__((vector_size(kVectorBytes)));
using I16 = int16_t __attribute__((vector_size(kVectorBytes)));
// Vectors of as many 16-bit or 32-bit values as F32 or F64 has lanes.
using U16 = uint16_t __attribute__((vector_size(kVectorBytes / 2)));
using F32Half = float __attribute__((vector_size(kVectorBytes / 2)));
