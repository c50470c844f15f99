// Reads and writes small tensors: float32 or float64 coefficients and results, the noise's state.
#pragma once

#include "common/philox.h"
#include "tensors.h"

namespace mmfuse::cpu {

class Coefficients {
 public:
  Coefficients(const Tensor& tensor, size_t count, const char* name)
      : data_(tensor.const_data_ptr()), dtype_(dtype_of(tensor)) {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == static_cast<int64_t>(count) &&
                        (dtype_ == DType::kFloat32 || dtype_ == DType::kFloat64),
                    "mmfuse: ", name, " must be float32 or float64, contiguous, with ", count,
                    " elements");
  }

  double operator[](size_t i) const {
    return dtype_ == DType::kFloat64 ? static_cast<const double*>(data_)[i]
                                     : static_cast<const float*>(data_)[i];
  }

 private:
  const void* data_;
  DType dtype_;
};

// A NoiseStream's (seed, step).
inline const int64_t* noise_state_of(const Tensor& state) {
  return indices_of(state, 2, "noise_state");
}

inline NoiseKey noise_key(const int64_t* state, int64_t stream_id) {
  return {static_cast<uint64_t>(state[0]), static_cast<uint32_t>(stream_id),
          static_cast<uint32_t>(state[1])};
}

// A tensor that takes float32 or float64 numbers.
class Numbers {
 public:
  explicit Numbers(Tensor& tensor)
      : data_(tensor.mutable_data_ptr()), wide_(tensor.scalar_type() == ScalarType::Double) {}

  void set(size_t i, double value) const {
    if (wide_) {
      static_cast<double*>(data_)[i] = value;
    } else {
      static_cast<float*>(data_)[i] = static_cast<float>(value);
    }
  }

 private:
  void* data_;
  bool wide_;
};

inline void write_number(Tensor& out, size_t i, double value) { Numbers(out).set(i, value); }

// A 0-d result of an op on tensors of this type.
inline Tensor number_on_cpu(double value, DType dtype) {
  Tensor out = empty_on_cpu({}, dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float);
  write_number(out, 0, value);
  return out;
}

}  // namespace mmfuse::cpu
