// How far one stretch of two representations is apart; no include guard, see foreach_simd.h.
#include "cpu/simd/squared_difference.h"

inline double representation_distance(const RepresentationSlice& slice) {
  return visit_dtype(slice.dtype, [&](auto* type) {
    const auto* z1 = static_cast<const std::remove_pointer_t<decltype(type)>*>(slice.z1);
    const auto* z2 = static_cast<const std::remove_pointer_t<decltype(type)>*>(slice.z2);
    return squared_difference(z1 + slice.begin, z2 + slice.begin, slice.end - slice.begin);
  });
}
