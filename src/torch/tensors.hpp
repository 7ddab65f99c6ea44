// PyTorch tensors as heed's views and arrays. What the core cannot see is refused here: devices,
// foreign dtypes, and the shapes of index arrays.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>

#include "heed/status.hpp"
#include "heed/tensor.hpp"

namespace heed::operators {

using torch::stable::Tensor;
using Shape = std::span<const std::int64_t>;

// Throws a std::runtime_error in the operators' names. Python shows every exception of an operator
// as a RuntimeError; the prefix tells python/heed/ops.py what to make of it.
[[noreturn]] void raise(const Status& status);
inline void check(const Status& status) {
  if (!status.ok()) raise(status);
}

// Codes of the runtime PyTorch, as aoti_torch_get_dtype() gives them.
struct DTypeCodes {
  std::int32_t f32, bf16, f16, f64, boolean, int32, int64;
};
const DTypeCodes& dtype_codes();

Shape shape_of(const Tensor& tensor);
std::int32_t dtype_code(const Tensor& tensor);
std::int32_t device_type(const Tensor& tensor);
std::int32_t device_index(const Tensor& tensor);

std::string text_of(Shape shape);

// An uninitialised row-major tensor, on the device of `like`.
Tensor empty(Shape shape, std::int32_t dtype, const Tensor& like);
Tensor empty(Shape shape, std::int32_t dtype, const torch::stable::Device& device);
Tensor cast(const Tensor& tensor, std::int32_t dtype);
// The tensor, or a row-major copy of it where its last stride is not 1.
Tensor with_unit_stride(const Tensor& tensor);

// Refused unless `tensor` is on the device of `other`, whose name is `where`.
void check_device(const char* name, const Tensor& tensor, const char* where, const Tensor& other);
inline void check_device(const char* name, const Tensor& tensor, const Tensor& q) {
  check_device(name, tensor, "q.device", q);
}
void check_dtype(const char* name, const Tensor& tensor, std::int32_t dtype);

// Never null: a tensor without elements has an address too.
const void* data_of(const Tensor& tensor);

// Views of a tensor of any float dtype or bool; the tensor must outlive them.
ConstTensorView view_of(const char* name, const Tensor& tensor);
TensorView mutable_view_of(const char* name, const Tensor& tensor);

// An optional array that the kernels address without strides.
class Array {
 public:
  // Any extent.
  static constexpr std::int64_t kAny = -1;

  Array() = default;
  // Refused unless `tensor` has the dtype and one of the shapes, which `meaning` puts into words.
  Array(const char* name, const std::optional<Tensor>& tensor, const Tensor& q, std::int32_t dtype,
        const char* meaning, std::initializer_list<std::initializer_list<std::int64_t>> shapes);

  explicit operator bool() const { return tensor_.has_value(); }
  // Null only without a tensor.
  template <class T>
  const T* data() const {
    return tensor_ ? static_cast<const T*>(data_of(*tensor_)) : nullptr;
  }
  std::int64_t extent(std::size_t axis) const { return shape_of(*tensor_)[axis]; }
  // Elements from one entry of axis 0 to the next; 0 where there is one entry, which all share.
  std::int64_t batch_stride() const;

 private:
  std::optional<Tensor> tensor_;
};

}  // namespace heed::operators
