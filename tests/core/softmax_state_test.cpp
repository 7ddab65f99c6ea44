// The laws of merging softmax statistics.
#include "core/softmax_state.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace heed {
namespace {

double log_sum(SoftmaxState s) { return double{s.max} + std::log2(double{s.sum}); }

TEST(SoftmaxState, EmptyIsTheIdentity) {
  const SoftmaxState some{3.5f, 2.f};
  for (const SoftmaxState s : {merge(some, {}), merge({}, some)}) {
    EXPECT_EQ(s.max, some.max);
    EXPECT_EQ(s.sum, some.sum);
  }
  const SoftmaxState none = merge({}, {});
  EXPECT_EQ(none.max, -kInfinity);
  EXPECT_EQ(none.sum, 0.f);
  EXPECT_EQ(natural_lse({}), -kInfinity);
}

TEST(SoftmaxState, MergeIsAssociativeAndCommutative) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> max(-200.f, 200.f);
  std::uniform_real_distribution<float> sum(1e-3f, 100.f);
  for (int i = 0; i < 100000; ++i) {
    const SoftmaxState a{max(random), sum(random)};
    const SoftmaxState b{max(random), sum(random)};
    const SoftmaxState c{max(random), sum(random)};
    ASSERT_NEAR(log_sum(merge(merge(a, b), c)), log_sum(merge(a, merge(b, c))), 1e-6);
    const SoftmaxState ab = merge(a, b);
    const SoftmaxState ba = merge(b, a);
    ASSERT_EQ(ab.max, ba.max);
    ASSERT_EQ(ab.sum, ba.sum);
  }
}

TEST(SoftmaxState, MergeIsTheLogarithmOfTheSum) {
  const SoftmaxState s = merge({1.f, 2.f}, {3.f, 0.5f});
  EXPECT_NEAR(natural_lse(s), std::log(2 * 2.0 + 8 * 0.5), 1e-6);
}

TEST(SoftmaxState, NanSumsStayNan) {
  EXPECT_TRUE(std::isnan(merge({-kInfinity, NAN}, {1.f, 1.f}).sum));
  EXPECT_TRUE(std::isnan(merge({-kInfinity, NAN}, {}).sum));
}

}  // namespace
}  // namespace heed
