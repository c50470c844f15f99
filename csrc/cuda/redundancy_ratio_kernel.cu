#include "cuda/device/partial_sums.h"
#include "redundancy_ratio.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 4;
constexpr double kEps = 1e-12;

// One block adds up one chunk; kPack elements are read at once.
template <typename scalar_t, int kPack>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    squared_distance_kernel(const RedundancyRatioParams __grid_constant__ params, int chunk) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kBatch = kPack == 1 ? 8 : 4;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * chunk;
  const int64_t left = params.numel - begin;
  const int elements = left < chunk ? static_cast<int>(left) : chunk;
  const int packs = elements / kPack;
  const scalar_t* z1 = static_cast<const scalar_t*>(params.z1) + begin;
  const scalar_t* z2 = static_cast<const scalar_t*>(params.z2) + begin;
  acc_t sum = 0;
  for (int p = threadIdx.x; p < packs; p += kBatch * kThreads) {
    Pack<scalar_t, kPack> x1[kBatch] = {};
    Pack<scalar_t, kPack> x2[kBatch] = {};
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int pack = p + u * kThreads;
      if (pack < packs) {
        x1[u] = load_pack<true, kPack>(z1 + pack * kPack);
        x2[u] = load_pack<true, kPack>(z2 + pack * kPack);
      }
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        const acc_t difference = widen<acc_t>(x1[u].v[j]) - widen<acc_t>(x2[u].v[j]);
        sum += difference * difference;
      }
    }
  }
  const int last = packs * kPack + threadIdx.x;
  if (last < elements) {
    const acc_t difference = widen<acc_t>(z1[last]) - widen<acc_t>(z2[last]);
    sum += difference * difference;
  }
  double total[1] = {static_cast<double>(sum)};
  block_sum<kThreads>(total);
  if (threadIdx.x == 0) params.partials[blockIdx.x] = total[0];
}

struct StoreRatio {
  void* ratio;
  int64_t numel;
  Coefficients input_sq;
  bool wide;

  __device__ void operator()(double sum) const {
    // 0 / 0 for empty representations.
    const double mean = sum / static_cast<double>(numel);
    store_result(ratio, wide, mean / (load_coefficient<double>(input_sq, 0) + kEps));
  }
};

}  // namespace

void launch_redundancy_ratio(const RedundancyRatioParams& params, cudaStream_t stream) {
  const int chunk = redundancy_chunk(params.numel);
  const int64_t chunks = chunk_count(params.numel, chunk);
  if (chunks > 0) {
    visit_dtype(params.dtype, [&](auto* type) {
      using scalar_t = std::remove_pointer_t<decltype(type)>;
      constexpr int kPack = kVectorBytes / sizeof(scalar_t);
      const auto kernel = is_aligned(params.z1) && is_aligned(params.z2)
                              ? squared_distance_kernel<scalar_t, kPack>
                              : squared_distance_kernel<scalar_t, 1>;
      launch("squared_distance_kernel", kernel, static_cast<unsigned>(chunks), kThreads, stream,
             params, chunk);
    });
  }
  const bool wide = params.dtype == DType::kFloat64;
  launch_partial_sums(params.partials, chunks,
                      StoreRatio{params.ratio, params.numel, params.input_sq, wide}, stream);
}

}  // namespace mmfuse::cuda
