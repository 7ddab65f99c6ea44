// Whether strided tensors share bytes: outputs may interleave in one buffer, but never meet.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <utility>

#include "api/message.hpp"
#include "heed/tensor.hpp"

namespace heed {

inline constexpr std::int64_t kMaxBytes = std::int64_t{1} << 61;

// Bytes of a * b elements of `size` bytes; kMaxBytes when they are more.
inline std::int64_t bytes_of(std::int64_t a, std::int64_t b = 1, std::int64_t size = 4) {
  std::int64_t bytes = 0;
  if (__builtin_mul_overflow(a, b, &bytes) || __builtin_mul_overflow(bytes, size, &bytes))
    return kMaxBytes;
  return std::min(bytes, kMaxBytes);
}

struct ByteAxis {
  std::int64_t extent;
  std::int64_t stride;  // bytes, > 0
};

// The bytes of one tensor: runs of `run` bytes repeated along up to three axes, largest stride
// first.
struct Footprint {
  const char* name;
  std::uintptr_t begin;
  std::int64_t bytes;  // from the first byte to the end of the last
  std::int64_t run;
  std::array<ByteAxis, 3> axes;
  std::size_t rank;

  std::uintptr_t end() const { return begin + static_cast<std::uintptr_t>(bytes); }
};

inline std::int64_t reach(std::span<const ByteAxis> axes, std::int64_t run) {
  for (const ByteAxis& axis : axes) run += (axis.extent - 1) * axis.stride;
  return run;
}

// Requires a tensor whose strides are legal and whose extents are all positive.
inline Footprint footprint(const char* name, const ConstTensorView& t) {
  const auto size = static_cast<std::int64_t>(size_of(t.dtype));
  Footprint f;
  f.name = name;
  f.begin = reinterpret_cast<std::uintptr_t>(t.data);
  f.run = t.head_dim() * size;
  f.rank = 0;
  for (std::size_t d = 0; d + 1 < static_cast<std::size_t>(t.rank); ++d)
    if (t.shape[d] > 1 && t.stride[d] > 0) f.axes[f.rank++] = {t.shape[d], t.stride[d] * size};
  const auto order = [&f](std::size_t i, std::size_t j) {
    if (j < f.rank && f.axes[i].stride < f.axes[j].stride) std::swap(f.axes[i], f.axes[j]);
  };
  order(0, 1);
  order(1, 2);
  order(0, 1);
  f.bytes = reach({f.axes.data(), f.rank}, f.run);
  return f;
}

inline Footprint footprint(const char* name, const void* data, std::int64_t bytes) {
  return {name, reinterpret_cast<std::uintptr_t>(data), bytes, bytes, {}, 0};
}

inline bool ranges_meet(const Footprint& a, const Footprint& b) {
  return a.begin < b.end() && b.begin < a.end();
}

// Whether some byte of `a` is a byte of `b`, which begins `offset` bytes after `a`. Peels off the
// largest stride of the two, so interleaved views of one buffer come out apart; says yes when that
// takes more than `steps` comparisons.
inline bool runs_meet(std::span<const ByteAxis> a, std::int64_t run_a, std::span<const ByteAxis> b,
                      std::int64_t run_b, std::int64_t offset, int& steps) {
  if (offset >= reach(a, run_a) || -offset >= reach(b, run_b)) return false;
  if ((a.empty() && b.empty()) || --steps < 0) return true;
  const std::int64_t stride =
      std::max(a.empty() ? 0 : a.front().stride, b.empty() ? 0 : b.front().stride);
  const auto peel = [stride](std::span<const ByteAxis>& axes) {
    if (axes.empty() || axes.front().stride != stride) return std::int64_t{1};
    const std::int64_t extent = axes.front().extent;
    axes = axes.subspan(1);
    return extent;
  };
  const std::int64_t extent_a = peel(a), extent_b = peel(b);
  // Slice i of a meets slice j of b only if offset - (i - j) * stride lies in (-rest_b, rest_a).
  const std::int64_t rest_a = reach(a, run_a), rest_b = reach(b, run_b);
  const auto floor_div = [stride](std::int64_t x) {
    return x >= 0 ? x / stride : -((-x - 1) / stride) - 1;
  };
  const std::int64_t first = std::max(floor_div(offset - rest_a) + 1, 1 - extent_b);
  const std::int64_t last = std::min(floor_div(offset + rest_b - 1), extent_a - 1);
  for (std::int64_t apart = first; apart <= last; ++apart)
    if (runs_meet(a, run_a, b, run_b, offset - apart * stride, steps)) return true;
  return false;
}

inline bool overlap(const Footprint& a, const Footprint& b) {
  if (!ranges_meet(a, b)) return false;
  int steps = 256;
  const auto offset = static_cast<std::int64_t>(b.begin - a.begin);
  return runs_meet({a.axes.data(), a.rank}, a.run, {b.axes.data(), b.rank}, b.run, offset, steps);
}

// What one call reads and writes; null pointers and empty tensors take no part.
class Regions {
 public:
  void read(const char* name, const ConstTensorView& t) { add(inputs_, num_inputs_, name, t); }
  void read(const char* name, const void* data, std::int64_t bytes) {
    add(inputs_, num_inputs_, name, data, bytes);
  }
  void write(const char* name, const ConstTensorView& t) { add(outputs_, num_outputs_, name, t); }
  void write(const char* name, const void* data, std::int64_t bytes) {
    add(outputs_, num_outputs_, name, data, bytes);
  }

  // No output shares a byte with an input or with another output.
  Status check() const {
    for (std::size_t i = 0; i < num_outputs_; ++i) {
      for (std::size_t j = 0; j < num_inputs_; ++j)
        if (overlap(outputs_[i], inputs_[j])) return refuse(outputs_[i], inputs_[j]);
      for (std::size_t j = 0; j < i; ++j)
        if (overlap(outputs_[i], outputs_[j])) return refuse(outputs_[i], outputs_[j]);
    }
    return {};
  }

 private:
  static void add(std::span<Footprint> to, std::size_t& count, const char* name,
                  const ConstTensorView& t) {
    if (!t) return;
    for (std::size_t d = 0; d < static_cast<std::size_t>(t.rank); ++d)
      if (t.shape[d] == 0) return;
    to[count++] = footprint(name, t);
  }
  static void add(std::span<Footprint> to, std::size_t& count, const char* name, const void* data,
                  std::int64_t bytes) {
    if (data != nullptr && bytes > 0) to[count++] = footprint(name, data, bytes);
  }
  static Status refuse(const Footprint& output, const Footprint& other) {
    return invalid(output.name, " = ", output.begin, " (address) must not overlap ", other.name,
                   " at addresses ", other.begin, " to ", other.end());
  }

  std::array<Footprint, 19> inputs_;  // 15 of both passes, 4 of backward
  std::array<Footprint, 5> outputs_;
  std::size_t num_inputs_ = 0;
  std::size_t num_outputs_ = 0;
};

}  // namespace heed
