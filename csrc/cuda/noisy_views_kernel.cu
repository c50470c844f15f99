#include "cuda/device/noise_key.h"
#include "cuda/device/partial_sums.h"
#include "noisy_views.h"

namespace mmfuse::cuda {
namespace {

constexpr int kThreads = 256;

template <typename scalar_t>
constexpr int kBlocksPerSm = std::is_same_v<scalar_t, double> ? 3 : 4;

// Elements that a thread handles as one: whole Philox blocks, and at least 16 bytes.
template <typename scalar_t>
constexpr int kPack = sizeof(scalar_t) * kNoiseBlock >= kVectorBytes
                          ? kNoiseBlock
                          : static_cast<int>(kVectorBytes / sizeof(scalar_t));

// The noise of four elements from `element` on, which may lie in two Philox blocks.
template <bool kWhole>
__device__ __forceinline__ NormalBlock normals_from(const NoiseKey& key, uint64_t element) {
  const uint64_t block = element / kNoiseBlock;
  const NormalBlock low = normal_block(key, block);
  const int shift = static_cast<int>(element % kNoiseBlock);
  if (kWhole || shift == 0) return low;
  const NormalBlock high = normal_block(key, block + 1);
  NormalBlock out;
  // Selections, because indexing the array would move it to local memory.
  const float z[7] = {low.z[0], low.z[1], low.z[2], low.z[3], high.z[0], high.z[1], high.z[2]};
#pragma unroll
  for (int j = 0; j < kNoiseBlock; ++j) {
    out.z[j] = shift == 1 ? z[j + 1] : shift == 2 ? z[j + 2] : z[j + 3];
  }
  return out;
}

// `count` elements; the rest of the pack are zeros.
template <typename scalar_t, int kCount>
__device__ __forceinline__ Pack<scalar_t, kCount> load_part(const scalar_t* source, int count,
                                                            bool vector) {
  if (vector && count == kCount) return load_pack<true, kCount>(source);
  Pack<scalar_t, kCount> pack = {};
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (j < count) pack.v[j] = source[j];
  }
  return pack;
}

template <typename scalar_t, int kCount>
__device__ __forceinline__ void store_part(scalar_t* target, int count, bool vector,
                                           const Pack<scalar_t, kCount>& pack) {
  if (vector && count == kCount) return store_pack<true>(target, pack);
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (j < count) target[j] = pack.v[j];
  }
}

// Makes this thread's packs of a chunk of both views; returns the sum of their squared differences.
// kWhole: a pack is made of the same whole Philox blocks in both. kFull: all packs are whole and
// aligned, and the next one is loaded while the noise of one is drawn.
template <typename scalar_t, bool kWhole, bool kFull>
__device__ __forceinline__ acc_type<scalar_t> make_views(const NoisyViewsParams& params,
                                                         int64_t begin, int elements, bool vector) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kCount = kPack<scalar_t>;
  constexpr int kStride = kThreads * kCount;
  static_assert(kViewsChunk % kStride == 0);
  const NoisyView& first = params.views[0];
  const NoisyView& second = params.views[1];
  const acc_t sigma = static_cast<acc_t>(params.sigma);
  const NoiseKey first_key = load_noise_key(params.noise_state, first.noise_id);
  const NoiseKey second_key = load_noise_key(params.noise_state, second.noise_id);
  const scalar_t* source = static_cast<const scalar_t*>(params.x) + begin;
  const int end = kFull ? kViewsChunk : elements;
  const auto count_at = [&](int i) { return kFull || end - i > kCount ? kCount : end - i; };
  const auto load = [&](int i) {
    if constexpr (kFull) return load_pack<true, kCount>(source + i);
    return load_part<scalar_t, kCount>(source + i, count_at(i), vector);
  };
  acc_t sum = 0;
  int i = threadIdx.x * kCount;
  Pack<scalar_t, kCount> next = {};
  if constexpr (kFull) next = load(i);
  // Unrolled, packs would need more registers than there are.
#pragma unroll 1
  for (; i < end; i += kStride) {
    const int64_t index = begin + i;
    const int count = count_at(i);
    const Pack<scalar_t, kCount> in = kFull ? next : load(i);
    if (kFull && i + kStride < end) next = load(i + kStride);
    Pack<scalar_t, kCount> a = in;
    Pack<scalar_t, kCount> b = in;
    if (sigma != acc_t(0)) {
      const uint64_t first_element = static_cast<uint64_t>(first.noise_offset + index);
      const uint64_t second_element =
          kWhole ? first_element : static_cast<uint64_t>(second.noise_offset + index);
#pragma unroll
      for (int j = 0; j < kCount; j += kNoiseBlock) {
        const NormalBlock n1 = normals_from<kWhole>(first_key, first_element + j);
        const NormalBlock n2 = normals_from<kWhole>(second_key, second_element + j);
#pragma unroll
        for (int k = 0; k < kNoiseBlock; ++k) {
          const acc_t x = widen<acc_t>(in.v[j + k]);
          a.v[j + k] = round_to<scalar_t>(x + sigma * static_cast<acc_t>(n1.z[k]));
          b.v[j + k] = round_to<scalar_t>(x + sigma * static_cast<acc_t>(n2.z[k]));
        }
      }
    }
    store_part(static_cast<scalar_t*>(first.out) + index, count, vector || kFull, a);
    store_part(static_cast<scalar_t*>(second.out) + index, count, vector || kFull, b);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const acc_t difference = widen<acc_t>(a.v[j]) - widen<acc_t>(b.v[j]);
      if (j < count) sum += difference * difference;
    }
  }
  return sum;
}

// One block makes one chunk of both views.
template <typename scalar_t, bool kWhole>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<scalar_t>)
    noisy_views_kernel(const NoisyViewsParams __grid_constant__ params, bool vector) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kViewsChunk;
  const int64_t left = params.numel - begin;
  const int elements = left < kViewsChunk ? static_cast<int>(left) : kViewsChunk;
  // If each view draws blocks of its own, which is rare, drawing them is most of the work: one loop
  // is enough.
  const auto sum = kWhole && vector && elements == kViewsChunk
                       ? make_views<scalar_t, kWhole, kWhole>(params, begin, elements, vector)
                       : make_views<scalar_t, kWhole, false>(params, begin, elements, vector);
  double total[1] = {static_cast<double>(sum)};
  block_sum<kThreads>(total);
  if (threadIdx.x == 0) params.partials[blockIdx.x] = total[0];
}

struct StoreInputSq {
  void* input_sq;
  int64_t numel;
  bool wide;

  __device__ void operator()(double sum) const {
    // 0 / 0 for an empty x.
    store_result(input_sq, wide, sum / static_cast<double>(numel));
  }
};

}  // namespace

void launch_noisy_views(const NoisyViewsParams& params, cudaStream_t stream) {
  const int64_t chunks = chunk_count(params.numel, kViewsChunk);
  const auto& [first, second] = params.views;
  const bool vector = is_aligned(params.x) && is_aligned(first.out) && is_aligned(second.out);
  const bool whole =
      first.noise_offset == second.noise_offset && first.noise_offset % kNoiseBlock == 0;
  if (chunks > 0) {
    visit_dtype(params.dtype, [&](auto* type) {
      using scalar_t = std::remove_pointer_t<decltype(type)>;
      const auto kernel =
          whole ? noisy_views_kernel<scalar_t, true> : noisy_views_kernel<scalar_t, false>;
      launch("noisy_views_kernel", kernel, static_cast<unsigned>(chunks), kThreads, stream, params,
             vector);
    });
  }
  const bool wide = params.dtype == DType::kFloat64;
  launch_partial_sums(params.partials, chunks, StoreInputSq{params.input_sq, params.numel, wide},
                      stream);
}

}  // namespace mmfuse::cuda
