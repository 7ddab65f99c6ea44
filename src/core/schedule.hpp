// In which order a GPU computes, and into how many parts it splits the keys of few query rows.
#pragma once

#include <cstdint>
#include <limits>

#include "core/divisor.hpp"
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
  constexpr std::int64_t kStart = 3, kJoin = 6, kPartsPerStep = 64;
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

// The order of blocks: items (heads of entries) in turns of `at_once`, whose keys and values stay in
// L2 together; within a turn first the first tile of every item, then the second ones. So the
// blocks that start last are the lightest of a causal band.
struct ItemTile {
  int item, tile;
};
struct ItemOrder {
  int items = 0;
  Divisor per_turn;          // blocks
  Divisor at_once, in_last;  // items of a turn, and of the last one

  constexpr ItemOrder() = default;
  // Nothing may be computed of an order whose items * tiles exceeds 2^31 - 1.
  constexpr ItemOrder(int all, int together, int tiles)
      : items(all), at_once(static_cast<int>(clamp64(together, 1, all < 1 ? 1 : all))) {
    in_last = Divisor(all % at_once.value == 0 ? at_once.value : all % at_once.value);
    per_turn = Divisor(static_cast<int>(
        clamp64(std::int64_t{at_once.value} * tiles, 1, std::numeric_limits<int>::max())));
  }

  // block < items * tiles
  constexpr ItemTile at(int block) const {
    const int turn = block / per_turn, first = turn * at_once.value;
    const Divisor& count = items - first < at_once.value ? in_last : at_once;
    const int rest = block - turn * per_turn.value, tile = rest / count;
    return {first + rest - tile * count.value, tile};
  }
};

// Heads of entries whose keys and values fill half of the 40 to 50 MB of L2 that an A100 or H200
// has; not more than there are.
constexpr int items_in_l2(const ForwardProblem& f) {
  constexpr std::int64_t kBytes = std::int64_t{20} << 20;
  const std::int64_t group = f.k.heads() == 0 ? 1 : f.q.heads() / f.k.heads();
  const std::int64_t bytes = 2 * max_seqlen_k(f) * (f.k.head_dim() + f.v.head_dim());
  const std::int64_t all = clamp64(f.q.heads() * batch_entries(f), 1, 1 << 20);
  return static_cast<int>(clamp64(bytes == 0 ? 1 : kBytes * group / bytes, 1, all));
}

}  // namespace heed
