// PyTorch tensors as heed's views and arrays.
#include "tensors.hpp"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "api/message.hpp"

namespace heed::operators {
namespace {

// The fields of the C++ problem as the operators call them.
constexpr std::array<std::pair<std::string_view, std::string_view>, 11> kOperatorNames{{
    {"intervals.bits_words", "key_bits.shape[1]"},
    {"intervals.rows", "intervals"},
    {"intervals.bits", "key_bits"},
    {"paged.max_pages", "page_table.shape[1]"},
    {"dropout.probability", "dropout_p"},
    {"sequences.", ""},
    {"band.", ""},
    {"score.", ""},
    {"paged.", ""},
    {"dropout.", ""},
    {" (kUnbounded)", ""},
}};

std::string in_operator_names(std::string text) {
  for (const auto& [field, name] : kOperatorNames)
    for (std::size_t at = 0; (at = text.find(field, at)) != std::string::npos; at += name.size())
      text.replace(at, field.size(), name);
  return text;
}

std::string dtype_name(std::int32_t code) {
  const DTypeCodes& codes = dtype_codes();
  const std::array<std::pair<std::int32_t, const char*>, 11> names{{
      {codes.f32, "f32"},
      {codes.bf16, "bf16"},
      {codes.f16, "f16"},
      {codes.f64, "f64"},
      {codes.boolean, "bool"},
      {codes.int32, "int32"},
      {codes.int64, "int64"},
      {aoti_torch_dtype_int8(), "int8"},
      {aoti_torch_dtype_int16(), "int16"},
      {aoti_torch_dtype_uint8(), "uint8"},
      {aoti_torch_dtype_complex64(), "complex64"},
  }};
  for (const auto& [known, name] : names)
    if (known == code) return name;
  return concat("number ", code, " of torch");
}

DType dtype_of(const char* name, std::int32_t code) {
  const DTypeCodes& codes = dtype_codes();
  if (code == codes.f32) return DType::f32;
  if (code == codes.bf16) return DType::bf16;
  if (code == codes.f16) return DType::f16;
  if (code == codes.f64) return DType::f64;
  if (code == codes.boolean) return DType::boolean;
  raise(invalid(name, ".dtype = ", dtype_name(code), " must be f32, bf16, f16, f64 or bool"));
}

std::string device_name(std::int32_t type, std::int32_t index) {
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_cuda()) return concat("cuda:", index);
  if (type == aoti_torch_device_type_meta()) return "meta";
  return concat("device type ", type);
}

bool fits(Shape shape, std::initializer_list<std::int64_t> wanted) {
  return std::ranges::equal(shape, wanted, [](std::int64_t extent, std::int64_t want) {
    return want == Array::kAny || extent == want;
  });
}

}  // namespace

void raise(const Status& status) {
  const std::string text = in_operator_names(status.message());
  switch (status.code()) {
    case Code::invalid: throw std::runtime_error("heed: invalid: " + text);
    case Code::unsupported: throw std::runtime_error("heed: unsupported: " + text);
    case Code::ok:
    case Code::device: break;
  }
  throw std::runtime_error("heed: " + text);
}

std::string text_of(Shape shape) {
  std::string text = "[";
  for (const std::int64_t extent : shape) {
    if (text.size() > 1) text += ", ";
    text += extent == Array::kAny ? "any" : std::to_string(extent);
  }
  return text + "]";
}

const DTypeCodes& dtype_codes() {
  static const DTypeCodes codes{aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                                aoti_torch_dtype_float16(), aoti_torch_dtype_float64(),
                                aoti_torch_dtype_bool(),    aoti_torch_dtype_int32(),
                                aoti_torch_dtype_int64()};
  return codes;
}

Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.data(), sizes.size()};
}

std::int32_t dtype_code(const Tensor& tensor) {
  std::int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

std::int32_t device_type(const Tensor& tensor) {
  std::int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

std::int32_t device_index(const Tensor& tensor) {
  std::int32_t index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &index));
  return index;
}

namespace {

Tensor empty(Shape shape, std::int32_t dtype, std::int32_t type, std::int32_t index) {
  std::array<std::int64_t, 4> strides{};
  std::int64_t stride = 1;
  for (std::size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<std::int64_t>(shape[d], 1);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<std::int64_t>(shape.size()),
                                                  shape.data(), strides.data(), dtype, type, index,
                                                  &handle));
  return Tensor(handle);
}

}  // namespace

Tensor empty(Shape shape, std::int32_t dtype, const Tensor& like) {
  return empty(shape, dtype, device_type(like), device_index(like));
}

Tensor empty(Shape shape, std::int32_t dtype, const torch::stable::Device& device) {
  const auto type = torch::stable::detail::from(device.type());
  return empty(shape, dtype, torch::stable::detail::to<std::int32_t>(type), device.index());
}

Tensor cast(const Tensor& tensor, std::int32_t dtype) {
  if (dtype_code(tensor) == dtype) return tensor;
  return torch::stable::to(tensor, torch::stable::detail::to<torch::headeronly::ScalarType>(
                                       torch::stable::detail::from(dtype)));
}

Tensor with_unit_stride(const Tensor& tensor) {
  const std::int64_t rank = tensor.dim();
  if (rank == 0 || tensor.size(rank - 1) <= 1 || tensor.stride(rank - 1) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

void check_device(const char* name, const Tensor& tensor, const char* where, const Tensor& other) {
  const std::int32_t type = device_type(tensor), index = device_index(tensor);
  if (type == device_type(other) && index == device_index(other)) return;
  raise(invalid(name, ".device = ", device_name(type, index), " must be ", where, " = ",
                device_name(device_type(other), device_index(other))));
}

void check_dtype(const char* name, const Tensor& tensor, std::int32_t dtype) {
  const std::int32_t code = dtype_code(tensor);
  if (code != dtype)
    raise(invalid(name, ".dtype = ", dtype_name(code), " must be ", dtype_name(dtype)));
}

const void* data_of(const Tensor& tensor) {
  alignas(64) static constexpr std::byte kNothing[64]{};
  const void* data = tensor.const_data_ptr();
  return data != nullptr ? data : kNothing;
}

ConstTensorView view_of(const char* name, const Tensor& tensor) {
  ConstTensorView view;
  const Shape shape = shape_of(tensor);
  const auto strides = tensor.strides();
  if (shape.size() < 3 || shape.size() > 4)
    raise(invalid(name, ".rank = ", shape.size(),
                  " must be 4, [batch, seqlen, heads, head_dim], or 3, packed [total, heads, "
                  "head_dim]"));
  view.data = tensor.const_data_ptr();
  view.dtype = dtype_of(name, dtype_code(tensor));
  view.rank = static_cast<int>(shape.size());
  for (std::size_t d = 0; d < shape.size(); ++d) {
    view.shape[d] = shape[d];
    view.stride[d] = strides[d];
  }
  return view;
}

TensorView mutable_view_of(const char* name, const Tensor& tensor) {
  const ConstTensorView view = view_of(name, tensor);
  return {tensor.mutable_data_ptr(), view.dtype, view.rank, view.shape, view.stride};
}

Array::Array(const char* name, const std::optional<Tensor>& tensor, const Tensor& q,
             std::int32_t dtype, const char* meaning,
             std::initializer_list<std::initializer_list<std::int64_t>> shapes) {
  if (!tensor) return;
  check_device(name, *tensor, q);
  check_dtype(name, *tensor, dtype);
  const Shape shape = shape_of(*tensor);
  if (std::ranges::none_of(shapes, [&](const auto& wanted) { return fits(shape, wanted); }))
    raise(invalid(name, ".shape = ", text_of(shape), " must be ", meaning, " = ",
                  text_of(*shapes.begin())));
  tensor_ = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
}

std::int64_t Array::batch_stride() const {
  const Shape shape = shape_of(*tensor_);
  std::int64_t stride = 1;
  for (const std::int64_t extent : shape.subspan(1)) stride *= extent;
  return shape[0] == 1 ? 0 : stride;
}

}  // namespace heed::operators
