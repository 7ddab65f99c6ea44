// The laws of softmax statistics that blocked loops, split keys and sinks rely on.
#include "core/softmax_state.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "support/random.hpp"

namespace heed {
namespace {

SoftmaxState random_state(test::Random& random) {
  if (random.chance(0.1)) return {};
  return {static_cast<float>(60 * random.normal()), static_cast<float>(1 + 500 * random.uniform())};
}

double log2_sum(SoftmaxState s) { return double{s.max} + std::log2(double{s.sum}); }

void expect_close(SoftmaxState a, SoftmaxState b) {
  ASSERT_EQ(a.max, b.max);
  ASSERT_NEAR(a.sum, b.sum, 1e-6 * double{b.sum});
}

TEST(SoftmaxState, EmptyIsTheIdentity) {
  test::Random random(1);
  for (int i = 0; i < 1000; ++i) {
    const SoftmaxState s = random_state(random);
    for (const SoftmaxState merged : {merge(s, {}), merge({}, s)}) {
      EXPECT_EQ(merged.max, s.max);
      EXPECT_EQ(merged.sum, s.sum);
    }
  }
  EXPECT_EQ(natural_lse({}), -kInfinity);
}

TEST(SoftmaxState, MergeIsCommutativeAndAssociative) {
  test::Random random(2);
  for (int i = 0; i < 100'000; ++i) {
    const SoftmaxState a = random_state(random), b = random_state(random), c = random_state(random);
    const SoftmaxState ab = merge(a, b), ba = merge(b, a);
    ASSERT_EQ(ab.max, ba.max);
    ASSERT_EQ(ab.sum, ba.sum);
    expect_close(merge(ab, c), merge(a, merge(b, c)));
  }
}

TEST(SoftmaxState, MergeAddsTheExponentials) {
  test::Random random(3);
  for (int i = 0; i < 10'000; ++i) {
    const SoftmaxState a = random_state(random), b = random_state(random);
    if (a.sum == 0 || b.sum == 0) continue;
    const double x = log2_sum(a), y = log2_sum(b), high = std::max(x, y), low = std::min(x, y);
    const double want = (high + std::log2(1 + std::exp2(low - high))) * kLn2;
    EXPECT_NEAR(natural_lse(merge(a, b)), want, 1e-6 * std::max(1., std::abs(want)));
  }
}

TEST(SoftmaxState, SplittingAnywhereGivesTheSameLse) {
  test::Random random(4);
  std::vector<float> scores(300);
  for (float& s : scores) s = static_cast<float>(20 * random.normal());
  const auto state_of = [&](std::size_t begin, std::size_t end) {
    SoftmaxState s;
    for (std::size_t i = begin; i < end; ++i) s = merge(s, {scores[i], 1.f});
    return s;
  };
  const SoftmaxState whole = state_of(0, scores.size());
  for (std::size_t at = 0; at <= scores.size(); at += 13)
    EXPECT_NEAR(natural_lse(merge(state_of(0, at), state_of(at, scores.size()))),
                natural_lse(whole), 2e-6 * std::abs(natural_lse(whole)));
}

TEST(SoftmaxState, ExtremesStayFiniteAndNanStaysNan) {
  EXPECT_EQ(rescale(-kInfinity, 3.f), 0.f);
  EXPECT_EQ(rescale(-kInfinity, -kInfinity), 1.f);
  EXPECT_EQ(rescale(5.f, 5.f), 1.f);
  const SoftmaxState far = merge({-1000.f, 1.f}, {1000.f, 1.f});
  EXPECT_EQ(far.max, 1000.f);
  EXPECT_EQ(far.sum, 1.f);
  EXPECT_TRUE(std::isnan(merge({-kInfinity, NAN}, {-kInfinity, 0.f}).sum));
  EXPECT_TRUE(std::isnan(merge({1.f, NAN}, {2.f, 1.f}).sum));
}

}  // namespace
}  // namespace heed
