// What a fuzz target makes of its bytes: small numbers first, and zeros when they run out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>

namespace heed::fuzz {

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  // In [0, end), end at most 256.
  int below(int end) { return byte() % end; }
  // True for one byte of `of`; never when the bytes have run out.
  bool one_in(int of) { return byte() % of == of - 1; }
  template <class T, std::size_t kCount>
  T pick(const T (&choices)[kCount]) {
    return choices[static_cast<std::size_t>(below(static_cast<int>(kCount)))];
  }
  template <class T>
  T raw() {
    std::uint64_t bits = 0;
    for (std::size_t i = 0; i < sizeof(T); ++i) bits |= std::uint64_t{byte()} << 8 * i;
    return static_cast<T>(bits);
  }
  // A number at an edge of what fits, or any.
  std::int64_t extreme() {
    constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
    constexpr std::int64_t kEdges[] = {-1,
                                       std::int64_t{1} << 30,
                                       (std::int64_t{1} << 30) - 1,
                                       (std::int64_t{1} << 31) - 1,
                                       std::int64_t{1} << 31,
                                       std::int64_t{1} << 32,
                                       std::int64_t{1} << 58,
                                       std::int64_t{1} << 61,
                                       kMost,
                                       -kMost - 1};
    const int which = below(static_cast<int>(std::size(kEdges)) + 1);
    return which < static_cast<int>(std::size(kEdges)) ? kEdges[which] : raw<std::int64_t>();
  }
  float number() {
    constexpr float kNumbers[] = {0.f,
                                  0.3f,
                                  1.f,
                                  -0.2f,
                                  5.f,
                                  std::numeric_limits<float>::infinity(),
                                  -std::numeric_limits<float>::infinity(),
                                  std::numeric_limits<float>::quiet_NaN()};
    return pick(kNumbers);
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

}  // namespace heed::fuzz
