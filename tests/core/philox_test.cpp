// Philox-4x32-10 against the known answers of its authors.
#include "core/philox.hpp"

#include <gtest/gtest.h>

#include <cmath>

namespace heed {
namespace {

// kat_vectors of Random123 (Salmon et al. 2011): philox4x32, 10 rounds.
static_assert(philox(0, {0, 0, 0, 0}) ==
              PhiloxBlock{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
static_assert(philox(0xffffffffffffffffu, {0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}) ==
              PhiloxBlock{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
static_assert(philox(0x299f31d0a4093822u, {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}) ==
              PhiloxBlock{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u});

TEST(Philox, KnownAnswersAtRunTime) {
  volatile std::uint64_t key = 0x299f31d0a4093822u;  // keeps the compiler from folding
  const PhiloxBlock got = philox(key, {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u});
  EXPECT_EQ(got, (PhiloxBlock{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

TEST(Philox, DropoutCounterIsRowColumnHeadEntry) {
  EXPECT_EQ(dropout_words(5, 1, 2, 3, 4), philox(5, {3, 4, 2, 1}));
}

TEST(Philox, ThresholdKeepsTheRightShare) {
  EXPECT_EQ(dropout_threshold(0.f), 0u);
  EXPECT_EQ(dropout_threshold(0.5f), 0x80000000u);
  EXPECT_EQ(dropout_threshold(0.25f), 0x40000000u);
  for (const float p : {0.1f, 0.5f, 0.9f}) {
    int dropped = 0;
    constexpr int kRows = 200, kBlocks = 250;
    for (int row = 0; row < kRows; ++row)
      for (int block = 0; block < kBlocks; ++block)
        for (const std::uint32_t word : dropout_words(99, 0, 0, row, block))
          dropped += word < dropout_threshold(p) ? 1 : 0;
    constexpr double kDraws = 4. * kRows * kBlocks;
    const double sigma = std::sqrt(double{p} * (1 - double{p}) / kDraws);
    EXPECT_NEAR(dropped / kDraws, double{p}, 5 * sigma);
  }
}

}  // namespace
}  // namespace heed
