// In which order a GPU computes, and into how many parts it splits the keys of few query rows.
#pragma once

#include <cstdint>
#include <limits>

#include "core/divisor.hpp"
#include "core/mask.hpp"
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

// The order of blocks: items (heads of entries) in turns of `at_once`, whose keys and values stay
// in L2 together; within a turn first the first tile of every item, then the second ones. So the
// blocks that start last are the lightest of a causal band. Where a turn ends, the heavy blocks of
// the next one fill what its light ones leave; nothing follows the last turn, which must have
// enough of both.
struct ItemTile {
  int item, tile;
};
struct ItemOrder {
  int items = 0;
  int full_turns = 0;        // of at_once items, before the last one
  Divisor per_turn;          // blocks
  Divisor at_once, in_last;  // items of a turn, and of the last one

  constexpr ItemOrder() = default;
  // The last turn has at least `least` blocks, where there are so many. Nothing may be computed of
  // an order whose items * tiles exceeds 2^31 - 1.
  constexpr ItemOrder(int all, int together, int tiles, std::int64_t least = 1)
      : items(all), at_once(static_cast<int>(clamp64(together, 1, all < 1 ? 1 : all))) {
    const std::int64_t least_items = tiles < 1 ? 1 : clamp64((least + tiles - 1) / tiles, 1, all);
    full_turns = static_cast<int>(clamp64((all - least_items) / at_once.value, 0, all));
    in_last = Divisor(static_cast<int>(clamp64(all - full_turns * at_once.value, 1, all)));
    per_turn = Divisor(static_cast<int>(
        clamp64(std::int64_t{at_once.value} * tiles, 1, std::numeric_limits<int>::max())));
  }

  // block < items * tiles
  constexpr ItemTile at(int block) const {
    const int turn = min_of(block / per_turn, full_turns), first = turn * at_once.value;
    const Divisor& count = turn < full_turns ? at_once : in_last;
    const int rest = block - turn * per_turn.value, tile = rest / count;
    return {first + rest - tile * count.value, tile};
  }
};

// Heads of entries, of whose keys and values those that rows see at a time fill half of the 40 to
// 50 MB of L2 that an A100 or H200 has; not more than there are.
constexpr int items_in_l2(const ForwardProblem& f) {
  constexpr std::int64_t kBytes = std::int64_t{20} << 20;
  const std::int64_t group = f.k.heads() == 0 ? 1 : f.q.heads() / f.k.heads();
  std::int64_t keys = clamp64(std::int64_t{f.band.left} + f.band.right + 1, 0, max_seqlen_k(f));
  if (f.band.chunk > 0) keys = clamp64(keys, 0, f.band.chunk);
  const std::int64_t bytes = 2 * keys * (f.k.head_dim() + f.v.head_dim());
  const std::int64_t all = clamp64(f.q.heads() * batch_entries(f), 1, 1 << 20);
  return static_cast<int>(clamp64(bytes == 0 ? 1 : kBytes * group / bytes, 1, all));
}

// Whether every item takes the same time.
constexpr bool items_alike(const ForwardProblem& f) {
  const Sequences& s = f.sequences;
  return f.q.rank == 4 && f.k.rank == 4 && s.start_q == nullptr && s.start_k == nullptr &&
         s.seqused_q == nullptr && s.seqused_k == nullptr && f.band == kFull &&
         f.intervals.rows == nullptr;
}

// Blocks that a forward's last turn must have, by those that the GPU holds at a time: two for each
// end evenly under a causal band. Of documents the last ones are not the lightest. More would share
// L2 among more heads. Measured on an H200: docs/kernels/sm90_forward.md.
constexpr std::int64_t least_last_blocks(const ForwardProblem& f, std::int64_t slots) {
  if (items_alike(f)) return 1;
  return (f.q.rank == 3 || f.intervals.rows != nullptr ? 4 : 2) * slots;
}

}  // namespace heed
