// Looks up one table element for each lane; no include guard, see foreach_simd.h.

// As many int32 as F64 has lanes.
using I32Half = int32_t __attribute__((vector_size(kVectorBytes / 2)));

#if MMFUSE_VECTOR_BYTES == 64

inline F32 gather(const float* table, I32 i) { return _mm512_i32gather_ps((__m512i)i, table, 4); }
inline F64 gather(const double* table, I32Half i) {
  return _mm512_i32gather_pd((__m256i)i, table, 8);
}

#elif MMFUSE_VECTOR_BYTES == 32

inline F32 gather(const float* table, I32 i) { return _mm256_i32gather_ps(table, (__m256i)i, 4); }
inline F64 gather(const double* table, I32Half i) {
  return _mm256_i32gather_pd(table, (__m128i)i, 8);
}

#else

inline F32 gather(const float* table, I32 i) {
  return F32{table[i[0]], table[i[1]], table[i[2]], table[i[3]]};
}
inline F64 gather(const double* table, I32Half i) { return F64{table[i[0]], table[i[1]]}; }

#endif
