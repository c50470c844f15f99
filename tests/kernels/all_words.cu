// Every random word through the noise's Box-Muller transform, against the noise contract:
// |z - exact| <= 1e-5 (1 + |exact|). all_words.py builds and runs it.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/device/launch.h"
#include "cuda/device/noise_key.h"

namespace mmfuse::cuda {
namespace {

constexpr double kTwoPi = 6.283185307179586;
constexpr double kAllowed = 1e-5;
constexpr int kThreads = 256;
constexpr uint64_t kWords = uint64_t{1} << 32;

// Findings of one thread; `all_words` takes the largest of each.
struct Found {
  double words;        // how many it has looked at: added up
  double contract;     // error over what the contract allows, of real pairs
  double angle;        // error of cosine or sine
  double radius;       // error of the radius
  double any_partner;  // error over what is allowed, with the worst partner that there is
};

struct Exact {
  double radius;
  double cosine;
  double sine;
};

// The contract defines them so: u is rounded to float, everything after that is exact.
__device__ Exact exact(uint32_t a, uint32_t b) {
  const double turn = kTwoPi * static_cast<double>(uniform_from_bits(b));
  return {sqrt(-2.0 * log(static_cast<double>(uniform_from_bits(a)))), cos(turn), sin(turn)};
}

// NaN counts as infinitely wrong.
__device__ double distance(double x, double y) {
  const double d = fabs(x - y);
  return d == d ? d : HUGE_VAL;
}

__device__ double worse(double x, double y) { return x > y ? x : y; }

__device__ double share(uint32_t a, uint32_t b) {
  float z0, z1;
  box_muller(a, b, &z0, &z1);
  const Exact right = exact(a, b);
  const double y0 = right.radius * right.cosine, y1 = right.radius * right.sine;
  return worse(distance(z0, y0) / (kAllowed * (1 + fabs(y0))),
               distance(z1, y1) / (kAllowed * (1 + fabs(y1))));
}

// A word that looks unrelated.
__device__ uint32_t partner(uint32_t word) {
  word = (word ^ word >> 16) * 0x7feb352du;
  word = (word ^ word >> 15) * 0x846ca68bu;
  return word ^ word >> 16;
}

// The word 0 as an angle is 2^-33 of a turn, whose cosine is 1; as a radius it is the largest.
// `angle` is what the first pass has found, for the second.
__global__ void all_words_kernel(uint64_t first, uint64_t stride, double angle, Found* found) {
  const uint64_t thread = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const uint64_t threads = uint64_t{gridDim.x} * blockDim.x;
  Found mine{};
  float largest, unused;
  box_muller(0, 0, &largest, &unused);
  for (uint64_t n = first + thread * stride; n < kWords; n += threads * stride) {
    const auto word = static_cast<uint32_t>(n);
    mine.words += 1;
    mine.contract = worse(mine.contract, worse(share(word, partner(word)), share(0, word)));
    float z0, z1;
    box_muller(0, word, &z0, &z1);
    const Exact right = exact(word, word);
    mine.angle = worse(mine.angle, worse(distance(z0 / double{largest}, right.cosine),
                                         distance(z1 / double{largest}, right.sine)));
    box_muller(word, 0, &z0, &z1);
    const double error = distance(z0, right.radius);
    mine.radius = worse(mine.radius, error);
    // |c| error + r angle <= 1e-5 (1 + r |c|) is linear in |c|: its ends are 0 and 1. The product
    // rounds once more.
    const double product = right.radius * (angle + 0x1p-24);
    const double beside = (error + product) / (1 + right.radius);
    mine.any_partner = worse(mine.any_partner, worse(product, beside) / kAllowed);
  }
  found[thread] = mine;
}

void launch_all_words(uint64_t first, uint64_t stride, double angle, Found* found, int blocks) {
  launch("all_words", all_words_kernel, dim3(blocks), dim3(kThreads), nullptr, first, stride, angle,
         found);
}

Found largest_of(const std::vector<Found>& found) {
  Found all{};
  for (const Found& one : found) {
    all.words += one.words;
    all.contract = std::max(all.contract, one.contract);
    all.angle = std::max(all.angle, one.angle);
    all.radius = std::max(all.radius, one.radius);
    all.any_partner = std::max(all.any_partner, one.any_partner);
  }
  return all;
}

// Two passes over every stride-th word; the second knows the worst angle.
Found all_words(uint64_t first, uint64_t stride, int blocks) {
  std::vector<Found> found(static_cast<size_t>(blocks) * kThreads);
  Found all{};
  for (int pass = 0; pass < 2; ++pass) {
#ifdef MMFUSE_CUDA_ON_CPU
    launch_all_words(first, stride, all.angle, found.data(), blocks);
#else
    const size_t bytes = found.size() * sizeof(Found);
    Found* on_device = nullptr;
    check(cudaMalloc(&on_device, bytes), "cudaMalloc");
    launch_all_words(first, stride, all.angle, on_device, blocks);
    check(cudaMemcpy(found.data(), on_device, bytes, cudaMemcpyDeviceToHost), "all_words");
    check(cudaFree(on_device), "cudaFree");
#endif
    all = largest_of(found);
  }
  return all;
}

}  // namespace
}  // namespace mmfuse::cuda

extern "C" void run_all_words(uint64_t first, uint64_t stride, int blocks, double* out) {
  const mmfuse::cuda::Found found = mmfuse::cuda::all_words(first, stride, blocks);
  out[0] = found.words;
  out[1] = found.contract;
  out[2] = found.any_partner;
  out[3] = found.angle;
  out[4] = found.radius;
}

// all_words [stride]: prints the five numbers.
int main(int argc, char** argv) {
  try {
    double out[5];
    run_all_words(0, argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1, 1056, out);
    std::printf("%.0f %.6g %.6g %.6g %.6g\n", out[0], out[1], out[2], out[3], out[4]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
