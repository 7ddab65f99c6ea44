// Reading validity bits a word at a time says what reading them one by one says.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>

#include "core/mask.hpp"

namespace heed {
namespace {

TEST(ValidityBits, WordsSayWhatBitsSay) {
  const std::array<std::uint32_t, 3> bits{0xFFFFFFF7u, 0xFFFFFFFFu, 0x0000FFFFu};
  const KeyIntervals intervals{.bits = bits.data(), .bits_words = 3};
  for (const int slot : {0, 1, 5, 31}) {
    SequenceSlice at;
    at.k.length = 110;
    at.k.slot = slot;
    for (int first = 0; first <= 100; ++first)
      for (int end = first; end <= 110; ++end) {
        bool all = true;
        for (int key = first; key < end; ++key) all = all && key_valid(intervals, at, key);
        ASSERT_EQ(all_keys_valid(intervals, at, first, end), all)
            << "slot " << slot << " keys [" << first << ", " << end << ")";
      }
  }
}

TEST(ValidityBits, EntriesHaveTheirOwnWords) {
  const std::array<std::uint32_t, 2> bits{0x1u, 0x2u};
  const KeyIntervals intervals{.bits = bits.data(), .bits_batch_stride = 1, .bits_words = 1};
  SequenceSlice at;
  at.k.length = 2;
  for (const int entry : {0, 1}) {
    at.entry = entry;
    EXPECT_EQ(key_valid(intervals, at, 0), entry == 0);
    EXPECT_EQ(key_valid(intervals, at, 1), entry == 1);
  }
}

}  // namespace
}  // namespace heed
