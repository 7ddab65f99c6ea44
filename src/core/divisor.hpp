// Division of many non-negative integers by one that is known beforehand.
#pragma once

#include <cstdint>

namespace heed {

// A GPU divides integers in about 30 instructions; this is a product and a shift. Exact for every
// dividend of 0 to 2^31 - 1: with m = ceil(2^(31+s) / d) and 2^s >= d, m d exceeds 2^(31+s) by less
// than 2^s, so n m / 2^(31+s) exceeds n / d by less than 1 / d (Granlund and Montgomery, 1994).
struct Divisor {
  int value = 1;
  int shift = 31;
  std::uint32_t multiplier = std::uint32_t{1} << 31;

  constexpr Divisor() = default;
  // divisor > 0
  explicit constexpr Divisor(int divisor) : value(divisor) {
    while ((std::int64_t{1} << (shift - 31)) < divisor) ++shift;
    const std::uint64_t power = std::uint64_t{1} << shift;
    const auto d = static_cast<std::uint64_t>(divisor);
    multiplier = static_cast<std::uint32_t>((power + d - 1) / d);
  }

  friend constexpr int operator/(int n, const Divisor& d) {
    return static_cast<int>(std::uint64_t{d.multiplier} * static_cast<std::uint32_t>(n) >> d.shift);
  }
  friend constexpr int operator%(int n, const Divisor& d) { return n - n / d * d.value; }
};

}  // namespace heed
