// The vector exp2 of every instruction set against libm's in fp64, for every fraction there is.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "heed/plan.hpp"
#include "registry.hpp"

namespace heed::test {

void exp2_scalar(float* values, int count);
void exp2_avx2(float* values, int count);
void exp2_avx512(float* values, int count);
void exp2_neon(float* values, int count);

namespace {

using Exp2 = void (*)(float*, int);
constexpr int kBlock = 1 << 12;

// With the largest error in ulp: scalar multiplies and adds in two roundings.
struct Bounded {
  Exp2 exp2;
  double ulp;
};

std::vector<Bounded> available() {
  std::vector<Bounded> all{{exp2_scalar, 1.15}};
  [[maybe_unused]] const Arch arch = Device::cpu()->arch;
#if defined(__x86_64__)
  if (serves(Arch::avx2, arch)) all.push_back({exp2_avx2, 0.88});
  if (serves(Arch::avx512, arch)) all.push_back({exp2_avx512, 0.88});
#elif defined(__aarch64__)
  if (serves(Arch::neon, arch)) all.push_back({exp2_neon, 0.88});
#endif
  return all;
}

float of(Exp2 exp2, float x) {
  std::vector<float> values(16, x);
  exp2(values.data(), 16);
  return values[0];
}

// x = n + f with n the nearest integer is exact, and so is a multiplication by 2^n: the error depends
// on f alone. Below 2^-27 the result is 1 or its neighbour.
TEST(Exp2, WithinItsBoundForEveryFraction) {
  const std::vector<Bounded> all = available();
  const auto first = std::bit_cast<std::uint32_t>(0x1p-27f);
  const auto last = std::bit_cast<std::uint32_t>(0.5f);
  std::vector<float> values(kBlock);
  std::vector<double> exact(kBlock);
  std::vector<double> worst(all.size());
  for (const float sign : {1.f, -1.f})
    for (std::uint32_t bits = first; bits <= last; bits += kBlock) {
      const auto x = [&](int i) {
        return sign * std::bit_cast<float>(std::min(bits + static_cast<std::uint32_t>(i), last));
      };
      for (int i = 0; i < kBlock; ++i) exact[i] = std::exp2(double{x(i)});
      for (std::size_t set = 0; set < all.size(); ++set) {
        for (int i = 0; i < kBlock; ++i) values[i] = x(i);
        all[set].exp2(values.data(), kBlock);
        for (int i = 0; i < kBlock; ++i) {
          const double ulp = exact[i] < 1 ? 0x1p-24 : 0x1p-23;
          worst[set] = std::max(worst[set], std::abs(values[i] - exact[i]) / ulp);
        }
      }
    }
  for (std::size_t set = 0; set < all.size(); ++set) EXPECT_LE(worst[set], all[set].ulp) << set;
}

TEST(Exp2, IntegersScaleExactly) {
  for (const auto& [exp2, ulp] : available()) {
    // Steps of a prime through all numbers of the range.
    for (std::uint32_t bits = 0; bits < std::bit_cast<std::uint32_t>(127.f); bits += 100'003) {
      for (const float x : {std::bit_cast<float>(bits), -std::bit_cast<float>(bits)}) {
        if (x < -125.f) continue;
        const float n = std::nearbyint(x);
        ASSERT_EQ(of(exp2, x), std::ldexp(of(exp2, x - n), static_cast<int>(n))) << x;
      }
    }
    for (int n = -125; n < 128; ++n)
      ASSERT_EQ(of(exp2, static_cast<float>(n)), std::ldexp(1.f, n)) << n;
  }
}

TEST(Exp2, ZeroFarBelowAndNanStaysNan) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const auto& [exp2, ulp] : available()) {
    for (const float x :
         {-125.0001f, -126.f, -150.f, -1e10f, std::numeric_limits<float>::lowest(), -kInf}) {
      EXPECT_EQ(of(exp2, x), 0.f) << x;
      EXPECT_FALSE(std::signbit(of(exp2, x))) << x;
    }
    EXPECT_TRUE(std::isnan(of(exp2, std::numeric_limits<float>::quiet_NaN())));
  }
}

}  // namespace
}  // namespace heed::test
