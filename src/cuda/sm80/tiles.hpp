// The tiles of the portable kernels, one per head_dim and pass.
#pragma once

#include <array>
#include <cstddef>

namespace heed::sm80 {

struct ForwardTile {
  int head_dim;  // of q and k, and of v: both are filled up with zeros
  int tile_m;    // query rows per CTA
  int tile_n;    // keys per step
  int warps;
  int ctas;  // per multiprocessor, that registers are budgeted for
  // Rows are all query heads of a key head, neighbours in a tile, and the keys may be split among
  // CTAs.
  bool packed = false;
  int stages = 1;     // of K and V, packed rows only: keys arrive while others are being used
  int key_warps = 1;  // packed rows only: warps that share their rows and split a tile's keys
};

struct BackwardTile {
  int head_dim;
  int tile_m;  // query rows per step
  int tile_n;  // keys per CTA
  int keys;    // of a warp
  int share;   // warps that share these keys
  int stages;  // of Q and dO
};

inline constexpr std::array<ForwardTile, 5> kForwardTiles{{
    {.head_dim = 64, .tile_m = 128, .tile_n = 128, .warps = 4, .ctas = 2},
    {.head_dim = 96, .tile_m = 128, .tile_n = 64, .warps = 4, .ctas = 2},
    {.head_dim = 128, .tile_m = 128, .tile_n = 64, .warps = 4, .ctas = 2},
    {.head_dim = 192, .tile_m = 128, .tile_n = 64, .warps = 8, .ctas = 1},
    {.head_dim = 256, .tile_m = 64, .tile_n = 64, .warps = 4, .ctas = 2},
}};

// Up to 16 rows per key head: one token of up to 16 query heads, or two of 8.
inline constexpr std::array<ForwardTile, 5> kDecodeTiles{{
    {64, 16, 64, 4, 4, true, 3, 4},
    {96, 16, 64, 4, 3, true, 3, 4},
    {128, 16, 64, 4, 2, true, 3, 4},
    {192, 16, 64, 4, 1, true, 3, 4},
    {256, 16, 64, 4, 1, true, 3, 4},
}};

// Where those need more than the 99 KB of shared memory per block of sm_86, sm_89 and sm_120.
inline constexpr std::array<ForwardTile, 3> kCompactDecodeTiles{{
    {128, 16, 32, 2, 1, true, 5, 2},
    {192, 16, 32, 2, 1, true, 3, 2},
    {256, 16, 32, 2, 1, true, 2, 2},
}};

// Up to 64 rows per key head.
inline constexpr std::array<ForwardTile, 5> kWideDecodeTiles{{
    {64, 64, 64, 4, 3, true, 4},
    {96, 64, 64, 4, 2, true, 3},
    {128, 64, 64, 4, 2, true, 3},
    {192, 64, 32, 4, 2, true, 3},
    {256, 64, 32, 4, 1, true, 3},
}};

inline constexpr std::array<BackwardTile, 5> kBackwardTiles{{
    {.head_dim = 64, .tile_m = 128, .tile_n = 128, .keys = 32, .share = 2, .stages = 2},
    {.head_dim = 96, .tile_m = 64, .tile_n = 128, .keys = 32, .share = 2, .stages = 2},
    {.head_dim = 128, .tile_m = 64, .tile_n = 128, .keys = 32, .share = 2, .stages = 2},
    {.head_dim = 192, .tile_m = 64, .tile_n = 64, .keys = 32, .share = 4, .stages = 2},
    {.head_dim = 256, .tile_m = 64, .tile_n = 64, .keys = 32, .share = 4, .stages = 2},
}};

// For devices with 99 KB of shared memory per block: sm_86, sm_89, sm_120.
inline constexpr std::array<BackwardTile, 5> kCompactBackwardTiles{{
    {.head_dim = 64, .tile_m = 64, .tile_n = 128, .keys = 32, .share = 2, .stages = 1},
    {.head_dim = 96, .tile_m = 64, .tile_n = 64, .keys = 32, .share = 2, .stages = 1},
    {.head_dim = 128, .tile_m = 64, .tile_n = 64, .keys = 32, .share = 4, .stages = 1},
    {.head_dim = 192, .tile_m = 32, .tile_n = 64, .keys = 16, .share = 2, .stages = 1},
    {.head_dim = 256, .tile_m = 32, .tile_n = 32, .keys = 16, .share = 2, .stages = 1},
}};
inline constexpr int kCompactSmemBytes = 99 * 1024;

template <class Tile, std::size_t kCount>
constexpr Tile tile_of(const std::array<Tile, kCount>& tiles, int head_dim) {
  std::size_t at = 0;
  while (tiles[at].head_dim != head_dim) ++at;
  return tiles[at];
}

}  // namespace heed::sm80
