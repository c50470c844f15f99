// Shares of samples, from 0 to 1, added up so that the order does not matter.
#pragma once

#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

namespace mmfuse::cuda {

using Sum = unsigned long long;

// Shares are added as integers: atomic additions of these are native in shared memory, and their
// order does not matter. A float32 share s is the number round(2^31 s) in two words of 16 and 15
// bits, each with room for 2^16 of them.
template <typename acc_t>
struct Shares {
  static constexpr int kWords = 2;
  static constexpr int kLowBits = 15;
  static constexpr float kUnit = 2147483648.0f;
  using sum_t = Sum;

  __device__ static void add(uint32_t* cell, int stride, float share) {
    const uint32_t bits = __float2uint_rn(share * kUnit);
    atomicAdd(cell, bits >> kLowBits);
    atomicAdd(cell + stride, bits & ((1u << kLowBits) - 1));
  }
  __device__ static sum_t load(const uint32_t* cell, int stride) {
    return (static_cast<sum_t>(cell[0]) << kLowBits) + cell[stride];
  }
  __device__ static void add(Sum* sum, float share) {
    atomicAdd(sum, static_cast<Sum>(__float2uint_rn(share * kUnit)));
  }
  __device__ static void add(Sum* sum, sum_t share) {
    if (share != 0) atomicAdd(sum, share);
  }
  __device__ static sum_t load(const Sum* sum) { return *sum; }
  __device__ static float value(sum_t sum) {
    return static_cast<float>(static_cast<double>(sum) * (1.0 / kUnit));
  }
};

// A sum of numbers below 2^54: high * 2^32 + low.
struct WideSum {
  Sum high = 0;
  Sum low = 0;

  __device__ void operator+=(const WideSum& other) {
    high += other.high;
    low += other.low;
  }
};

// A float64 share is round(2^53 s), three words of 18, 18 and 18 bits with room for 2^14 of them.
template <>
struct Shares<double> {
  static constexpr int kWords = 3;
  static constexpr int kWordBits = 18;
  static constexpr Sum kMask = (1u << kWordBits) - 1;
  static constexpr double kUnit = 9007199254740992.0;
  using sum_t = WideSum;

  __device__ static void add(uint32_t* cell, int stride, double share) {
    const Sum bits = static_cast<Sum>(rint(share * kUnit));
    atomicAdd(cell, static_cast<uint32_t>(bits >> 2 * kWordBits));
    atomicAdd(cell + stride, static_cast<uint32_t>(bits >> kWordBits & kMask));
    atomicAdd(cell + 2 * stride, static_cast<uint32_t>(bits & kMask));
  }
  __device__ static sum_t load(const uint32_t* cell, int stride) {
    // The first word counts 2^36, which is 16 of the high part.
    const Sum rest = (static_cast<Sum>(cell[stride]) << kWordBits) + cell[2 * stride];
    return split(rest, static_cast<Sum>(cell[0]) << (2 * kWordBits - 32));
  }
  __device__ static void add(Sum* sum, double share) {
    add(sum, split(static_cast<Sum>(rint(share * kUnit)), 0));
  }
  __device__ static void add(Sum* sum, const sum_t& share) {
    if (share.high != 0) atomicAdd(sum, share.high);
    if (share.low != 0) atomicAdd(sum + 1, share.low);
  }
  __device__ static sum_t load(const Sum* sum) { return {sum[0], sum[1]}; }
  __device__ static double value(const sum_t& sum) {
    return (static_cast<double>(sum.high) * 4294967296.0 + static_cast<double>(sum.low)) *
           (1.0 / kUnit);
  }

 private:
  __device__ static sum_t split(Sum number, Sum high) {
    return {high + (number >> 32), number & 0xFFFFFFFFu};
  }
};

// 8-byte words that a problem's cell has in what the blocks have added up.
template <typename acc_t>
constexpr int kSumWords = sizeof(typename Shares<acc_t>::sum_t) / sizeof(Sum);

}  // namespace mmfuse::cuda
