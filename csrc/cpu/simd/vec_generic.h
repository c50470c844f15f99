// 128-bit vectors without intrinsics: SSE2, NEON or whatever the compiler has.

inline F32 multiply_add(F32 a, F32 b, F32 c) { return a * b + c; }
inline F64 multiply_add(F64 a, F64 b, F64 c) { return a * b + c; }

// b where a or b is NaN.
inline F32 maximum(F32 a, F32 b) { return a > b ? a : b; }

inline F32 square_root(F32 x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
}

// Full products of the even 32-bit lanes; the odd lanes are ignored.
inline U64 multiply_even(U64 a, U64 b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }

// Even 32-bit lanes of `even`, odd ones of `odd`.
inline U64 blend_odd(U64 even, U64 odd) {
  return (even & 0xFFFFFFFFu) | (odd & 0xFFFFFFFF00000000u);
}

// Interleave the lower or the upper halves of each 128 bits.
inline F32 unpack_low(F32 a, F32 b) { return F32{a[0], b[0], a[1], b[1]}; }
inline F32 unpack_high(F32 a, F32 b) { return F32{a[2], b[2], a[3], b[3]}; }

inline F32 to_float(U32 x) { return __builtin_convertvector(x, F32); }

inline U32 widen(U16 x) { return __builtin_convertvector(x, U32); }

// The lanes of a, then those of b; the upper 16 bits of each must be zero.
inline I16 narrow(U32 a, U32 b) {
  I16 out;
  for (int i = 0; i < kLanes; ++i) {
    out[i] = static_cast<int16_t>(a[i]);
    out[kLanes + i] = static_cast<int16_t>(b[i]);
  }
  return out;
}

inline F32 half_to_float(U16 x) {
  F32 out;
  for (int i = 0; i < kLanes; ++i) out[i] = cpu::half_to_float(x[i]);
  return out;
}

inline I16 float_to_half(F32 a, F32 b) {
  I16 out;
  for (int i = 0; i < kLanes; ++i) {
    out[i] = static_cast<int16_t>(cpu::float_to_half(a[i]));
    out[kLanes + i] = static_cast<int16_t>(cpu::float_to_half(b[i]));
  }
  return out;
}
