// Where an entry's tokens are, for every layout, and that no content leads outside the tensor.
#include "core/sequence.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>

namespace heed {
namespace {

TEST(SideSlice, DenseIsTheWholeRow) {
  const SideSlice at = side_slice(3, 10, nullptr, nullptr, nullptr, 0);
  EXPECT_EQ(at.batch, 3);
  EXPECT_EQ(at.token, 0);
  EXPECT_EQ(at.length, 10);
  EXPECT_EQ(at.slot, 0);
}

TEST(SideSlice, PackedIsBetweenTwoOffsets) {
  const std::array<std::int32_t, 4> cu{0, 4, 4, 9};
  const std::array<std::int32_t, 3> used{3, 0, 7};
  EXPECT_EQ(side_slice(0, 9, cu.data(), nullptr, nullptr, 0).length, 4);
  EXPECT_EQ(side_slice(1, 9, cu.data(), nullptr, nullptr, 0).length, 0);
  const SideSlice last = side_slice(2, 9, cu.data(), nullptr, nullptr, 0);
  EXPECT_EQ(last.batch, 0);
  EXPECT_EQ(last.token, 4);
  EXPECT_EQ(last.length, 5);
  EXPECT_EQ(last.slot, 0);
  EXPECT_EQ(side_slice(0, 9, cu.data(), nullptr, used.data(), 0).length, 3);
  EXPECT_EQ(side_slice(2, 9, cu.data(), nullptr, used.data(), 0).length, 5);
  EXPECT_EQ(side_slice(2, 9, cu.data(), nullptr, nullptr, 2).length, 2);
}

TEST(SideSlice, PaddedStartsAtItsSlot) {
  const std::array<std::int32_t, 2> start{3, 0};
  const std::array<std::int32_t, 2> used{2, 5};
  const SideSlice left = side_slice(0, 8, nullptr, start.data(), nullptr, 0);
  EXPECT_EQ(left.token, 3);
  EXPECT_EQ(left.slot, 3);
  EXPECT_EQ(left.length, 5);
  EXPECT_EQ(side_slice(0, 8, nullptr, start.data(), used.data(), 0).length, 2);
  EXPECT_EQ(side_slice(1, 8, nullptr, start.data(), used.data(), 0).length, 5);
}

TEST(SideSlice, NoContentLeadsOutside) {
  const std::array<std::int32_t, 7> values{INT32_MIN, -1, 0, 3, 8, 9, INT32_MAX};
  for (const std::int32_t a : values)
    for (const std::int32_t b : values)
      for (const std::int32_t u : values) {
        const std::array<std::int32_t, 2> cu{a, b};
        for (const SideSlice& at : {side_slice(0, 8, cu.data(), nullptr, &u, 0),
                                    side_slice(0, 8, nullptr, &a, &u, 0)}) {
          ASSERT_GE(at.token, 0);
          ASSERT_GE(at.length, 0);
          ASSERT_LE(at.token + at.length, 8);
        }
      }
}

TEST(Lse, HasOneIndexPerRow) {
  ForwardProblem p;
  p.q = contiguous(static_cast<const void*>(nullptr), DType::f32, {2, 5, 3, 4});
  SequenceSlice at;
  at.q = {.batch = 1, .token = 2, .length = 3, .slot = 2};
  EXPECT_EQ(lse_index(p, at, 2, 1), (1 * 3 + 2) * 5 + 3);
  p.q = contiguous(static_cast<const void*>(nullptr), DType::f32, {9, 3, 4});
  at.q = {.batch = 0, .token = 4, .length = 5, .slot = 0};
  EXPECT_EQ(lse_index(p, at, 2, 1), 2 * 9 + 5);
}

}  // namespace
}  // namespace heed
