// out = scale * in + pull * (param - anchor) + noise_std * N(0, 1), the one update behind
// update_grads_ and scale_grad.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/philox.h"

namespace mmfuse::cpu {

// A stretch of one tensor. The data pointers are those of the whole tensor, and a zero coefficient
// switches its term off, whatever the data are. A null anchor counts as zeros.
struct UpdateSlice {
  DType dtype;
  DType param_dtype;
  DType anchor_dtype;
  const void* in;
  void* out;
  const void* param;
  const void* anchor;
  double scale;
  double pull;
  double noise_std;
  NoiseKey noise_key;
  int64_t noise_offset;
  // With noise, and where not 0: the rows of a tensor in channels_last, whose noise goes by the
  // logical index.
  int64_t channels;
  int64_t spatial;
  int64_t begin;
  int64_t size;
};

inline bool is_transposed(const UpdateSlice& slice) { return slice.channels != 0; }

inline bool is_identity(const UpdateSlice& slice) {
  return slice.in == slice.out && slice.scale == 1 && slice.pull == 0 && slice.noise_std == 0;
}

// Runs all slices, whole tensors each; false when a stored value is NaN or infinite. Without
// `check_finite` or `sq_norm`, tensors that stay as they are are not read, and count as finite.
// `sq_norm`, if not null, receives the sum of squares of each tensor before the update; the sums do
// not depend on the number of threads. Slices without anything to do may be gone
// from `tensors` afterwards.
bool launch_update(std::vector<UpdateSlice>& tensors, bool check_finite, double* sq_norm = nullptr);

}  // namespace mmfuse::cpu
