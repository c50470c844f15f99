// 512-bit vectors: AVX-512 F, BW, DQ, VL. See vec_generic.h for each function.

inline F32 multiply_add(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F64 multiply_add(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }

inline F32 maximum(F32 a, F32 b) { return _mm512_max_ps(a, b); }

inline F32 square_root(F32 x) { return _mm512_sqrt_ps(x); }

inline U64 multiply_even(U64 a, U64 b) { return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b); }

inline U64 blend_odd(U64 even, U64 odd) {
  return (U64)_mm512_mask_blend_epi32(0xAAAA, (__m512i)even, (__m512i)odd);
}

inline F32 unpack_low(F32 a, F32 b) { return _mm512_unpacklo_ps(a, b); }
inline F32 unpack_high(F32 a, F32 b) { return _mm512_unpackhi_ps(a, b); }

inline F32 to_float(U32 x) { return _mm512_cvtepu32_ps((__m512i)x); }

inline U32 widen(U16 x) { return (U32)_mm512_cvtepu16_epi32((__m256i)x); }

inline I16 narrow(U32 a, U32 b) {
  const __m256i low = _mm512_cvtepi32_epi16((__m512i)a);
  const __m256i high = _mm512_cvtepi32_epi16((__m512i)b);
  return (I16)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline F32 half_to_float(U16 x) { return _mm512_cvtph_ps((__m256i)x); }

inline I16 float_to_half(F32 a, F32 b) {
  const __m256i low = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
  return (I16)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
