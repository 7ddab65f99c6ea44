// Where tokens are, in every layout, for good arrays and for nonsense.
#include "core/sequence.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "support/problem.hpp"
#include "support/shapes.hpp"

namespace heed {
namespace {

void expect_same(const SideSlice& got, const SideSlice& want) {
  EXPECT_EQ(got.batch, want.batch);
  EXPECT_EQ(got.token, want.token);
  EXPECT_EQ(got.length, want.length);
  EXPECT_EQ(got.slot, want.slot);
}

TEST(Sequence, SlicesOfEveryLayoutAreWhereTheTokensWerePut) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const test::Problem problem(test::random_shape(seed, 300), DType::f32, seed);
    SCOPED_TRACE(describe(problem.shape));
    ASSERT_EQ(batch_entries(problem.forward), static_cast<std::int64_t>(problem.q_slices.size()));
    for (std::size_t e = 0; e < problem.q_slices.size(); ++e) {
      const SequenceSlice at = slice_of(problem.forward, static_cast<int>(e));
      EXPECT_EQ(at.entry, static_cast<int>(e));
      expect_same(at.q, problem.q_slices[e]);
      expect_same(at.k, problem.k_slices[e]);
      EXPECT_LE(at.q.length, max_seqlen_q(problem.forward));
      EXPECT_LE(at.k.length, max_seqlen_k(problem.forward));
      EXPECT_EQ(at.diagonal(), at.k.length - at.q.length);
    }
  }
}

// No value of an index array leads outside the tensor.
TEST(Sequence, NonsenseIsClamped) {
  constexpr std::int32_t kLowest = std::numeric_limits<std::int32_t>::min();
  constexpr std::int32_t kHighest = std::numeric_limits<std::int32_t>::max();
  constexpr std::int32_t kValues[] = {kLowest, -1, 0, 3, 9, 10, 11, kHighest};
  constexpr std::int64_t kRows = 10;
  for (const std::int32_t a : kValues)
    for (const std::int32_t b : kValues)
      for (const std::int32_t used : kValues)
        for (const std::int64_t most : {std::int64_t{0}, std::int64_t{4}}) {
          const std::int32_t cu[] = {a, b};
          for (const std::int32_t* seqused : {static_cast<const std::int32_t*>(nullptr), &used}) {
            const SideSlice packed = side_slice(0, kRows, cu, nullptr, seqused, most);
            const SideSlice padded = side_slice(0, kRows, nullptr, &a, seqused, most);
            for (const SideSlice& at : {packed, padded}) {
              ASSERT_GE(at.token, 0);
              ASSERT_GE(at.length, 0);
              ASSERT_LE(at.token + at.length, kRows);
            }
            if (most > 0) {
              ASSERT_LE(packed.length, most);
            }
          }
        }
}

}  // namespace
}  // namespace heed
