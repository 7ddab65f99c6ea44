// Philox-4x32-10 against the published known answers, and the dropout mask made from it.
#include "core/philox.hpp"

#include <gtest/gtest.h>

namespace heed {
namespace {

// kat_vectors of Random123: philox4x32 with 10 rounds.
TEST(Philox, GivesTheKnownAnswers) {
  EXPECT_EQ(philox(0, {0, 0, 0, 0}),
            (PhiloxBlock{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
  EXPECT_EQ(philox(0xffffffffffffffffu, {0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}),
            (PhiloxBlock{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
  EXPECT_EQ(philox(0x299f31d0a4093822u, {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}),
            (PhiloxBlock{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

TEST(Philox, IsAConstantExpression) {
  static_assert(philox(0, {0, 0, 0, 0})[0] == 0x6627e8d5u);
}

TEST(Dropout, ThresholdIsTheShareOfWordsBelowIt) {
  EXPECT_EQ(dropout_threshold(0.f), 0u);
  EXPECT_EQ(dropout_threshold(0.5f), 0x80000000u);
  EXPECT_EQ(dropout_threshold(0.25f), 0x40000000u);
}

TEST(Dropout, EveryCoordinateMatters) {
  const PhiloxBlock base = dropout_words(7, 1, 2, 3, 4);
  EXPECT_NE(base, dropout_words(8, 1, 2, 3, 4));
  EXPECT_NE(base, dropout_words(7, 0, 2, 3, 4));
  EXPECT_NE(base, dropout_words(7, 1, 0, 3, 4));
  EXPECT_NE(base, dropout_words(7, 1, 2, 0, 4));
  EXPECT_NE(base, dropout_words(7, 1, 2, 3, 0));
}

}  // namespace
}  // namespace heed
