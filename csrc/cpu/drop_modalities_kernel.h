// Draws which samples are kept, and writes these; no include guard, see foreach_simd.h.
#include "cpu/simd/noise_kernel.h"

// keep[i] = not (u <= q): a q that is NaN keeps everything.
inline void draw_keep(const KeepSlice& slice) {
  constexpr int64_t kDraw = kNoiseBlock * kDrawBlocks;
  float uniforms[kDraw];
  int64_t n;
  for (int64_t at = slice.begin; at < slice.end; at += n) {
    const int64_t element = slice.noise_offset + at;
    const int64_t span = element / NormalSource::kSpan;
    const PhiloxConstants constants(slice.noise_key, static_cast<uint32_t>(span));
    n = std::min(slice.end - at, (span + 1) * NormalSource::kSpan - element);
    int64_t drawn;
    for (int64_t done = 0; done < n; done += drawn) {
      const int64_t lead = (element + done) % kNoiseBlock;
      const uint32_t block = static_cast<uint32_t>((element + done) / kNoiseBlock);
      U64 even[kGroups], odd[kGroups];
      philox(constants, block_order() + uint64_t{block}, even, odd);
      MMFUSE_UNROLL for (int g = 0; g < kGroups; ++g) {
        const F32 first = uniform_from_bits((U32)even[g]);
        const F32 second = uniform_from_bits((U32)odd[g]);
        store(uniforms + 2 * g * kLanes, unpack_low(first, second));
        store(uniforms + (2 * g + 1) * kLanes, unpack_high(first, second));
      }
      drawn = std::min(n - done, kDraw - lead);
      bool* keep = slice.keep + at + done;
      for (int64_t i = 0; i < drawn; ++i) keep[i] = !(uniforms[lead + i] <= slice.q);
    }
  }
}

template <typename scalar_t>
inline void scale_row(const scalar_t* in, int64_t n, acc_type<scalar_t> scale, scalar_t* out) {
  constexpr int kWidth = lanes_of<scalar_t>;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, load(in + i) * scale);
  if (i < n) store_first(out + i, n - i, load_first(in + i, n - i, 0) * scale);
}

// Copies a row, or leaves zeros: two thousand bytes are where memcpy turns to an instruction that
// takes longer than this does. The compiler must not know that zero is, or it would call memcpy.
inline void copy_row(const char* in, int64_t bytes, bool kept, char* out) {
  const I32 zero = opaque(I32{});
  constexpr int64_t kBytes = sizeof(I32);
  int64_t i = 0;
  if (kept) {
    for (; i + kBytes <= bytes; i += kBytes) {
      const I32 x = load_bits<I32>(in + i) ^ zero;
      std::memcpy(out + i, &x, sizeof x);
    }
    if (i < bytes) std::memcpy(out + i, in + i, bytes - i);
  } else {
    for (; i + kBytes <= bytes; i += kBytes) std::memcpy(out + i, &zero, sizeof zero);
    if (i < bytes) std::memset(out + i, 0, bytes - i);
  }
}

template <typename scalar_t>
inline void drop_rows(const DropSlice& slice) {
  const auto* in = static_cast<const scalar_t*>(slice.in);
  auto* out = static_cast<scalar_t*>(slice.out);
  const auto scale = static_cast<acc_type<scalar_t>>(slice.scale);
  const int64_t end = slice.begin + slice.size;
  int64_t row = slice.begin / slice.width;
  int64_t stop;
  for (int64_t at = slice.begin; at < end; at = stop, ++row) {
    stop = std::min(end, (row + 1) * slice.width);
    if (scale == 1 || !slice.keep[row]) {
      copy_row(reinterpret_cast<const char*>(in + at), (stop - at) * sizeof(scalar_t),
               slice.keep[row], reinterpret_cast<char*>(out + at));
    } else {
      scale_row(in + at, stop - at, scale, out + at);
    }
  }
}

// Rows of one vector or less: their factors are spread out first, since a branch for each row that
// a processor cannot foresee would take longer than the row.
template <typename scalar_t>
inline void drop_narrow_rows(const DropSlice& slice) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kWidth = lanes_of<scalar_t>;
  constexpr int64_t kTile = 1024;
  const auto* in = static_cast<const scalar_t*>(slice.in);
  auto* out = static_cast<scalar_t*>(slice.out);
  const auto scale = static_cast<acc_t>(slice.scale);
  const int64_t end = slice.begin + slice.size;
  float kept[kTile];
  int64_t row = slice.begin / slice.width;
  int64_t left = slice.width - slice.begin % slice.width;
  for (int64_t at = slice.begin; at < end; at += kTile) {
    const int64_t n = std::min(kTile, end - at);
    for (int64_t i = 0; i < n; ++i) {
      kept[i] = static_cast<float>(slice.keep[row]);
      --left;
      row += left == 0;
      left = left == 0 ? slice.width : left;
    }
    for (int64_t i = 0; i < n; i += kWidth) {
      const int64_t rest = std::min<int64_t>(kWidth, n - i);
      const bool full = rest == kWidth;
      const auto x = full ? load(in + at + i) : load_first(in + at + i, rest, 0);
      const auto flags = load_as(kept + i, acc_t());
      const auto y = flags != 0 ? x * scale : decltype(x){};
      if (full) {
        store(out + at + i, y);
      } else {
        store_first(out + at + i, rest, y);
      }
    }
  }
}

inline void drop_slice(const DropSlice& slice) {
  visit_dtype(slice.dtype, [&](auto* type) {
    using scalar_t = std::remove_pointer_t<decltype(type)>;
    if (slice.width <= lanes_of<scalar_t>) {
      drop_narrow_rows<scalar_t>(slice);
    } else {
      drop_rows<scalar_t>(slice);
    }
  });
}
