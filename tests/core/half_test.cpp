// bf16 and f16 conversions against the compiler's own f16 and against the definition of rounding.
#include "core/half.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace heed {
namespace {

TEST(Half, EveryF16SurvivesTheRoundTrip) {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const f16 x{static_cast<std::uint16_t>(bits)};
    const float wide = to_float(x);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(to_float(from_float<f16>(wide)))) << bits;
    } else {
      EXPECT_EQ(from_float<f16>(wide).bits, x.bits) << bits;
    }
  }
}

TEST(Half, EveryBf16SurvivesTheRoundTrip) {
  for (std::uint32_t bits = 0; bits <= 0xFFFF; ++bits) {
    const bf16 x{static_cast<std::uint16_t>(bits)};
    const float wide = to_float(x);
    if (std::isnan(wide)) {
      EXPECT_TRUE(std::isnan(to_float(from_float<bf16>(wide)))) << bits;
    } else {
      EXPECT_EQ(from_float<bf16>(wide).bits, x.bits) << bits;
    }
  }
}

TEST(Half, F16ValuesAreTheirDefinition) {
  EXPECT_EQ(to_float(f16{0x0001}), 0x1p-24f);
  EXPECT_EQ(to_float(f16{0x03FF}), 1023 * 0x1p-24f);
  EXPECT_EQ(to_float(f16{0x0400}), 0x1p-14f);
  EXPECT_EQ(to_float(f16{0x3C00}), 1.f);
  EXPECT_EQ(to_float(f16{0xC100}), -2.5f);
  EXPECT_EQ(to_float(f16{0x7BFF}), 65504.f);
  EXPECT_EQ(to_float(f16{0x7C00}), std::numeric_limits<float>::infinity());
}

// Between two neighbours of the narrow type: the nearer one, and at the middle the even one.
template <class T>
void expect_nearest_even(std::uint16_t bits) {
  const float low = to_float(T{bits});
  const float high = to_float(T{static_cast<std::uint16_t>(bits + 1)});
  const float middle = low + (high - low) / 2;
  const auto even = static_cast<std::uint16_t>(bits % 2 == 0 ? bits : bits + 1);
  EXPECT_EQ(from_float<T>(middle).bits, even) << bits;
  EXPECT_EQ(from_float<T>(std::nextafter(middle, low)).bits, bits) << bits;
  EXPECT_EQ(from_float<T>(std::nextafter(middle, high)).bits, bits + 1) << bits;
  EXPECT_EQ(from_float<T>(-middle).bits, even | 0x8000) << bits;
}

TEST(Half, RoundsToNearestEvenBetweenAllNeighbours) {
  for (std::uint16_t bits = 0; bits < 0x7BFF; ++bits) expect_nearest_even<f16>(bits);
  // The lowest bf16 are f32 subnormals too, where the middle still exists in f32.
  for (std::uint16_t bits = 0; bits < 0x7F7F; ++bits) expect_nearest_even<bf16>(bits);
}

TEST(Half, OverflowsToInfinityPastTheLastMiddle) {
  EXPECT_EQ(from_float<f16>(65519.99f).bits, 0x7BFF);
  EXPECT_EQ(from_float<f16>(65520.f).bits, 0x7C00);
  EXPECT_EQ(from_float<f16>(-1e30f).bits, 0xFC00);
  EXPECT_EQ(from_float<bf16>(std::numeric_limits<float>::max()).bits, 0x7F80);
}

}  // namespace
}  // namespace heed
