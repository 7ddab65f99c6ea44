// The order of blocks visits everything once; splits stay within their bounds.
#include "core/schedule.hpp"

#include <gtest/gtest.h>

#include <set>
#include <utility>

namespace heed {
namespace {

TEST(Schedule, EveryTileOfEveryItemIsVisitedOnce) {
  for (const int items : {1, 2, 7, 64})
    for (const int at_once : {1, 2, 5, 64, 100})
      for (const int tiles : {1, 3, 16}) {
        std::set<std::pair<int, int>> seen;
        for (int block = 0; block < items * tiles; ++block) {
          const ItemTile at = item_tile(block, items, at_once, tiles);
          EXPECT_TRUE(at.item >= 0 && at.item < items && at.tile >= 0 && at.tile < tiles);
          EXPECT_TRUE(seen.insert({at.item, at.tile}).second);
        }
        EXPECT_EQ(seen.size(), static_cast<std::size_t>(items * tiles));
      }
}

TEST(Schedule, FirstTilesOfATurnComeFirst) {
  EXPECT_EQ(item_tile(0, 6, 4, 3).item, 0);
  EXPECT_EQ(item_tile(3, 6, 4, 3).item, 3);
  EXPECT_EQ(item_tile(3, 6, 4, 3).tile, 0);
  EXPECT_EQ(item_tile(4, 6, 4, 3).tile, 1);
  EXPECT_EQ(item_tile(12, 6, 4, 3).item, 4);  // the second turn has two items
  EXPECT_EQ(item_tile(14, 6, 4, 3).tile, 1);
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
