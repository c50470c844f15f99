// 256-bit vectors: AVX2, FMA and F16C. See vec_generic.h for each function.

inline F32 multiply_add(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F64 multiply_add(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }

inline F32 maximum(F32 a, F32 b) { return _mm256_max_ps(a, b); }

inline F32 square_root(F32 x) { return _mm256_sqrt_ps(x); }

inline U64 multiply_even(U64 a, U64 b) { return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b); }

inline U64 blend_odd(U64 even, U64 odd) {
  return (U64)_mm256_blend_epi32((__m256i)even, (__m256i)odd, 0xAA);
}

inline F32 unpack_low(F32 a, F32 b) { return _mm256_unpacklo_ps(a, b); }
inline F32 unpack_high(F32 a, F32 b) { return _mm256_unpackhi_ps(a, b); }

inline F32 to_float(U32 x) {
  // AVX2 converts signed integers only. Both halves are exact, so this rounds once, like a cast.
  const F32 high = _mm256_cvtepi32_ps((__m256i)(x >> 16));
  const F32 low = _mm256_cvtepi32_ps(_mm256_blend_epi16((__m256i)x, _mm256_setzero_si256(), 0xAA));
  return _mm256_fmadd_ps(high, _mm256_set1_ps(65536.0f), low);
}

inline U32 widen(U16 x) { return (U32)_mm256_cvtepu16_epi32((__m128i)x); }

inline I16 narrow(U32 a, U32 b) {
  // Packing works within 128 bits, so the middle quarters change places.
  const __m256i packed = _mm256_packus_epi32((__m256i)a, (__m256i)b);
  return (I16)_mm256_permute4x64_epi64(packed, 0xD8);
}

inline F32 half_to_float(U16 x) { return _mm256_cvtph_ps((__m128i)x); }

inline I16 float_to_half(F32 a, F32 b) {
  const __m128i low = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT);
  return (I16)_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}
