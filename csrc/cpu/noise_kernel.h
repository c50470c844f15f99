// The normal deviates of common/philox.h, many at a time; no include guard, see foreach_simd.h.
// Blocks sit in the 64-bit lanes, because the multiplication takes and gives those; what Philox
// leaves above bit 31 is garbage that the next multiplication ignores.

// Two independent groups of blocks hide the latency of the multiplications.
constexpr int kNoiseGroups = 2;
constexpr int kGroupBlocks = kVectorBytes / 8;
constexpr int kDrawBlocks = kNoiseGroups * kGroupBlocks;
constexpr int kDrawElements = kNoiseBlock * kDrawBlocks;

// Blocks in the order in which interleaving within 128 bits puts the elements in sequence.
inline U64 block_order() {
  U64 order{};
  for (int i = 0; i < kGroupBlocks; ++i) order[i] = i / 2 + (i % 2) * (kGroupBlocks / 2);
  return order;
}

inline U64 splat_u64(uint64_t x) { return U64{} + x; }

// All that stays the same from block to block: the round keys, and the first three rounds as far
// as they see only the upper counter words.
struct PhiloxConstants {
  U64 m0 = splat_u64(kPhiloxM0);
  U64 m1 = splat_u64(kPhiloxM1);
  U64 x2_first;
  U64 x0_second;
  U64 x2_second;
  U64 x2_third;
  U64 k0[kPhiloxRounds];
  U64 k1[kPhiloxRounds];
  U64 last;

  PhiloxConstants(const NoiseKey& key, uint32_t block_high) {
    uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      key0[round] = static_cast<uint32_t>(key.seed) + round * kPhiloxW0;
      key1[round] = static_cast<uint32_t>(key.seed >> 32) + round * kPhiloxW1;
      k0[round] = splat_u64(key0[round]);
      k1[round] = splat_u64(key1[round]);
    }
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * key.stream_id;
    const uint32_t x0 = static_cast<uint32_t>(p1 >> 32) ^ block_high ^ key0[0];
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x0;
    x2_first = splat_u64(key.step ^ key1[0]);
    x0_second = splat_u64(static_cast<uint32_t>(p1) ^ key0[1]);
    x2_second = splat_u64(static_cast<uint32_t>(p0 >> 32) ^ key1[1]);
    x2_third = splat_u64(static_cast<uint32_t>(p0) ^ key1[2]);
    last = splat_u64(key0[kPhiloxRounds - 1] |
                     static_cast<uint64_t>(key1[kPhiloxRounds - 1]) << 32);
  }
};

// Philox of the blocks in `block_low`. Even and odd lanes of `radius` are the words x0 and x2,
// those of `angle` x1 and x3.
inline void philox(const PhiloxConstants& c, const U64 (&block_low)[kNoiseGroups],
                   U64 (&radius)[kNoiseGroups], U64 (&angle)[kNoiseGroups]) {
  U64 x0[kNoiseGroups], x1[kNoiseGroups], x2[kNoiseGroups], x3[kNoiseGroups];
  for (int g = 0; g < kNoiseGroups; ++g) {
    U64 p0 = multiply_even(block_low[g], c.m0);
    U64 p1 = multiply_even((p0 >> 32) ^ c.x2_first, c.m1);
    x0[g] = (p1 >> 32) ^ c.x0_second;
    x2[g] = p0 ^ c.x2_second;
    x1[g] = p1;
    p0 = multiply_even(x0[g], c.m0);
    p1 = multiply_even(x2[g], c.m1);
    x0[g] = (p1 >> 32) ^ x1[g] ^ c.k0[2];
    x2[g] = (p0 >> 32) ^ c.x2_third;
    x1[g] = p1;
    x3[g] = p0;
  }
  for (int round = 3; round < kPhiloxRounds - 1; ++round) {
    for (int g = 0; g < kNoiseGroups; ++g) {
      const U64 p0 = multiply_even(x0[g], c.m0);
      const U64 p1 = multiply_even(x2[g], c.m1);
      x0[g] = (p1 >> 32) ^ x1[g] ^ c.k0[round];
      x2[g] = (p0 >> 32) ^ x3[g] ^ c.k1[round];
      x1[g] = p1;
      x3[g] = p0;
    }
  }
  for (int g = 0; g < kNoiseGroups; ++g) {
    const U64 p0 = multiply_even(x0[g], c.m0);
    const U64 p1 = multiply_even(x2[g], c.m1);
    radius[g] = blend_odd(p1 >> 32, p0) ^ blend_odd(x1[g], x3[g] << 32) ^ c.last;
    angle[g] = blend_odd(p1, p0 << 32);
  }
}

inline F32 uniform_from_bits(U32 x) {
  return multiply_add(to_float(x), splat(2.3283064365386963e-10f), splat(1.1641532182693481e-10f));
}

inline F32 log_normal_range(F32 u) {
  const U32 shifted = (U32)u - 0x3F3504F3u;
  const F32 e = __builtin_convertvector((I32)shifted >> 23, F32);
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
  y = multiply_add(e, splat(-2.12194440e-4f), y);
  y = multiply_add(f2, splat(-0.5f), y);
  return multiply_add(e, splat(0.693359375f), f + y);
}

inline void cos_sin_turn(F32 u, F32* cos_out, F32* sin_out) {
  // Adding 1.5 * 2^23 rounds to an integer and leaves its low bits at the bottom of the float.
  const F32 rounded = multiply_add(u, splat(4.0f), splat(12582912.0f));
  const F32 q = rounded - 12582912.0f;
  const F32 x = multiply_add(q, splat(-0.25f), u) * 6.2831853071795865f;
  const F32 x2 = x * x;
  F32 s = splat(-1.9515295891e-4f);
  s = multiply_add(s, x2, splat(8.3321608736e-3f));
  s = multiply_add(s, x2, splat(-1.6666654611e-1f));
  s = multiply_add(s * x2, x, x);
  F32 c = splat(2.443315711809948e-5f);
  c = multiply_add(c, x2, splat(-1.388731625493765e-3f));
  c = multiply_add(c, x2, splat(4.166664568298827e-2f));
  c = multiply_add(c * x2, x2, multiply_add(x2, splat(-0.5f), splat(1.0f)));
  const U32 quadrant = (U32)rounded;
  const I32 odd = (I32)(quadrant << 31);
  const U32 cos_sign = ((quadrant + 1) << 30) & 0x80000000u;
  const U32 sin_sign = (quadrant << 30) & 0x80000000u;
  *cos_out = (F32)((U32)(odd < 0 ? s : c) ^ cos_sign);
  *sin_out = (F32)((U32)(odd < 0 ? c : s) ^ sin_sign);
}

// Fills z with the deviates of `blocks` blocks from `first_block` on. Writes whole draws, so z
// needs room for kDrawElements more.
inline void fill_normals(float* z, const NoiseKey& key, uint64_t first_block, int64_t blocks) {
  while (blocks > 0) {
    // The upper counter word is a constant of the run; one word holds 2^34 elements.
    const uint32_t low = static_cast<uint32_t>(first_block);
    const int64_t run = std::min<int64_t>(blocks, (int64_t{1} << 32) - low);
    const PhiloxConstants constants(key, static_cast<uint32_t>(first_block >> 32));
    U64 block_low[kNoiseGroups];
    for (int g = 0; g < kNoiseGroups; ++g) block_low[g] = block_order() + (low + g * kGroupBlocks);
    const int64_t draws = (run + kDrawBlocks - 1) / kDrawBlocks;
    // Two loops with a buffer between them: as one, the chain of dependent instructions is longer
    // than the processor looks ahead.
    for (int64_t i = 0; i < draws; ++i) {
      U64 radius[kNoiseGroups], angle[kNoiseGroups];
      philox(constants, block_low, radius, angle);
      for (int g = 0; g < kNoiseGroups; ++g) {
        float* at = z + i * kDrawElements + g * 2 * kLanes;
        store(at, (F32)radius[g]);
        store(at + kLanes, (F32)angle[g]);
        block_low[g] += kDrawBlocks;
      }
    }
    for (int64_t i = 0; i < draws * kNoiseGroups; ++i) {
      float* at = z + i * 2 * kLanes;
      const F32 u = uniform_from_bits((U32)load(at));
      const F32 r = square_root(log_normal_range(u) * -2.0f);
      F32 c, s;
      cos_sin_turn(uniform_from_bits((U32)load(at + kLanes)), &c, &s);
      store(at, unpack_low(r * c, r * s));
      store(at + kLanes, unpack_high(r * c, r * s));
    }
    z += run * kNoiseBlock;
    first_block += run;
    blocks -= run;
  }
}
