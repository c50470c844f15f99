#include "soft_histogram.h"

#include <limits>

#include "glue/chunks.h"
#include "glue/coefficients.h"

#define MMFUSE_KERNEL "cpu/soft_histogram_kernel.h"
#include "cpu/simd/foreach_simd.h"

namespace mmfuse::cpu {
namespace {

// Parts that the samples of a few large problems are cut into, and how large they are at least.
constexpr int64_t kMaxParts = 16;
constexpr int64_t kMinPart = 65536;

// The cost of a sample, forwards or backwards, and of a cell.
constexpr Nanoseconds kSample = ns(3.2);
constexpr Nanoseconds kCell = ns(0.2);

int64_t parts_of(int64_t problems, int64_t samples) {
  const int64_t wanted = std::max<int64_t>(1, kMaxParts / std::max<int64_t>(1, problems));
  return std::clamp<int64_t>(samples / kMinPart, 1, wanted);
}

class SoftProblems {
 public:
  SoftProblems(const Tensor& x, const Tensor& y, const Tensor& x_range, const Tensor& y_range,
               int64_t bins, const bool* present)
      : dtype_(dtype_of(x)),
        x_(static_cast<const char*>(x.const_data_ptr())),
        y_(static_cast<const char*>(y.const_data_ptr())),
        present_(present),
        bins_(bins) {
    check_contiguous({x, y, x_range, y_range}, "values and ranges");
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) &&
                        x.size(1) == y.size(1) && dtype_of(y) == dtype_,
                    "mmfuse: x and y must be [P, N], of one shape and one dtype");
    count = x.size(0);
    samples = x.size(1);
    parts = parts_of(count, samples);
    for (const Tensor& range : {x_range, y_range}) {
      STD_TORCH_CHECK(range.dim() == 2 && range.size(0) == count && range.size(1) == 2 &&
                          range.scalar_type() == result_type({x}),
                      "mmfuse: ranges must be [P, 2], float64 for float64 values, else float32");
    }
    STD_TORCH_CHECK(bins >= 2 && bins <= 256, "mmfuse: bins must be from 2 to 256, got ", bins);
    x_range_ = x_range.const_data_ptr();
    y_range_ = y_range.const_data_ptr();
  }

  // Part k of problem p.
  SoftSamples part(int64_t p, int64_t k) const {
    const int64_t first = p * samples * element_size(dtype_);
    const int64_t step = (samples + parts - 1) / parts;
    return {dtype_,
            axis(x_ + first, x_range_, p),
            axis(y_ + first, y_range_, p),
            present_ == nullptr ? nullptr : present_ + p * samples,
            bins_,
            std::min(samples, k * step),
            std::min(samples, (k + 1) * step)};
  }

  double x_width(int64_t p) const { return width(x_range_, p); }
  double y_width(int64_t p) const { return width(y_range_, p); }

  // f(p) for every problem, or f(p, k) for every part of every problem.
  template <typename F>
  void for_each_problem(const F& f) const {
    const int64_t work = samples + bins_ * bins_;
    parallel_steps(count, std::max<int64_t>(1, kChunk / work),
                   count * samples * kSample + count * bins_ * bins_ * kCell,
                   [&](int64_t, int64_t begin, int64_t end) {
                     for (int64_t p = begin; p < end; ++p) f(p);
                   });
  }
  template <typename F>
  void for_each_part(const F& f) const {
    const int64_t step = std::max<int64_t>(1, kChunk * parts / std::max<int64_t>(1, samples));
    parallel_steps(count * parts, step, count * samples * kSample,
                   [&](int64_t, int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) f(i / parts, i % parts);
                   });
  }

  int64_t count;
  int64_t samples;
  int64_t parts;

 private:
  double end_of(const void* ranges, int64_t i) const {
    return dtype_ == DType::kFloat64 ? static_cast<const double*>(ranges)[i]
                                     : static_cast<const float*>(ranges)[i];
  }

  // The type that the values are computed in decides if a range is too wide or narrow.
  double width(const void* ranges, int64_t p) const {
    const double low = end_of(ranges, 2 * p), high = end_of(ranges, 2 * p + 1);
    return dtype_ == DType::kFloat64 ? high - low
                                     : static_cast<float>(high) - static_cast<float>(low);
  }

  SoftAxis axis(const void* values, const void* ranges, int64_t p) const {
    const double most = static_cast<double>(bins_ - 1), width = this->width(ranges, p);
    // Rounded as in the reference: the slopes jump where a place is a whole number.
    const double per_unit = dtype_ == DType::kFloat64
                                ? most / width
                                : static_cast<float>(most) / static_cast<float>(width);
    return {values, end_of(ranges, 2 * p), per_unit};
  }

  DType dtype_;
  const char* x_;
  const char* y_;
  const bool* present_;
  int64_t bins_;
  const void* x_range_;
  const void* y_range_;
};

}  // namespace

Tensor masked_soft_histogram(const Tensor& x, const Tensor& y, const Tensor& x_range,
                             const Tensor& y_range, int64_t bins, const bool* present) {
  const SoftProblems problems(x, y, x_range, y_range, bins, present);
  const int64_t cells = bins * bins;
  Tensor weights = empty_on_cpu({problems.count, bins, bins}, result_type({x}));
  const auto kernel = MMFUSE_SIMD_SELECT(add_samples);
  const auto write = [&](int64_t p, const double* sums, bool placed) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const auto copy = [&](auto* out) {
      for (int64_t c = 0; c < cells; ++c) out[p * cells + c] = placed ? sums[c] : nan;
    };
    if (x.scalar_type() == ScalarType::Double) {
      copy(static_cast<double*>(weights.mutable_data_ptr()));
    } else {
      copy(static_cast<float*>(weights.mutable_data_ptr()));
    }
  };
  if (problems.parts == 1) {
    problems.for_each_problem([&](int64_t p) {
      std::vector<double> sums(cells);
      const bool placed = kernel(problems.part(p, 0), sums.data());
      write(p, sums.data(), placed);
    });
    return weights;
  }
  const int64_t parts = problems.parts;
  std::vector<double> sums(problems.count * parts * cells);
  std::vector<char> placed(problems.count * parts);
  problems.for_each_part([&](int64_t p, int64_t k) {
    const int64_t i = p * parts + k;
    placed[i] = kernel(problems.part(p, k), sums.data() + i * cells);
  });
  for (int64_t p = 0; p < problems.count; ++p) {
    double* total = sums.data() + p * parts * cells;
    bool all = placed[p * parts];
    for (int64_t k = 1; k < parts; ++k) {
      for (int64_t c = 0; c < cells; ++c) total[c] += total[k * cells + c];
      all &= placed[p * parts + k] != 0;
    }
    write(p, total, all);
  }
  return weights;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_soft_histogram_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& x_range,
    const Tensor& y_range, int64_t bins, const bool* present) {
  const SoftProblems problems(x, y, x_range, y_range, bins, present);
  const int64_t cells = bins * bins, parts = problems.parts;
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == problems.count * cells &&
                      grad.scalar_type() == result_type({x}),
                  "mmfuse: grad must be [P, bins, bins], contiguous, of the result's dtype");
  Tensor grad_x = torch::stable::empty_like(x), grad_y = torch::stable::empty_like(y);
  Tensor grad_x_range = torch::stable::empty_like(x_range);
  Tensor grad_y_range = torch::stable::empty_like(y_range);
  const int64_t row = problems.samples * element_size(dtype_of(x));
  const int64_t grad_row = cells * element_size(dtype_of(grad));
  const char* grad_data = static_cast<const char*>(grad.const_data_ptr());
  char* grad_x_data = static_cast<char*>(grad_x.mutable_data_ptr());
  char* grad_y_data = static_cast<char*>(grad_y.mutable_data_ptr());
  std::vector<SoftRangeSums> sums(problems.count * parts);
  const auto kernel = MMFUSE_SIMD_SELECT(write_gradients);
  problems.for_each_part([&](int64_t p, int64_t k) {
    sums[p * parts + k] =
        kernel(problems.part(p, k),
               {grad_data + p * grad_row, grad_x_data + p * row, grad_y_data + p * row});
  });
  for (int64_t p = 0; p < problems.count; ++p) {
    SoftRangeSums total;
    for (int64_t i = p * parts; i < (p + 1) * parts; ++i) {
      total.x_low += sums[i].x_low;
      total.x_high += sums[i].x_high;
      total.y_low += sums[i].y_low;
      total.y_high += sums[i].y_high;
    }
    write_number(grad_x_range, 2 * p, total.x_low / problems.x_width(p));
    write_number(grad_x_range, 2 * p + 1, -total.x_high / problems.x_width(p));
    write_number(grad_y_range, 2 * p, total.y_low / problems.y_width(p));
    write_number(grad_y_range, 2 * p + 1, -total.y_high / problems.y_width(p));
  }
  return {grad_x, grad_y, grad_x_range, grad_y_range};
}

Tensor soft_histogram(const Tensor& x, const Tensor& y, const Tensor& x_range,
                      const Tensor& y_range, int64_t bins) {
  return masked_soft_histogram(x, y, x_range, y_range, bins, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_histogram_backward(const Tensor& grad,
                                                                   const Tensor& x, const Tensor& y,
                                                                   const Tensor& x_range,
                                                                   const Tensor& y_range,
                                                                   int64_t bins) {
  return masked_soft_histogram_backward(grad, x, y, x_range, y_range, bins, nullptr);
}

}  // namespace mmfuse::cpu

STABLE_TORCH_LIBRARY_IMPL(mmfuse, CPU, m) {
  m.impl("soft_histogram.cpu", TORCH_BOX(&mmfuse::cpu::soft_histogram));
  m.impl("soft_histogram_backward.cpu", TORCH_BOX(&mmfuse::cpu::soft_histogram_backward));
}
