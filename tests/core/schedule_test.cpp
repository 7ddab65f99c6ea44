// The order of blocks visits everything once; splits stay within their bounds.
#include "core/schedule.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <utility>
#include <vector>

namespace heed {
namespace {

TEST(Schedule, EveryTileOfEveryItemIsVisitedOnce) {
  for (const int items : {1, 2, 7, 64})
    for (const int at_once : {1, 2, 5, 64, 100})
      for (const int tiles : {1, 3, 16})
        for (const int least : {0, 1, 7, 40, 5000}) {
          const ItemOrder order(items, at_once, tiles, least);
          std::set<std::pair<int, int>> seen;
          for (int block = 0; block < items * tiles; ++block) {
            const ItemTile at = order.at(block);
            EXPECT_TRUE(at.item >= 0 && at.item < items && at.tile >= 0 && at.tile < tiles);
            EXPECT_TRUE(seen.insert({at.item, at.tile}).second);
          }
          EXPECT_EQ(seen.size(), static_cast<std::size_t>(items * tiles));
          EXPECT_GE(order.in_last.value * tiles, std::min(least, items * tiles));
        }
}

TEST(Schedule, FirstTilesOfATurnComeFirst) {
  constexpr ItemOrder kOrder(6, 4, 3);
  EXPECT_EQ(kOrder.at(0).item, 0);
  EXPECT_EQ(kOrder.at(3).item, 3);
  EXPECT_EQ(kOrder.at(3).tile, 0);
  EXPECT_EQ(kOrder.at(4).tile, 1);
  EXPECT_EQ(kOrder.at(12).item, 4);  // the second turn has two items
  EXPECT_EQ(kOrder.at(14).tile, 1);
}

TEST(Schedule, ALastTurnOfTooFewBlocksJoinsTheOneBefore) {
  constexpr ItemOrder kOrder(6, 4, 3, 7);  // of the two items that are left over, three are wanted
  EXPECT_EQ(kOrder.in_last.value, 6);
  EXPECT_EQ(kOrder.at(5).item, 5);
  EXPECT_EQ(kOrder.at(6).tile, 1);
  constexpr ItemOrder kLonger(10, 4, 3, 7);
  EXPECT_EQ(kLonger.at(11).item, 3);
  EXPECT_EQ(kLonger.at(12).item, 4);  // the second turn has six
  EXPECT_EQ(kLonger.at(17).item, 9);
  EXPECT_EQ(kLonger.at(18).tile, 1);
}

ForwardProblem problem_of_heads() {
  ForwardProblem f;
  f.q = contiguous(static_cast<const void*>(nullptr), DType::bf16, {2, 8192, 32, 128});
  f.k = f.v = f.q;
  return f;
}

TEST(Schedule, HeadsShareL2ByTheKeysThatTheirRowsSee) {
  ForwardProblem f = problem_of_heads();
  f.band = kCausal;
  EXPECT_EQ(items_in_l2(f), 5);  // of 4 MiB
  f.band = sliding_window(1023);
  EXPECT_EQ(items_in_l2(f), 40);  // of 512 KiB
  f.band = chunked(4096);
  EXPECT_EQ(items_in_l2(f), 10);
  f.band = {.left = 0, .right = 0};
  EXPECT_EQ(items_in_l2(f), 64);  // all
}

TEST(Schedule, OnlyItemsThatDifferNeedALastTurn) {
  ForwardProblem f = problem_of_heads();
  EXPECT_EQ(least_last_blocks(f, 132), 1);
  f.band = kCausal;
  EXPECT_EQ(least_last_blocks(f, 132), 264);
}

TEST(Schedule, OrdersOfNothingAndOfTooMuchCanBeMade) {
  for (const ItemOrder order : {ItemOrder(0, 4, 3), ItemOrder(6, 4, 0), ItemOrder(6, 0, 3)})
    EXPECT_GE(order.at_once.value, 1);
  EXPECT_EQ(ItemOrder(1 << 30, 1 << 30, 1 << 30).items, 1 << 30);
}

TEST(Divisor, DividesAsIntegersDo) {
  constexpr int kMost = std::numeric_limits<int>::max();
  std::vector<int> divisors{1,   2,   3,     5,     7,       64,        127,
                            128, 641, 65535, 65536, 1 << 30, kMost - 1, kMost};
  std::mt19937 random(1);
  for (int i = 0; i < 200; ++i) divisors.push_back(1 + static_cast<int>(random() >> (1 + i % 30)));
  for (const int divisor : divisors) {
    const Divisor d(divisor);
    const auto expect = [&](std::int64_t n) {
      if (n < 0 || n > kMost) return;
      const int x = static_cast<int>(n);
      ASSERT_EQ(x / d, x / divisor) << x << " / " << divisor;
      ASSERT_EQ(x % d, x % divisor) << x << " % " << divisor;
    };
    for (int i = 0; i < 1000; ++i) {
      const std::int64_t multiple = std::int64_t{divisor} * (random() >> (1 + i % 30));
      for (const int step : {-1, 0, 1}) expect(multiple + step);
      expect(random() >> 1);
    }
    for (const std::int64_t n : {0, 1, kMost - 1, kMost}) expect(n);
    expect(std::int64_t{kMost} / divisor * divisor - 1);
  }
}

TEST(Schedule, SplitsFillTheGpuAndStayInBounds) {
  // One sequence of 8 key heads leaves most of 264 slots empty.
  EXPECT_GE(gpu_splits({.tasks = 8, .slots = 264, .keys = 8192, .tile_n = 64}, 0), 16);
  EXPECT_LE(gpu_splits({.tasks = 8, .slots = 264, .keys = 8192, .tile_n = 64}, 0), 33);
  // Enough tasks, or few keys: nothing to gain.
  EXPECT_EQ(gpu_splits({.tasks = 2640, .slots = 264, .keys = 8192, .tile_n = 64}, 0), 1);
  EXPECT_EQ(gpu_splits({.tasks = 8, .slots = 264, .keys = 64, .tile_n = 64}, 0), 1);
  EXPECT_EQ(gpu_splits({.tasks = 0, .slots = 264, .keys = 0, .tile_n = 64}, 0), 1);
  // A caller's choice holds within what there is to split.
  EXPECT_EQ(gpu_splits({.tasks = 8, .slots = 264, .keys = 8192, .tile_n = 64}, 7), 7);
  EXPECT_EQ(gpu_splits({.tasks = 8, .slots = 264, .keys = 256, .tile_n = 64}, 7), 2);
  for (const std::int64_t keys : {std::int64_t{1}, std::int64_t{1} << 20, std::int64_t{1} << 30})
    for (const std::int64_t tasks : {1, 100, 1000}) {
      const int splits = gpu_splits({.tasks = tasks, .slots = 264, .keys = keys, .tile_n = 64}, 0);
      EXPECT_TRUE(splits >= 1 && splits <= kMostSplits);
    }
}

}  // namespace
}  // namespace heed
