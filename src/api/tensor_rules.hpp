// The rules for one tensor: rank, dtype, extents, strides, pointer, room for every element.
#pragma once

#include <array>
#include <cstdint>
#include <limits>
#include <string>

#include "api/message.hpp"
#include "api/overlap.hpp"
#include "heed/problem.hpp"

namespace heed {

inline constexpr std::int64_t kMaxExtent = std::numeric_limits<std::int32_t>::max();
// A position plus an unbounded band must fit an int.
inline constexpr std::int64_t kMaxTokens = kUnbounded - 1;
inline constexpr std::int64_t kMaxHeadDim = 512;

// One tensor of the problem, as errors call it.
struct Named {
  const char* name;
  const ConstTensorView& view;
};

inline bool is_packed(const ConstTensorView& t) { return t.rank == 3; }

inline const char* axis_name(const ConstTensorView& t, int d) {
  constexpr std::array kNames{"batch", "seqlen", "heads", "head_dim"};
  return kNames[static_cast<std::size_t>(d + 4 - t.rank)];
}

inline bool is_empty(const ConstTensorView& t) {
  for (std::size_t d = 0; d < static_cast<std::size_t>(t.rank); ++d)
    if (t.shape[d] == 0) return true;
  return false;
}

// A C caller may pass a number that is no dtype.
inline std::string text_of(DType dtype) {
  return dtype <= DType::boolean ? name_of(dtype) : std::to_string(static_cast<int>(dtype));
}

inline Status check_pointer(const char* name, const void* data, std::size_t alignment) {
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  if (address % alignment != 0)
    return invalid(name, " = ", address, " (address) must be a multiple of ", alignment,
                   " bytes, the size of its elements");
  return {};
}

inline Status require_pointer(const char* name, const void* data, bool needed, const char* why) {
  if (data == nullptr && needed) return invalid(name, " = null must not be null: ", why);
  return {};
}

inline Status check_rank(const Named& t) {
  if (t.view.rank != 3 && t.view.rank != 4)
    return invalid(t.name, ".rank = ", t.view.rank,
                   " must be 4, [batch, seqlen, heads, head_dim], or 3, packed [total, heads, "
                   "head_dim]");
  return {};
}

inline Status check_dtype(const Named& t, const ConstTensorView& q) {
  if (t.view.dtype == q.dtype) return {};
  return invalid(t.name, ".dtype = ", text_of(t.view.dtype),
                 " must be q.dtype = ", name_of(q.dtype));
}

inline Status check_extents(const Named& t) {
  const ConstTensorView& v = t.view;
  const std::array<std::int64_t, 4> most{kMaxExtent, kMaxTokens, kMaxExtent, kMaxHeadDim};
  for (int d = 0; d < v.rank; ++d) {
    const std::int64_t extent = v.shape[static_cast<std::size_t>(d)];
    const std::int64_t least = d == v.rank - 1 ? 1 : 0;
    const std::int64_t limit = most[static_cast<std::size_t>(d + 4 - v.rank)];
    if (extent < least || extent > limit)
      return invalid(t.name, ".", axis_name(v, d), " = ", extent, " must be in [", least, ", ",
                     limit, "]");
  }
  return {};
}

// Strides that stay inside 2^61 bytes, the last one 1; those of axes shorter than 2 mean nothing.
inline Status check_strides(const Named& t) {
  const ConstTensorView& v = t.view;
  if (is_empty(v)) return {};
  std::int64_t elements = 1;
  for (int d = 0; d < v.rank; ++d) {
    const auto at = static_cast<std::size_t>(d);
    if (v.shape[at] <= 1) continue;
    if (d == v.rank - 1 && v.stride[at] != 1)
      return invalid(t.name, ".stride[", d, "] = ", v.stride[at],
                     " must be 1: the elements of a row stand side by side");
    if (v.stride[at] < 0)
      return invalid(t.name, ".stride[", d, "] = ", v.stride[at], " must be at least 0");
    std::int64_t step = 0;
    if (__builtin_mul_overflow(v.shape[at] - 1, v.stride[at], &step) ||
        __builtin_add_overflow(elements, step, &elements) || elements > kMaxBytes / 8)
      return invalid(t.name, ".stride[", d, "] = ", v.stride[at], " must keep ", v.shape[at],
                     " elements within 2^61 bytes");
  }
  return {};
}

inline Status check_data(const Named& t) {
  if (Status s = require_pointer(t.name, t.view.data, !is_empty(t.view), "it has elements");
      !s.ok())
    return s;
  return check_pointer(t.name, t.view.data, size_of(t.view.dtype));
}

inline Status check_tensor(const Named& t, const ConstTensorView& q) {
  if (Status s = check_rank(t); !s.ok()) return s;
  if (Status s = check_dtype(t, q); !s.ok()) return s;
  if (Status s = check_extents(t); !s.ok()) return s;
  if (Status s = check_strides(t); !s.ok()) return s;
  return check_data(t);
}

// Every element of an output has a place of its own.
inline Status check_own_places(const Named& t) {
  if (is_empty(t.view)) return {};
  for (int d = 0; d < t.view.rank - 1; ++d) {
    const auto at = static_cast<std::size_t>(d);
    if (t.view.shape[at] > 1 && t.view.stride[at] == 0)
      return invalid(t.name, ".stride[", d, "] = 0 must be at least 1: an output does not repeat");
  }
  const Footprint f = footprint(t.name, t.view);
  std::int64_t inner = f.run;
  for (std::size_t i = f.rank; i-- > 0;) {
    const ByteAxis& axis = f.axes[i];
    const auto size = static_cast<std::int64_t>(size_of(t.view.dtype));
    if (axis.stride < inner)
      return invalid(t.name, " overlaps itself: the stride ", axis.stride / size,
                     " of its axis of ", axis.extent, " must be at least ", inner / size,
                     ", the elements that one step spans");
    inner += (axis.extent - 1) * axis.stride;
  }
  return {};
}

// `t` must have the extents of `like` in its first axes and `head_dim` in the last one.
inline Status check_like(const Named& t, const Named& like, const Named& like_head_dim) {
  if (t.view.rank != like.view.rank)
    return invalid(t.name, ".rank = ", t.view.rank, " must be ", like.name,
                   ".rank = ", like.view.rank);
  for (int d = 0; d < t.view.rank; ++d) {
    const bool last = d == t.view.rank - 1;
    const Named& other = last ? like_head_dim : like;
    const std::int64_t extent = t.view.shape[static_cast<std::size_t>(d)];
    const std::int64_t wanted =
        last ? other.view.head_dim() : other.view.shape[static_cast<std::size_t>(d)];
    if (extent != wanted)
      return invalid(t.name, ".", axis_name(t.view, d), " = ", extent, " must be ", other.name, ".",
                     axis_name(t.view, d), " = ", wanted);
  }
  return {};
}

}  // namespace heed
