// Looks whether tensors of a table share memory, where threads would write and read at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace mmfuse::python {

// The memory of a tensor, as addresses.
struct Stretch {
  int64_t begin;
  int64_t end;
};

// True if a gradient shares memory with another tensor of the table, whose rows are as in
// gradients.h. A parameter or an anchor may be its gradient itself.
inline bool share_memory(const std::vector<int64_t>& numbers, int64_t row_numbers) {
  static thread_local std::vector<Stretch> written;
  written.clear();
  const auto stretch_of = [](const int64_t* row, int64_t place, int64_t dtype) {
    const int64_t bytes = row[1] * element_size(static_cast<DType>(dtype & 0xff));
    return Stretch{row[place], row[place] + bytes};
  };
  const int64_t* const end = numbers.data() + numbers.size();
  for (const int64_t* row = numbers.data(); row < end; row += row_numbers) {
    written.push_back(stretch_of(row, 0, row[2]));
  }
  const auto before = [](const Stretch& a, const Stretch& b) { return a.begin < b.begin; };
  if (!std::is_sorted(written.begin(), written.end(), before)) {
    std::sort(written.begin(), written.end(), before);
  }
  for (size_t t = 1; t < written.size(); ++t) {
    if (written[t].begin < written[t - 1].end) return true;
  }
  for (const int64_t* row = numbers.data(); row < end; row += row_numbers) {
    for (int k = 1; k <= 2; ++k) {
      const int64_t place = 5 + k, dtype = row[2] >> (8 * k) & 0xff;
      if (row[place] == 0 || (row[place] == row[0] && dtype == (row[2] & 0xff))) continue;
      const Stretch read = stretch_of(row, place, dtype);
      const auto next =
          std::upper_bound(written.begin(), written.end(), read.begin,
                           [](int64_t begin, const Stretch& other) { return begin < other.end; });
      if (next != written.end() && next->begin < read.end) return true;
    }
  }
  return false;
}

}  // namespace mmfuse::python
