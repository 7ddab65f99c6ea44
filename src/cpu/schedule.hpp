// In which order the tasks of ragged and causal problems are handed out: long ones first, so that
// what is left at the end is short and workers end together.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/mask.hpp"
#include "heed/problem.hpp"

namespace heed::cpu {

// One chunk of the keys of an entry, or of `together` entries that a task takes in turn.
struct Share {
  std::int64_t work;  // scores of a head
  int entry;          // the first one
  int chunk;
};

// What is cut: tiles of query rows against chunks of keys, which are as even as whole tiles of keys
// can be. One chunk of all keys: nothing is.
struct Cut {
  int tile;  // rows, and keys
  int chunks = 1;
  int key_tiles = 0;  // of the longest entry
  std::int64_t together = 1;

  // The first key of a chunk; of chunk `chunks`, the end of the last.
  int first_key(int chunk) const {
    const std::int64_t key = std::int64_t{key_tiles} * chunk / chunks * tile;
    return static_cast<int>(std::min<std::int64_t>(key, INT32_MAX));
  }
  int most_keys() const { return ceil_div(key_tiles, chunks) * tile; }
};

// Shares of a problem: chunks * entries / together.
std::int64_t share_count(const ForwardProblem& p, const Cut& cut);

// Writes them, those with the most work first and equal ones by entry and chunk. Work is
// estimated from the first and the last row of each tile.
void order_shares(const ForwardProblem& p, const Cut& cut, Share* shares);

// Tasks are tiles of heads of shares: heads follow each other, so that what a head's tiles read
// stays in the shared cache, and the last tiles come first: under a causal mask they are the
// longest.
struct TaskOrder {
  const Share* shares;
  std::int64_t count;
  std::int64_t heads;
  std::int64_t tiles = 1;

  struct Task {
    Share share;
    std::int64_t head, tile;
  };
  std::int64_t tasks() const { return count * heads * tiles; }
  Task at(std::int64_t task) const {
    return {shares[task / tiles / heads], task / tiles % heads, tiles - 1 - task % tiles};
  }
};

// Whether a forward task is a key head, whose keys its worker packs for itself, else a tile: there
// are enough short heads, and equal ones are done within 5 % of the mean. Follows from the shape
// and the number of workers alone, as a plan's workspace has to.
bool forward_by_heads(const ForwardProblem& p, int workers);

// The chunks of a backward with tiles of so many keys, where one chunk makes `owners` tasks. They
// follow from the shape alone, so that the sums do.
Cut backward_cut(const ForwardProblem& p, int tile, std::int64_t owners);

}  // namespace heed::cpu
