#include "soft_entropies.h"

#include <limits>

#include "glue/chunks.h"
#include "glue/coefficients.h"
#include "glue/soft_pairs.h"

#define MMFUSE_KERNEL "cpu/soft_entropies_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {

// Defined in soft_histogram.cpp; `present` is [P, N], null where all count.
Tensor masked_soft_histogram(const Tensor& x, const Tensor& y, const Tensor& x_range,
                             const Tensor& y_range, int64_t bins, const bool* present);

// Gradients of x, y and both ranges; 0 where a sample does not count.
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_soft_histogram_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& x_range,
    const Tensor& y_range, int64_t bins, const bool* present);

namespace {

// The costs of joint_entropies' ranges and entropies, which are the same work.
constexpr Nanoseconds kValue = ns(0.08);
constexpr Nanoseconds kCell = ns(1.5);

double number_of(const Tensor& tensor, int64_t i) {
  const void* data = tensor.const_data_ptr();
  return dtype_of(tensor) == DType::kFloat64 ? static_cast<const double*>(data)[i]
                                             : static_cast<const float*>(data)[i];
}

// f(i, part) for part i of the rows of x, which are all cut alike.
template <typename F>
void for_each_part(const Tensor& x, const bool* present, const F& f) {
  const int64_t samples = x.size(1), parts = (samples + kChunk - 1) / kChunk;
  const char* data = static_cast<const char*>(x.const_data_ptr());
  const DType dtype = dtype_of(x);
  parallel_each(x.size(0) * parts, x.numel() * kValue, [&](int64_t i) {
    const int64_t begin = i % parts * kChunk;
    f(i, i / parts,
      SoftValues{dtype, data + i / parts * samples * element_size(dtype),
                 present == nullptr ? nullptr : present + i / parts * samples, begin,
                 std::min(samples, begin + kChunk)});
  });
}

// The reference does the same: constant rows are at the first of the bins' centres.
Tensor value_range(const Tensor& x, const bool* present) {
  const int64_t problems = x.size(0), parts = (x.size(1) + kChunk - 1) / kChunk;
  std::vector<ValueEnds> found(problems * parts);
  const auto kernel = MMFUSE_SIMD_SELECT(ends_of_values);
  for_each_part(x, present,
                [&](int64_t i, int64_t, const SoftValues& part) { found[i] = kernel(part); });
  Tensor range = empty_on_cpu({problems, 2}, x.scalar_type());
  const double epsilon = dtype_of(x) == DType::kFloat64 ? std::numeric_limits<double>::epsilon()
                                                        : std::numeric_limits<float>::epsilon();
  for (int64_t p = 0; p < problems; ++p) {
    const double infinity = std::numeric_limits<double>::infinity();
    ValueEnds ends{infinity, -infinity};
    double broken = 0;
    for (int64_t i = p * parts; i < (p + 1) * parts; ++i) {
      if (found[i].low > found[i].high) continue;  // nothing in it counts
      ends = {std::min(ends.low, found[i].low), std::max(ends.high, found[i].high)};
      broken += 0 * found[i].low;
    }
    if (ends.low > ends.high) broken = std::numeric_limits<double>::quiet_NaN();
    if (ends.low == ends.high) {
      ends.high += 2 * std::max(0.5, std::abs(ends.low) * 4 * epsilon);
    }
    write_number(range, 2 * p, ends.low + broken);
    write_number(range, 2 * p + 1, ends.high + broken);
  }
  return range;
}

// Hands on what the ends of the ranges get to the values that are there, in equal shares.
void add_range_gradient(const Tensor& x, const bool* present, const Tensor& range,
                        const Tensor& of_range, Tensor& grad) {
  const int64_t problems = x.size(0), parts = (x.size(1) + kChunk - 1) / kChunk;
  std::vector<EndCounts> counts(problems * parts);
  const auto ends_of = [&](int64_t p) {
    return ValueEnds{number_of(range, 2 * p), number_of(range, 2 * p + 1)};
  };
  const auto count = MMFUSE_SIMD_SELECT(count_ends);
  for_each_part(x, present, [&](int64_t i, int64_t p, const SoftValues& part) {
    counts[i] = count(part, ends_of(p));
  });
  std::vector<ValueEnds> shares(problems);
  for (int64_t p = 0; p < problems; ++p) {
    EndCounts total{};
    for (int64_t i = p * parts; i < (p + 1) * parts; ++i) {
      total.low += counts[i].low;
      total.high += counts[i].high;
    }
    const double low = number_of(of_range, 2 * p), high = number_of(of_range, 2 * p + 1);
    // The upper end of a constant row is above all values, and moves with them.
    const double to_low = total.high == 0 ? low + high : low;
    shares[p] = {total.low == 0 ? 0 : to_low / static_cast<double>(total.low),
                 total.high == 0 ? 0 : high / static_cast<double>(total.high)};
  }
  char* out = static_cast<char*>(grad.mutable_data_ptr());
  const int64_t row = x.size(1) * element_size(dtype_of(x));
  const auto add = MMFUSE_SIMD_SELECT(add_to_ends);
  for_each_part(x, present, [&](int64_t i, int64_t p, const SoftValues& part) {
    if (counts[i].low + counts[i].high > 0) add(part, ends_of(p), shares[p], out + p * row);
  });
}

// f(p, table) for each problem.
template <typename F>
void for_each_table(const Tensor& weights, int64_t samples, const bool* present, const F& f) {
  const int64_t bins = weights.size(1), cells = bins * bins;
  const DType dtype = dtype_of(weights);
  const char* data = static_cast<const char*>(weights.const_data_ptr());
  parallel_steps(weights.size(0), std::max<int64_t>(1, kChunk / cells), weights.numel() * kCell,
                 [&](int64_t, int64_t begin, int64_t end) {
                   for (int64_t p = begin; p < end; ++p) {
                     const bool* own = present == nullptr ? nullptr : present + p * samples;
                     const int64_t count =
                         own == nullptr ? samples : std::count(own, own + samples, true);
                     f(p, SoftTable{dtype, data + p * cells * element_size(dtype), bins,
                                    static_cast<double>(count)});
                   }
                 });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_entropies(const Tensor& x, const Tensor& y,
                                                          int64_t bins,
                                                          const std::optional<Tensor>& present) {
  check_soft_pairs(x, y, bins, present);
  const bool* mask = mask_of(present);
  const Tensor x_range = value_range(x, mask), y_range = value_range(y, mask);
  const Tensor weights = masked_soft_histogram(x, y, x_range, y_range, bins, mask);
  Tensor entropies = empty_on_cpu({x.size(0), 3}, x.scalar_type());
  const Numbers out(entropies);
  const auto kernel = MMFUSE_SIMD_SELECT(table_entropies);
  for_each_table(weights, x.size(1), mask, [&](int64_t p, const SoftTable& table) {
    double found[3];
    kernel(table, found);
    for (int k = 0; k < 3; ++k) out.set(3 * p + k, found[k]);
  });
  return {entropies, weights, x_range, y_range};
}

std::tuple<Tensor, Tensor> soft_entropies_backward(const Tensor& grad, const Tensor& x,
                                                   const Tensor& y, const Tensor& weights,
                                                   const Tensor& x_range, const Tensor& y_range,
                                                   const std::optional<Tensor>& present) {
  const int64_t bins = weights.dim() == 3 ? weights.size(1) : 0;
  check_soft_pairs(x, y, bins, present);
  check_soft_gradient(grad, x, weights, bins);
  const bool* mask = mask_of(present);
  Tensor slopes = torch::stable::empty_like(weights);
  char* out = static_cast<char*>(slopes.mutable_data_ptr());
  const int64_t size = bins * bins * element_size(dtype_of(weights));
  const auto kernel = MMFUSE_SIMD_SELECT(table_slopes);
  for_each_table(weights, x.size(1), mask, [&](int64_t p, const SoftTable& table) {
    double of_table[3];
    for (int k = 0; k < 3; ++k) of_table[k] = number_of(grad, 3 * p + k);
    kernel(table, of_table, out + p * size);
  });
  auto [grad_x, grad_y, grad_x_range, grad_y_range] =
      masked_soft_histogram_backward(slopes, x, y, x_range, y_range, bins, mask);
  add_range_gradient(x, mask, x_range, grad_x_range, grad_x);
  add_range_gradient(y, mask, y_range, grad_y_range, grad_y);
  return {grad_x, grad_y};
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("soft_entropies.cpu", TORCH_BOX(&mmfuse::cpu::soft_entropies));
  m.impl("soft_entropies_backward.cpu", TORCH_BOX(&mmfuse::cpu::soft_entropies_backward));
}
