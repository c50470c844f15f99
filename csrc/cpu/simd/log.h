// Logarithms of positive normal numbers; no include guard, see foreach_simd.h.

// Cephes' polynomial on [sqrt(1/2), sqrt(2)); NaN stays NaN.
inline F32 log_of_normal(F32 x) {
  const U32 shifted = (U32)x - 0x3F3504F3u;
  const F32 exponent = __builtin_convertvector((I32)shifted >> 23, F32);
  const F32 f = (F32)((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  const F32 f2 = f * f;
  F32 p = splat(7.0376836292e-2f);
  p = multiply_add(p, f, splat(-1.1514610310e-1f));
  p = multiply_add(p, f, splat(1.1676998740e-1f));
  p = multiply_add(p, f, splat(-1.2420140846e-1f));
  p = multiply_add(p, f, splat(1.4249322787e-1f));
  p = multiply_add(p, f, splat(-1.6668057665e-1f));
  p = multiply_add(p, f, splat(2.0000714765e-1f));
  p = multiply_add(p, f, splat(-2.4999993993e-1f));
  p = multiply_add(p, f, splat(3.3333331174e-1f));
  F32 y = f * f2 * p;
  y = multiply_add(exponent, splat(-2.12194440e-4f), y);
  y = multiply_add(f2, splat(-0.5f), y);
  const F32 found = multiply_add(exponent, splat(0.693359375f), f + y);
  return x == x ? found : x;
}

inline F64 log_of_normal(F64 x) {
  for (int i = 0; i < lanes_of<double>; ++i) x[i] = std::log(x[i]);
  return x;
}
