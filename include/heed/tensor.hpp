// Non-owning views of the caller's tensors.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace heed {

enum class DType : std::uint8_t { f32, bf16, f16, f64, boolean };

constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
    case DType::boolean: return 1;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return "f64";
    case DType::f32: return "f32";
    case DType::bf16: return "bf16";
    case DType::f16: return "f16";
    case DType::boolean: return "bool";
  }
  return "?";
}

// Rank 4: [batch, seqlen, heads, head_dim]; rank 3 (packed): [total, heads, head_dim].
// Strides are in elements; the last one must be 1, the others are free. data == nullptr: no tensor.
template <class Pointer>
struct BasicTensorView {
  Pointer data = nullptr;
  DType dtype = DType::f32;
  int rank = 4;
  std::array<std::int64_t, 4> shape{};
  std::array<std::int64_t, 4> stride{};

  constexpr explicit operator bool() const { return data != nullptr; }
  // Packed tensors have one batch axis less: their tokens stand in dimension 0.
  constexpr std::int64_t batch() const { return rank == 4 ? shape[0] : 1; }
  constexpr std::int64_t seqlen() const { return shape[rank - 3]; }
  constexpr std::int64_t heads() const { return shape[rank - 2]; }
  constexpr std::int64_t head_dim() const { return shape[rank - 1]; }
  constexpr std::int64_t batch_stride() const { return rank == 4 ? stride[0] : 0; }
  constexpr std::int64_t seqlen_stride() const { return stride[rank - 3]; }
  constexpr std::int64_t head_stride() const { return stride[rank - 2]; }
  constexpr std::int64_t numel() const {
    std::int64_t n = 1;
    for (int d = 0; d < rank; ++d) n *= shape[d];
    return n;
  }
};

using TensorView = BasicTensorView<void*>;

struct ConstTensorView : BasicTensorView<const void*> {
  constexpr ConstTensorView() = default;
  constexpr ConstTensorView(const void* pointer, DType type, int axes,
                            std::array<std::int64_t, 4> sizes, std::array<std::int64_t, 4> strides)
      : BasicTensorView{pointer, type, axes, sizes, strides} {}
  constexpr ConstTensorView(const TensorView& view)  // NOLINT(google-explicit-constructor)
      : BasicTensorView{view.data, view.dtype, view.rank, view.shape, view.stride} {}
};

namespace detail {
constexpr TensorView contiguous(void* data, DType dtype, const std::int64_t* shape, int rank) {
  TensorView view{data, dtype, rank, {}, {}};
  if (rank > 4) return view;  // refused by validate()
  std::int64_t stride = 1;
  for (int d = rank - 1; d >= 0; --d) {
    view.shape[d] = shape[d];
    view.stride[d] = stride;
    stride *= shape[d];
  }
  return view;
}
}  // namespace detail

// Row-major views of densely stored tensors, of rank 3 or 4.
constexpr TensorView contiguous(void* data, DType dtype, std::initializer_list<std::int64_t> shape) {
  return detail::contiguous(data, dtype, shape.begin(), static_cast<int>(shape.size()));
}
constexpr ConstTensorView contiguous(const void* data, DType dtype,
                                     std::initializer_list<std::int64_t> shape) {
  return contiguous(const_cast<void*>(data), dtype, shape);
}
template <std::size_t kRank>
constexpr TensorView contiguous(void* data, DType dtype,
                                const std::array<std::int64_t, kRank>& shape) {
  return detail::contiguous(data, dtype, shape.data(), static_cast<int>(kRank));
}
template <std::size_t kRank>
constexpr ConstTensorView contiguous(const void* data, DType dtype,
                                     const std::array<std::int64_t, kRank>& shape) {
  return contiguous(const_cast<void*>(data), dtype, shape);
}

}  // namespace heed
