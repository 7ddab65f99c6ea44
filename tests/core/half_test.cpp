// Conversions of bf16 and f16: every value, every rounding boundary.
#include "core/half.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/random.hpp"

namespace heed {
namespace {

// The value of a float format with `exponent_bits` and `mantissa_bits`, by its definition.
double decode(std::uint32_t bits, int exponent_bits, int mantissa_bits) {
  const std::uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = (bits >> (exponent_bits + mantissa_bits) & 1) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  const double fraction = std::ldexp(static_cast<double>(mantissa), -mantissa_bits);
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1 + fraction, exponent - bias);
}

struct Format {
  int exponent_bits, mantissa_bits;
  std::uint16_t (*encode)(float);
  float (*to_float)(std::uint16_t);
};
constexpr Format kBf16{8, 7, [](float x) { return from_float<bf16>(x).bits; },
                       [](std::uint16_t x) { return to_float(bf16{x}); }};
constexpr Format kF16{5, 10, [](float x) { return from_float<f16>(x).bits; },
                      [](std::uint16_t x) { return to_float(f16{x}); }};

class Half : public testing::TestWithParam<const Format*> {};

TEST_P(Half, EveryValueDecodesByDefinitionAndComesBack) {
  const Format& f = *GetParam();
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const double want = decode(bits, f.exponent_bits, f.mantissa_bits);
    const float got = f.to_float(half);
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(got)) << bits;
      ASSERT_TRUE(std::isnan(f.to_float(f.encode(got)))) << bits;
      continue;
    }
    ASSERT_EQ(double{got}, want) << bits;
    ASSERT_EQ(std::signbit(got), std::signbit(want)) << bits;
    ASSERT_EQ(f.encode(got), half) << bits;
  }
}

// Between two neighbours lies one boundary; ties go to the even one.
TEST_P(Half, RoundsToNearestEvenAtEveryBoundary) {
  const Format& f = *GetParam();
  const std::uint32_t largest = (((1u << f.exponent_bits) - 1) << f.mantissa_bits) - 1;
  for (std::uint32_t low = 0; low < largest; ++low) {
    const float a = f.to_float(static_cast<std::uint16_t>(low));
    const float b = f.to_float(static_cast<std::uint16_t>(low + 1));
    const auto middle =
        static_cast<float>((double{a} + double{b}) / 2);  // exact: f32 has spare bits
    for (const float sign : {1.f, -1.f}) {
      const std::uint32_t sign_bit = sign < 0 ? 0x8000u : 0;
      const auto expect = [&](float x, std::uint32_t want) {
        ASSERT_EQ(f.encode(sign * x), static_cast<std::uint16_t>(sign_bit | want)) << x;
      };
      expect(std::nextafter(middle, a), low);
      expect(middle, low % 2 == 0 ? low : low + 1);
      expect(std::nextafter(middle, b), low + 1);
    }
  }
}

TEST_P(Half, OverflowsToInfinityFromHalfASpacingAboveTheLargest) {
  const Format& f = *GetParam();
  const std::uint32_t infinity = ((1u << f.exponent_bits) - 1) << f.mantissa_bits;
  const double largest = decode(infinity - 1, f.exponent_bits, f.mantissa_bits);
  const double below = decode(infinity - 2, f.exponent_bits, f.mantissa_bits);
  const auto boundary = static_cast<float>(largest + (largest - below) / 2);
  EXPECT_EQ(f.encode(boundary), infinity);
  EXPECT_EQ(f.encode(std::nextafter(boundary, 0.f)), infinity - 1);
  EXPECT_EQ(f.encode(INFINITY), infinity);
  EXPECT_EQ(f.encode(-INFINITY), infinity | 0x8000u);
}

TEST_P(Half, NanStaysQuietNan) {
  const Format& f = *GetParam();
  for (const std::uint32_t bits : {0x7F800001u, 0x7FC00000u, 0xFF800001u, 0xFFFFFFFFu, 0x7F80FFFFu})
    EXPECT_TRUE(std::isnan(f.to_float(f.encode(std::bit_cast<float>(bits))))) << bits;
}

#if defined(__FLT16_MANT_DIG__)
#if defined(__aarch64__)
using CompilersHalf = __fp16;  // GCC 12 has no _Float16 there
#else
using CompilersHalf = _Float16;
#endif

TEST(HalfAgainstTheCompiler, RandomFloats) {
  test::Random random(7);
  for (int i = 0; i < 2'000'000; ++i) {
    const auto x = std::bit_cast<float>(static_cast<std::uint32_t>(random.next()));
    if (std::isnan(x)) continue;
    const auto want = std::bit_cast<std::uint16_t>(static_cast<CompilersHalf>(x));
    ASSERT_EQ(from_float<f16>(x).bits, want) << x;
  }
}
#endif

INSTANTIATE_TEST_SUITE_P(Formats, Half, testing::Values(&kBf16, &kF16), [](const auto& format) {
  return format.param == &kBf16 ? "bf16" : "f16";
});

}  // namespace
}  // namespace heed
