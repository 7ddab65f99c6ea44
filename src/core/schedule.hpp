// Into how many parts a GPU splits the keys of few query rows.
#pragma once

#include <cstdint>

#include "core/sequence.hpp"

namespace heed {

inline constexpr std::int64_t kMostSplits = 1024;

struct SplitRequest {
  std::int64_t tasks;  // blocks without splitting
  std::int64_t slots;  // blocks that the GPU holds at a time
  std::int64_t keys;
  int tile_n;
};

// `wanted` > 0 is a caller's choice. Else the number of parts that ends first, when a block takes a
// step per tile of keys and kStart steps to begin, blocks run in waves of `slots`, and joining the
// parts costs kJoin steps and a step for every kPartsPerStep of them (fitted to an H200).
constexpr int gpu_splits(const SplitRequest& r, int wanted) {
  constexpr std::int64_t kStart = 2, kJoin = 6, kPartsPerStep = 16;
  const std::int64_t steps = (r.keys + r.tile_n - 1) / r.tile_n;
  const std::int64_t most = clamp64(steps / 2, 1, kMostSplits);
  if (wanted > 0) return static_cast<int>(clamp64(wanted, 1, most));
  if (r.tasks == 0 || r.slots == 0) return 1;
  std::int64_t best = 1, least = 0;
  for (std::int64_t splits = 1; splits <= most; ++splits) {
    const std::int64_t waves = (r.tasks * splits + r.slots - 1) / r.slots;
    if (splits > 1 && waves > 4) break;
    std::int64_t cost = waves * ((steps + splits - 1) / splits + kStart);
    if (splits > 1) cost += kJoin + splits / kPartsPerStep;
    if (splits == 1 || cost < least) {
      best = splits;
      least = cost;
    }
  }
  return static_cast<int>(best);
}

}  // namespace heed
