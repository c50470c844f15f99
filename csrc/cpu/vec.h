// What every level builds from its own few operations; no include guard, see foreach_simd.h.

inline F32 splat(float x) { return F32{} + x; }
inline F64 splat(double x) { return F64{} + x; }
inline U64 splat(uint64_t x) { return U64{} + x; }

inline F32 absolute(F32 x) { return (F32)((U32)x & 0x7FFFFFFFu); }
inline F64 absolute(F64 x) { return (F64)((U64)x & 0x7FFFFFFFFFFFFFFFu); }

template <typename vec_t, typename T>
inline vec_t load_bits(const T* p) {
  vec_t out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

inline F32 load(const float* p) { return load_bits<F32>(p); }
inline F64 load(const double* p) { return load_bits<F64>(p); }
inline F32 load(const Half* p) { return half_to_float(load_bits<U16>(p)); }
inline F32 load(const BFloat16* p) {
  return (F32)(__builtin_convertvector(load_bits<U16>(p), U32) << 16);
}

// Loads floats as vectors of the accumulator's type.
inline F32 load_as(const float* p, float) { return load(p); }
inline F64 load_as(const float* p, double) {
  return __builtin_convertvector(load_bits<F32Half>(p), F64);
}

inline void store(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }
inline void store(double* p, F64 x) { std::memcpy(p, &x, sizeof x); }
inline void store(Half* p, F32 x) {
  const U16 bits = float_to_half(x);
  std::memcpy(p, &bits, sizeof bits);
}
inline void store(BFloat16* p, F32 x) {
  const U32 bits = (U32)x;
  const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const U32 is_nan = (U32)(x != x);
  const U16 out = narrow((rounded & ~is_nan) | (is_nan & 0x7FC0u));
  std::memcpy(p, &out, sizeof out);
}

template <typename scalar_t>
using vec_type = decltype(load(static_cast<const scalar_t*>(nullptr)));

template <typename scalar_t>
constexpr int lanes_of = sizeof(vec_type<scalar_t>) / sizeof(acc_type<scalar_t>);

// The first n < lanes elements; the other lanes hold `rest`.
template <typename scalar_t>
inline vec_type<scalar_t> load_first(const scalar_t* p, int64_t n, acc_type<scalar_t> rest) {
  scalar_t buffer[lanes_of<scalar_t>];
  store(buffer, splat(rest));
  std::memcpy(buffer, p, n * sizeof(scalar_t));
  return load(buffer);
}

template <typename scalar_t>
inline void store_first(scalar_t* p, int64_t n, vec_type<scalar_t> x) {
  scalar_t buffer[lanes_of<scalar_t>];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(scalar_t));
}

template <typename vec_t>
inline double sum_lanes(vec_t x) {
  double sum = 0;
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) sum += x[i];
  return sum;
}

template <typename mask_t>
inline bool any_lane(mask_t mask) {
  auto any = mask[0];
  for (size_t i = 1; i < sizeof(mask) / sizeof(mask[0]); ++i) any |= mask[i];
  return any != 0;
}
