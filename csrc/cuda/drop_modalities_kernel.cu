#include "cuda/device/noise_key.h"
#include "cuda/device/tensor_table.h"
#include "drop_modalities.h"

namespace mmfuse::cuda {
namespace {

constexpr int kBlocksPerSm = 4;

// Elements of one tensor that a block handles, or rows of one without elements.
constexpr int kDropChunk = 4096;

// Packs that a thread has in flight.
constexpr int kBatch = 4;

struct DropCommon {
  int64_t rows;
  Coefficients scale;
  bool* keep;
  const float* q;
  const int64_t* noise_state;
};

struct DropEntry {
  const void* in;
  void* out;
  int64_t width;
  int64_t noise_offset;
  uint32_t noise_id;
  DType dtype;
  int32_t slot;
};

// Modalities are few: the table has 4 KB, and more than it holds take several launches.
using DropTable = TensorTable<DropEntry, DropCommon, 64>;

// The elements that a block handles, and the rows that they belong to.
struct DropChunk {
  int64_t begin;      // first element
  int64_t first_row;  // its row,
  int64_t column;     // and its place there
  int elements;
  int rows;
};

__device__ __forceinline__ DropChunk drop_chunk(int64_t chunk, int64_t width, int64_t rows) {
  const int64_t begin = chunk * kDropChunk;
  const int64_t left = (width > 0 ? rows * width : rows) - begin;
  const int count = left < kDropChunk ? static_cast<int>(left) : kDropChunk;
  if (width == 0) return {0, begin, 0, 0, count};
  const int64_t first_row = begin / width;
  const int64_t last_row = (begin + count - 1) / width;
  return {begin, first_row, begin - first_row * width, count,
          static_cast<int>(last_row - first_row) + 1};
}

// Leaves in kept[] which of the chunk's rows are kept. A row's flag is stored by the block that has
// its first element.
__device__ __forceinline__ void draw_rows(const DropCommon& common, const DropEntry& entry,
                                          const DropChunk& chunk, bool* keep, bool* kept) {
  const float q = common.q[entry.slot];
  const NoiseKey key = load_noise_key(common.noise_state, entry.noise_id);
  const uint64_t first = static_cast<uint64_t>(entry.noise_offset + chunk.first_row);
  const int lead = static_cast<int>(first % kNoiseBlock);
  for (int i = threadIdx.x * kNoiseBlock; i < lead + chunk.rows; i += kThreads * kNoiseBlock) {
    const PhiloxBlock bits = philox4x32_10(key, (first + i) / kNoiseBlock);
#pragma unroll
    for (int j = 0; j < kNoiseBlock; ++j) {
      const int row = i + j - lead;
      if (row < 0 || row >= chunk.rows) continue;
      // A q that is NaN drops nothing.
      const bool flag = !(uniform_from_bits(bits.x[j]) <= q);
      kept[row] = flag;
      if (row > 0 || chunk.column == 0) keep[chunk.first_row + row] = flag;
    }
  }
}

// The chunk's row of its element i.
__device__ __forceinline__ int row_of(const DropChunk& chunk, int64_t width, int i) {
  // Wide rows, of which a chunk sees two at most, need no division and may need 64 bits.
  if (width >= kDropChunk) return i >= width - chunk.column;
  return static_cast<int>((static_cast<uint32_t>(chunk.column) + static_cast<uint32_t>(i)) /
                          static_cast<uint32_t>(width));
}

template <typename scalar_t>
__device__ __forceinline__ scalar_t drop_value(bool kept, acc_type<scalar_t> scale, scalar_t x) {
  using acc_t = acc_type<scalar_t>;
  return round_to<scalar_t>(kept ? scale * widen<acc_t>(x) : acc_t(0));
}

// Handles the chunk kPack elements at a time, all of which belong to one row.
template <int kPack, typename scalar_t>
__device__ __forceinline__ void drop_packs(const scalar_t* in, scalar_t* out, int64_t width,
                                           const DropChunk& chunk, acc_type<scalar_t> scale,
                                           const bool* kept) {
  for (int i = threadIdx.x * kPack; i < chunk.elements; i += kBatch * kThreads * kPack) {
    Pack<scalar_t, kPack> x[kBatch] = {};
    bool keep[kBatch] = {};
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int first = i + u * kThreads * kPack;
      if (first < chunk.elements) {
        keep[u] = kept[row_of(chunk, width, first)];
        // Rows that are dropped are not read.
        if (keep[u]) x[u] = load_pack<true, kPack>(in + first);
      }
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int first = i + u * kThreads * kPack;
      if (first < chunk.elements) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) x[u].v[j] = drop_value(keep[u], scale, x[u].v[j]);
        store_pack<true>(out + first, x[u]);
      }
    }
  }
}

template <typename scalar_t>
__device__ __forceinline__ void drop_elements(const DropEntry& entry, const DropChunk& chunk,
                                              const Coefficients& coefficient, const bool* kept) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kPack = kVectorBytes / sizeof(scalar_t);
  const acc_t scale =
      coefficient.values != nullptr ? load_coefficient<acc_t>(coefficient, 0) : acc_t(1);
  const scalar_t* in = static_cast<const scalar_t*>(entry.in) + chunk.begin;
  scalar_t* out = static_cast<scalar_t*>(entry.out) + chunk.begin;
  if (entry.width % kPack == 0 && is_aligned(in) && is_aligned(out)) {
    drop_packs<kPack>(in, out, entry.width, chunk, scale, kept);
  } else {
    drop_packs<1>(in, out, entry.width, chunk, scale, kept);
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    drop_modalities_kernel(const DropTable __grid_constant__ table) {
  __shared__ bool kept[kDropChunk + 1];
  const DropCommon& common = table.common;
  for (int c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const int found = find_entry(table, c);
    const DropEntry& entry = table.entries[found];
    const DropChunk chunk = drop_chunk(c - table.first_chunk[found], entry.width, common.rows);
    bool* keep = common.keep + entry.slot * common.rows;
    __syncthreads();  // the previous chunk's flags have been read
    if (common.noise_state != nullptr) {
      draw_rows(common, entry, chunk, keep, kept);
    } else {
      for (int row = threadIdx.x; row < chunk.rows; row += kThreads) {
        kept[row] = keep[chunk.first_row + row];
      }
    }
    __syncthreads();
    visit_dtype(entry.dtype, [&](auto* type) {
      drop_elements<std::remove_pointer_t<decltype(type)>>(entry, chunk, common.scale, kept);
    });
  }
}

}  // namespace

void launch_drop_modalities(const DropModalitiesParams& params, cudaStream_t stream) {
  constexpr int64_t kMaxChunks = 1 << 30;  // a stride beyond the last chunk is still an int
  DropTable table;
  table.common = {params.rows, params.scale, params.keep, params.q, params.noise_state};
  table.count = 0;
  table.chunks = 0;
  const auto flush = [&] {
    if (table.chunks > 0) {
      launch("drop_modalities_kernel", drop_modalities_kernel,
             resident_blocks(table.chunks, kBlocksPerSm), kThreads, stream, table);
    }
    table.count = 0;
    table.chunks = 0;
  };
  for (size_t m = 0; m < params.tensors.size(); ++m) {
    const DropTensor& tensor = params.tensors[m];
    const int64_t chunks =
        chunk_count(params.rows * (tensor.width > 0 ? tensor.width : 1), kDropChunk);
    if (table.count == DropTable::kCapacity || table.chunks > kMaxChunks - chunks) flush();
    table.first_chunk[table.count] = table.chunks;
    table.entries[table.count++] = {
        tensor.in,       tensor.out,   tensor.width,           tensor.noise_offset,
        tensor.noise_id, tensor.dtype, static_cast<int32_t>(m)};
    table.chunks += static_cast<int32_t>(chunks);
  }
  flush();
}

}  // namespace mmfuse::cuda
