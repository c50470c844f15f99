// Exponentials of numbers that are not positive; no include guard, see foreach_simd.h.

// e^x for x <= 0, zero where that is below the smallest normal number. 2^f by Cephes' polynomial.
inline F32 exp_nonpositive(F32 x) {
  // Adding 1.5 * 2^23 rounds to an integer; the exponent's bias comes along in the low bits.
  const float kRound = 12582912.0f + 127.0f;
  const F32 rounded = multiply_add(x, splat(1.44269504f), splat(kRound));
  const F32 f = multiply_add(x, splat(1.44269504f), kRound - rounded);
  F32 p = splat(1.535336188319500e-4f);
  p = multiply_add(p, f, splat(1.339887440266574e-3f));
  p = multiply_add(p, f, splat(9.618437357674640e-3f));
  p = multiply_add(p, f, splat(5.550332471162809e-2f));
  p = multiply_add(p, f, splat(2.402264791363012e-1f));
  p = multiply_add(p, f, splat(6.931472028550421e-1f));
  p = multiply_add(p, f, splat(1.0f));
  const F32 power = (F32)((U32)rounded << 23);
  // Written so that NaN stays NaN.
  return x < -87.33654f ? F32{} : p * power;
}

// Likewise, by the Taylor polynomial of e^r, |r| <= ln(2) / 2.
inline F64 exp_nonpositive(F64 x) {
  const double kRound = 6755399441055744.0 + 1023.0;
  const F64 rounded = multiply_add(x, splat(1.4426950408889634), splat(kRound));
  const F64 n = rounded - kRound;
  // ln 2 in two parts, of which n times the first is exact.
  F64 r = multiply_add(n, splat(-6.93145751953125e-1), x);
  r = multiply_add(n, splat(-1.42860682030941723212e-6), r);
  F64 p = splat(1.0 / 6227020800.0);
  const double kInverseFactorials[] = {1.0 / 479001600.0,
                                       1.0 / 39916800.0,
                                       1.0 / 3628800.0,
                                       1.0 / 362880.0,
                                       1.0 / 40320.0,
                                       1.0 / 5040.0,
                                       1.0 / 720.0,
                                       1.0 / 120.0,
                                       1.0 / 24.0,
                                       1.0 / 6.0,
                                       0.5,
                                       1.0,
                                       1.0};
  for (const double factor : kInverseFactorials) p = multiply_add(p, r, splat(factor));
  const F64 power = (F64)((U64)rounded << 52);
  return x < -708.3964185322641 ? F64{} : p * power;
}
