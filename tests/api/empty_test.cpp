// Empty batches, sequences and heads, and rows that see no key: legal, with defined results.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "api/small_problem.hpp"

namespace heed::test {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

bool all(const std::vector<float>& values, float expected) {
  return std::ranges::all_of(values, [=](float x) { return x == expected; });
}

void run_both(SmallProblem& small, const Device& device) {
  EXPECT_EQ(plan_and_run(small.forward, device).message(), "");
  EXPECT_EQ(plan_and_run(small.backward, device).message(), "");
}

class Empty : public testing::TestWithParam<Device> {};
INSTANTIATE_TEST_SUITE_P(Cpu, Empty, testing::ValuesIn(cpu_devices()), [](const auto& device) {
  return std::string(name_of(device.param.arch));
});

TEST_P(Empty, Batch) {
  SmallProblem small({.batch = 0});
  small.forward.sink = small.sink.data();
  small.backward.dsink = small.dsink.data();
  run_both(small, GetParam());
  EXPECT_TRUE(all(small.dsink, 0.f));
}

TEST_P(Empty, Queries) {
  SmallProblem small({.seqlen_q = 0});
  run_both(small, GetParam());
  EXPECT_TRUE(all(small.dk, 0.f));
  EXPECT_TRUE(all(small.dv, 0.f));
}

TEST_P(Empty, Keys) {
  SmallProblem small({.seqlen_k = 0});
  run_both(small, GetParam());
  EXPECT_TRUE(all(small.out, 0.f));
  EXPECT_TRUE(all(small.lse, kMinusInfinity));
  EXPECT_TRUE(all(small.dq, 0.f));
}

TEST_P(Empty, KeysWithASink) {
  SmallProblem small({.batch = 1, .seqlen_q = 1, .seqlen_k = 0});
  small.forward.sink = small.sink.data();
  small.backward.dsink = small.dsink.data();
  run_both(small, GetParam());
  EXPECT_TRUE(all(small.out, 0.f));
  for (std::size_t h = 0; h < small.sink.size(); ++h) EXPECT_FLOAT_EQ(small.lse[h], small.sink[h]);
  EXPECT_TRUE(all(small.dsink, 0.f));
}

TEST_P(Empty, Heads) {
  SmallProblem small({.heads_q = 0});
  run_both(small, GetParam());
  EXPECT_TRUE(all(small.dk, 0.f));
  EXPECT_TRUE(all(small.dv, 0.f));
  SmallProblem none({.heads_q = 0, .heads_k = 0});
  run_both(none, GetParam());
}

TEST_P(Empty, PackedEntries) {
  SmallProblem small({.batch = 2, .seqlen_q = 0, .seqlen_k = 0});
  small.pack_q();
  small.pack_k();
  run_both(small, GetParam());
}

// Causal with more queries than keys: the first rows stand before the first key.
TEST_P(Empty, RowsBeforeTheFirstKey) {
  SmallProblem small({.batch = 1, .seqlen_q = 7, .seqlen_k = 3, .heads_q = 1, .heads_k = 1});
  small.forward.band = kCausal;
  run_both(small, GetParam());
  for (std::size_t row = 0; row < 7; ++row) {
    const bool sees = row >= 4;
    EXPECT_EQ(small.lse[row] != kMinusInfinity, sees);
    for (std::size_t c = 0; c < 6; ++c) EXPECT_EQ(small.out[row * 6 + c] != 0.f, sees);
    for (std::size_t c = 0; c < 8; ++c) EXPECT_TRUE(sees || small.dq[row * 8 + c] == 0.f);
  }
}

// Rows outside their sequence, and gradients of slots outside it.
TEST_P(Empty, Padding) {
  SmallProblem small({.batch = 1, .seqlen_q = 4, .seqlen_k = 4, .heads_q = 1, .heads_k = 1});
  small.ints = {1, 2};
  small.forward.sequences = {.start_q = &small.ints[0],
                             .start_k = &small.ints[0],
                             .seqused_q = &small.ints[1],
                             .seqused_k = &small.ints[1]};
  run_both(small, GetParam());
  for (std::size_t row = 0; row < 4; ++row) {
    const bool inside = row == 1 || row == 2;
    EXPECT_EQ(small.lse[row] != kMinusInfinity, inside);
    for (std::size_t c = 0; c < 6; ++c) {
      EXPECT_EQ(small.out[row * 6 + c] != 0.f, inside);
      EXPECT_EQ(small.dv[row * 6 + c] != 0.f, inside);
    }
    for (std::size_t c = 0; c < 8; ++c) {
      EXPECT_EQ(small.dq[row * 8 + c] != 0.f, inside);
      EXPECT_EQ(small.dk[row * 8 + c] != 0.f, inside);
    }
  }
}

}  // namespace
}  // namespace heed::test
