#include <cmath>
#include <cstring>

#include "glue/coefficients.h"
#include "glue/kept.h"

namespace mmfuse::cpu {

void keep_state_(const TensorList& state, const TensorList& values, const Tensor& finite,
                 const std::optional<Tensor>& sums) {
  check_kept(state, values, finite);
  bool counts = *static_cast<const bool*>(finite.const_data_ptr());
  if (sums) {
    const int64_t count = sums->numel();
    const Coefficients numbers(*sums, count, "sums");
    for (int64_t t = 0; t < count; ++t) counts = counts && std::isfinite(numbers[t]);
  }
  if (!counts) return;
  for (size_t i = 0; i < state.size(); ++i) {
    const auto bytes = bytes_of(state[i]);
    if (bytes == 0) continue;  // there may be no memory at all
    // A value may be the state itself, of which nothing changes.
    std::memmove(state[i].mutable_data_ptr(), values[i].const_data_ptr(), bytes);
  }
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("keep_state_.cpu", TORCH_BOX(&mmfuse::cpu::keep_state_));
}
