// Built by every level from its own few operations; no include guard, see foreach_simd.h.

// x - 0 is x, whatever x is, and costs nothing; x + 0 would turn -0 into +0.
inline F32 splat(float x) { return x - F32{}; }
inline F64 splat(double x) { return x - F64{}; }
inline U64 splat(uint64_t x) { return x - U64{}; }

inline I32 lane_index() {
  I32 index{};
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

template <typename vec_t, typename T>
inline vec_t load_bits(const T* p) {
  vec_t out;
  std::memcpy(&out, p, sizeof out);
  return out;
}

// The vector, of which the compiler is not to know where it is from.
template <typename vec_t>
inline vec_t opaque(vec_t x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

inline F32 load(const float* p) { return load_bits<F32>(p); }
inline F64 load(const double* p) { return load_bits<F64>(p); }
inline F32 load(const Half* p) { return half_to_float(load_bits<U16>(p)); }
inline F32 load(const BFloat16* p) { return (F32)(widen(load_bits<U16>(p)) << 16); }

// Loads floats as vectors of the accumulator's type.
inline F32 load_as(const float* p, float) { return load(p); }
inline F64 load_as(const float* p, double) {
  return __builtin_convertvector(load_bits<F32Half>(p), F64);
}

// Two vectors in the bits that they are stored as.
inline I16 pack(F32 a, F32 b, Half) { return float_to_half(a, b); }
inline U32 round_to_bfloat16(F32 x) {
  const U32 bits = (U32)x;
  const U32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? U32{} + 0x7FC0u : rounded;
}
inline I16 pack(F32 a, F32 b, BFloat16) {
  return narrow(round_to_bfloat16(a), round_to_bfloat16(b));
}

inline void store(float* p, F32 x) { std::memcpy(p, &x, sizeof x); }
inline void store(double* p, F64 x) { std::memcpy(p, &x, sizeof x); }
template <typename scalar_t>
inline void store(scalar_t* p, F32 x) {
  const I16 bits = pack(x, x, scalar_t());
  std::memcpy(p, &bits, sizeof bits / 2);
}

template <typename scalar_t>
using vec_type = decltype(load(static_cast<const scalar_t*>(nullptr)));

template <typename scalar_t>
constexpr int lanes_of = sizeof(vec_type<scalar_t>) / sizeof(acc_type<scalar_t>);

// Copies n <= lanes elements, in pieces of a constant size: a call of memcpy would take longer.
template <typename scalar_t>
inline void copy_first(const scalar_t* from, int64_t n, scalar_t* to) {
  int64_t done = 0;
  MMFUSE_UNROLL for (int piece = lanes_of<scalar_t>; piece > 0; piece /= 2) {
    if ((n & piece) == 0) continue;
    std::memcpy(to + done, from + done, piece * sizeof(scalar_t));
    done += piece;
  }
}

// The first n <= lanes elements; the other lanes hold `rest`.
template <typename scalar_t>
inline vec_type<scalar_t> load_first(const scalar_t* p, int64_t n, acc_type<scalar_t> rest) {
  scalar_t buffer[lanes_of<scalar_t>];
  store(buffer, splat(rest));
  copy_first(p, n, buffer);
  return load(buffer);
}

template <typename scalar_t>
inline void store_first(scalar_t* p, int64_t n, vec_type<scalar_t> x) {
  scalar_t buffer[lanes_of<scalar_t>];
  store(buffer, x);
  copy_first(buffer, n, p);
}

template <typename vec_t>
inline double sum_lanes(vec_t x) {
  double sum = 0;
  for (size_t i = 0; i < sizeof(x) / sizeof(x[0]); ++i) sum += x[i];
  return sum;
}

// True if none of the elements seen, as stored, is NaN or infinite.
template <typename scalar_t>
class FiniteCheck {
 public:
  using bits_t = typename Element<scalar_t>::bits_t;
  typedef bits_t Bits __attribute__((vector_size(kVectorBytes)));

  void see(Bits bits) {
    const Bits magnitude = bits & std::numeric_limits<bits_t>::max();
    largest_ = magnitude > largest_ ? magnitude : largest_;
  }

  bool passed() const {
    bool finite = true;
    for (int i = 0; i < kVectorBytes / static_cast<int>(sizeof(bits_t)); ++i) {
      finite &= largest_[i] < Element<scalar_t>::kInfinity;
    }
    return finite;
  }

 private:
  Bits largest_{};
};
