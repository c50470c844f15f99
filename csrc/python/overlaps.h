// Looks whether tensors of a table share memory, where threads would write and read at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/dtype.h"

namespace mmfuse::python {

// The memory of a tensor, as addresses.
struct Stretch {
  int64_t begin;
  int64_t end;
};

// Of a gradient (place 0), its parameter (1) or anchor (2), with the dtype's byte of row[2].
inline Stretch stretch_of(const int64_t* row, int place) {
  const int64_t dtype = row[2] >> (8 * place) & 0xff;
  const int64_t begin = row[place == 0 ? 0 : 5 + place];
  return {begin, begin + row[1] * element_size(static_cast<DType>(dtype))};
}

// Kept by each thread for its next call: a step's gradients lie as the last one's did, so that
// their order by address is known.
struct Scratch {
  std::vector<Stretch> written;
  std::vector<uint32_t> order;
};

// True if a gradient shares memory with another tensor of the table, whose `count` rows are as in
// gradients.h. A parameter or an anchor may be its gradient itself.
inline bool share_memory(const int64_t* numbers, size_t count, int64_t row_numbers) {
  static thread_local Scratch kept;
  auto& [written, order] = kept;
  const auto row = [&](size_t t) { return numbers + static_cast<int64_t>(t) * row_numbers; };
  const auto before = [&](uint32_t a, uint32_t b) { return row(a)[0] < row(b)[0]; };
  if (order.size() != count) {
    order.resize(count);
    std::iota(order.begin(), order.end(), 0u);
  }
  if (!std::is_sorted(order.begin(), order.end(), before)) {
    std::sort(order.begin(), order.end(), before);
  }
  written.resize(count);
  for (size_t t = 0; t < count; ++t) {
    written[t] = stretch_of(row(order[t]), 0);
    if (t > 0 && written[t].begin < written[t - 1].end) return true;
  }
  for (size_t t = 0; t < count; ++t) {
    for (int place = 1; place <= 2; ++place) {
      const Stretch read = stretch_of(row(t), place), own = stretch_of(row(t), 0);
      if (read.begin == 0 || (read.begin == own.begin && read.end == own.end)) continue;
      const auto next =
          std::upper_bound(written.begin(), written.end(), read.begin,
                           [](int64_t begin, const Stretch& other) { return begin < other.end; });
      if (next != written.end() && next->begin < read.end) return true;
    }
  }
  return false;
}

}  // namespace mmfuse::python
