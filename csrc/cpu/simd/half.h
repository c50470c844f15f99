// Scalar float16 and bfloat16, rounded to nearest even; the vector versions are in simd_*.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace mmfuse::cpu {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <typename to_t, typename from_t>
inline to_t bit_cast(const from_t& value) {
  static_assert(sizeof(to_t) == sizeof(from_t));
  to_t out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  uint32_t bits;
  if (magnitude >= 0x7C00u) {
    bits = 0x7F800000u | (magnitude << 13);
  } else if (magnitude >= 0x0400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {
    bits = bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
  }
  return bit_cast<float>(sign | bits);
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {
    // A subnormal: next to 0.5 a float's last place is 2^-24, so the addition does the rounding.
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3F000000u));
  }
  magnitude += 0x0FFFu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u) >> 13));
}

inline float bfloat16_to_float(uint16_t value) {
  return bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// Facts about an element type for a kernel: the type it computes in, the way there, and
// its bits as a signed integer, in which every NaN and infinity without its sign is at least
// kInfinity.
template <typename scalar_t>
struct Element;

template <>
struct Element<float> {
  using acc_t = float;
  using bits_t = int32_t;
  static constexpr DType kDType = DType::kFloat32;
  static constexpr bits_t kInfinity = 0x7F800000;
  static float widen(float x) { return x; }
};

template <>
struct Element<double> {
  using acc_t = double;
  using bits_t = int64_t;
  static constexpr DType kDType = DType::kFloat64;
  static constexpr bits_t kInfinity = 0x7FF0000000000000;
  static double widen(double x) { return x; }
};

template <>
struct Element<Half> {
  using acc_t = float;
  using bits_t = int16_t;
  static constexpr DType kDType = DType::kFloat16;
  static constexpr bits_t kInfinity = 0x7C00;
  static float widen(Half x) { return half_to_float(x.bits); }
};

template <>
struct Element<BFloat16> {
  using acc_t = float;
  using bits_t = int16_t;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr bits_t kInfinity = 0x7F80;
  static float widen(BFloat16 x) { return bfloat16_to_float(x.bits); }
};

template <typename scalar_t>
using acc_type = typename Element<scalar_t>::acc_t;

// Calls f with a null pointer of the element type, which is all a generic lambda needs.
template <typename F>
inline auto visit_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace mmfuse::cpu
