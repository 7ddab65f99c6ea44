// The tiles of the Hopper kernels, one per head_dim.
#pragma once

#include <array>

#include "cuda/sm80/tiles.hpp"

namespace heed::sm90 {

using sm80::tile_of;

struct ForwardTile {
  int head_dim;    // of q and k
  int head_dim_v;  // both are filled up with zeros
  int consumers;   // warpgroups, of 64 query rows each
  int tile_n;      // keys per step
  int stages;      // of K and V each
  bool own_out;    // there is shared memory for the output tile
  bool chained;    // an item's first product begins under the last one of the item before
  int q_slots;     // of 64 query rows each: one per consumer, or more, so that the next come sooner

  constexpr int tile_m() const { return 64 * consumers; }
};

// head_dim, head_dim_v, consumers, tile_n, stages, own_out, chained, q_slots
inline constexpr std::array<ForwardTile, 5> kForwardTiles{{
    {64, 64, 3, 128, 3, true, true, 3},
    {96, 96, 2, 128, 2, true, true, 2},
    {128, 128, 2, 128, 2, true, true, 2},
    {192, 192, 2, 96, 2, false, false, 2},
    {256, 256, 2, 80, 2, false, false, 2},
}};

// v narrower than q and k, as multi-head latent attention has it.
inline constexpr std::array<ForwardTile, 1> kNarrowForwardTiles{{
    {192, 128, 2, 128, 2, false, false, 2},
}};

// For up to kShortSeqlen keys: tiles that divide them better than those of 80.
inline constexpr int kShortSeqlen = 512;
inline constexpr std::array<ForwardTile, 1> kShortForwardTiles{{
    {256, 256, 2, 64, 2, false, false, 3},
}};

struct BackwardTile {
  int head_dim;  // of q and k, and of v: both are filled up with zeros
  int tile_m;    // query rows per step
  int tile_n;    // keys per CTA: 64 per consumer, or 64 that the consumers share
  int stages;    // of Q and dO each
};

inline constexpr std::array<BackwardTile, 5> kBackwardTiles{{
    {.head_dim = 64, .tile_m = 128, .tile_n = 128, .stages = 2},
    {.head_dim = 96, .tile_m = 64, .tile_n = 128, .stages = 2},
    {.head_dim = 128, .tile_m = 64, .tile_n = 128, .stages = 2},
    {.head_dim = 192, .tile_m = 64, .tile_n = 64, .stages = 2},
    {.head_dim = 256, .tile_m = 64, .tile_n = 64, .stages = 2},
}};

}  // namespace heed::sm90
