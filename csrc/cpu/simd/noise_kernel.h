// The normal deviates of common/philox.h, many at a time; no include guard, see foreach_simd.h.
//
// The work goes through four loops with buffers in L1 between them. In one loop the chain of
// dependent instructions is longer than a processor looks ahead, and most of it stands idle.

// Groups of Philox blocks that are computed side by side, to hide the multiplier's latency.
constexpr int kGroups = 4;
// Blocks sit in the 64-bit lanes, because the multiplication takes and gives those.
constexpr int kGroupBlocks = kVectorBytes / 8;
constexpr int64_t kDrawBlocks = kGroups * kGroupBlocks;

// Blocks in the order in which interleaving within 128 bits puts the elements in sequence.
inline U64 block_order() {
  U64 order{};
  for (int i = 0; i < kGroupBlocks; ++i) order[i] = i / 2 + (i % 2) * (kGroupBlocks / 2);
  return order;
}

// The same in every block: the round keys, and the first three rounds as far as
// they see only the upper counter words.
struct PhiloxConstants {
  U64 m0 = splat(uint64_t{kPhiloxM0});
  U64 m1 = splat(uint64_t{kPhiloxM1});
  U64 x2_first, x0_second, x2_second, x2_third;
  U64 k0[kPhiloxRounds], k1[kPhiloxRounds];
  U64 k_last;

  PhiloxConstants(const NoiseKey& key, uint32_t block_high) {
    uint64_t key0[kPhiloxRounds], key1[kPhiloxRounds];
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      key0[round] = static_cast<uint32_t>(key.seed) + round * kPhiloxW0;
      key1[round] = static_cast<uint32_t>(key.seed >> 32) + round * kPhiloxW1;
      k0[round] = splat(key0[round]);
      k1[round] = splat(key1[round]);
    }
    const uint64_t p1 = uint64_t{kPhiloxM1} * key.stream_id;
    const uint64_t p0 = kPhiloxM0 * ((p1 >> 32) ^ block_high ^ key0[0]);
    x2_first = splat(key.step ^ key1[0]);
    x0_second = splat(static_cast<uint32_t>(p1) ^ key0[1]);
    x2_second = splat((p0 >> 32) ^ key1[1]);
    x2_third = splat(static_cast<uint32_t>(p0) ^ key1[2]);
    k_last = splat(key0[kPhiloxRounds - 1] | key1[kPhiloxRounds - 1] << 32);
  }
};

// Philox of the blocks first, first + 1, ... (lower counter words). A lane of `radius` gets the
// words x0 and x2 of its block, one of `angle` x1 and x3. The words themselves may carry garbage
// above bit 31, which the next multiplication ignores.
inline void philox(const PhiloxConstants& c, U64 first, U64 (&radius)[kGroups],
                   U64 (&angle)[kGroups]) {
  U64 x0[kGroups], x1[kGroups], x2[kGroups], x3[kGroups];
  MMFUSE_UNROLL for (int g = 0; g < kGroups; ++g) {
    U64 p0 = multiply_even(first + static_cast<uint64_t>(g * kGroupBlocks), c.m0);
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
  MMFUSE_UNROLL for (int round = 3; round < kPhiloxRounds - 1; ++round) {
    MMFUSE_UNROLL for (int g = 0; g < kGroups; ++g) {
      const U64 p0 = multiply_even(x0[g], c.m0);
      const U64 p1 = multiply_even(x2[g], c.m1);
      x0[g] = (p1 >> 32) ^ x1[g] ^ c.k0[round];
      x2[g] = (p0 >> 32) ^ x3[g] ^ c.k1[round];
      x1[g] = p1;
      x3[g] = p0;
    }
  }
  MMFUSE_UNROLL for (int g = 0; g < kGroups; ++g) {
    const U64 p0 = multiply_even(x0[g], c.m0);
    const U64 p1 = multiply_even(x2[g], c.m1);
    radius[g] = blend_odd(p1 >> 32, p0) ^ blend_odd(x1[g], x3[g] << 32) ^ c.k_last;
    angle[g] = blend_odd(p1, p0 << 32);
  }
}

inline F32 uniform_from_bits(U32 x) {
  return multiply_add(to_float(x), splat(2.3283064365386963e-10f), splat(1.1641532182693481e-10f));
}

// u = 2^exponent * (1 + fraction) with 1 + fraction in [sqrt(1/2), sqrt(2)).
inline void split_uniform(F32 u, F32* exponent, F32* fraction) {
  const U32 shifted = (U32)u - 0x3F3504F3u;
  *exponent = __builtin_convertvector((I32)shifted >> 23, F32);
  *fraction = (F32)((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
}

// -2 ln(u): log_normal_range with every term doubled and negated, which rounds the same.
inline F32 minus_two_log(F32 exponent, F32 f) {
  const F32 f2 = f * f;
  F32 p = splat(-2 * 7.0376836292e-2f);
  p = multiply_add(p, f, splat(-2 * -1.1514610310e-1f));
  p = multiply_add(p, f, splat(-2 * 1.1676998740e-1f));
  p = multiply_add(p, f, splat(-2 * -1.2420140846e-1f));
  p = multiply_add(p, f, splat(-2 * 1.4249322787e-1f));
  p = multiply_add(p, f, splat(-2 * -1.6668057665e-1f));
  p = multiply_add(p, f, splat(-2 * 2.0000714765e-1f));
  p = multiply_add(p, f, splat(-2 * -2.4999993993e-1f));
  p = multiply_add(p, f, splat(-2 * 3.3333331174e-1f));
  F32 y = f * f2 * p;
  y = multiply_add(exponent, splat(-2 * -2.12194440e-4f), y);
  y = f2 + y;
  return multiply_add(exponent, splat(-2 * 0.693359375f), multiply_add(f, splat(-2.0f), y));
}

// (cos, sin) of 2 pi x / 2^32. Takes the quadrant from the integer, which spares the rounding of
// uniform_from_bits; at a radius of 6 that moves a deviate by 1e-6.
inline void cos_sin_turn(U32 bits, F32* cos_out, F32* sin_out) {
  const F32 x = __builtin_convertvector((I32)(bits << 2), F32) * (6.2831853071795865f * 0x1p-34f);
  const F32 x2 = x * x;
  F32 s = splat(-1.9515295891e-4f);
  s = multiply_add(s, x2, splat(8.3321608736e-3f));
  s = multiply_add(s, x2, splat(-1.6666654611e-1f));
  s = multiply_add(s * x2, x, x);
  F32 c = splat(2.443315711809948e-5f);
  c = multiply_add(c, x2, splat(-1.388731625493765e-3f));
  c = multiply_add(c, x2, splat(4.166664568298827e-2f));
  c = multiply_add(c * x2, x2, multiply_add(x2, splat(-0.5f), splat(1.0f)));
  // The nearest quadrant in bits 31 and 30, and the one after it.
  const U32 quadrant = bits + 0x20000000u;
  const U32 next = bits + 0x60000000u;
  const I32 odd = (I32)(quadrant << 1);
  *cos_out = (F32)((U32)(odd < 0 ? s : c) ^ (next & 0x80000000u));
  *sin_out = (F32)((U32)(odd < 0 ? c : s) ^ (quadrant & 0x80000000u));
}

// The deviates of one tensor, a tile at a time.
class NormalSource {
 public:
  static constexpr int64_t kTile = 1024;
  // Elements that share their upper counter word; a tile must not go past a multiple of it.
  static constexpr int64_t kSpan = kNoiseBlock * (int64_t{1} << 32);

  NormalSource(const NoiseKey& key, int64_t element)
      : key_(key), span_(element / kSpan), constants_(key, static_cast<uint32_t>(span_)) {}

  // The deviates of n <= kTile elements from `element` on, valid until the next call. Meanwhile
  // fetches the elements themselves: a processor's own prefetching stops at each tile's end.
  template <typename scalar_t>
  const float* draw(int64_t element, int64_t n, const scalar_t* elements) {
    if (element / kSpan != span_) {
      span_ = element / kSpan;
      constants_ = PhiloxConstants(key_, static_cast<uint32_t>(span_));
    }
    const int64_t lead = element % kNoiseBlock;
    const int64_t blocks = (lead + n + kNoiseBlock - 1) / kNoiseBlock;
    draw_bits(element / kNoiseBlock, blocks, elements);
    // A block has two pairs of a radius and an angle.
    for (int64_t i = 0; i < 2 * blocks; i += kLanes) {
      F32 exponent, fraction;
      split_uniform(uniform_from_bits((U32)load(radius_ + i)), &exponent, &fraction);
      store(exponent_ + i, exponent);
      store(radius_ + i, fraction);
    }
    for (int64_t i = 0; i < 2 * blocks; i += kLanes) {
      store(radius_ + i, square_root(minus_two_log(load(exponent_ + i), load(radius_ + i))));
    }
    for (int64_t i = 0; i < 2 * blocks; i += kLanes) {
      F32 cos, sin;
      cos_sin_turn((U32)load(angle_ + i), &cos, &sin);
      const F32 r = load(radius_ + i);
      store(normals_ + 2 * i, unpack_low(r * cos, r * sin));
      store(normals_ + 2 * i + kLanes, unpack_high(r * cos, r * sin));
    }
    return normals_ + lead;
  }

 private:
  template <typename scalar_t>
  void draw_bits(uint64_t first_block, int64_t blocks, const scalar_t* elements) {
    const U64 first = block_order() + uint64_t{static_cast<uint32_t>(first_block)};
    for (int64_t i = 0; i < blocks; i += kDrawBlocks) {
      constexpr int64_t kLine = 64 / sizeof(scalar_t);
      MMFUSE_UNROLL for (int64_t e = 0; e < kNoiseBlock * kDrawBlocks; e += kLine) {
        __builtin_prefetch(elements + kNoiseBlock * i + e, 1);
      }
      U64 radius[kGroups], angle[kGroups];
      philox(constants_, first + static_cast<uint64_t>(i), radius, angle);
      MMFUSE_UNROLL for (int g = 0; g < kGroups; ++g) {
        store(radius_ + 2 * i + g * kLanes, (F32)radius[g]);
        store(angle_ + 2 * i + g * kLanes, (F32)angle[g]);
      }
    }
  }

  // More than a tile by an unaligned start and the rest of a last draw.
  static constexpr int64_t kBuffer = kTile + kNoiseBlock * (1 + kDrawBlocks);

  NoiseKey key_;
  int64_t span_;
  PhiloxConstants constants_;
  // Bits at first, the deviates' radii in the end.
  float radius_[kBuffer / 2];
  float angle_[kBuffer / 2];
  float exponent_[kBuffer / 2];
  float normals_[kBuffer];
};
