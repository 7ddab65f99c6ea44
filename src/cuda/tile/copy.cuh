// Rows of a global tensor into a shared tile and back.
#pragma once

#include <cstdint>

#include "cuda/ptx/memory.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace heed::tile {

// Rows [0, count) of the tile become first[r * stride + (0 .. channels)), the others and the
// channels from there on zeros. Addresses are multiples of 16 bytes and channels of 8.
// Asynchronous, to be committed and waited for.
template <int kThreads, class Tile>
__device__ __forceinline__ void load_block(Tile& tile, const typename Tile::Element* first,
                                           std::int64_t stride, int count, int channels) {
  constexpr int kCount = Tile::kRows * Tile::kChunks / kThreads;
  static_assert(Tile::kRows * Tile::kChunks % kThreads == 0);
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kThreads % Tile::kChunks == 0) {
    constexpr int kRowsPerPass = kThreads / Tile::kChunks;
    const int row = thread / Tile::kChunks, chunk = thread % Tile::kChunks;
    const typename Tile::Element* source = first + row * stride + 8 * chunk;
    const std::int64_t step = kRowsPerPass * stride;
    // Where passes are 8 rows apart the swizzle is the same in all of them.
    const std::uint32_t base = tile.address(row, chunk);
    const auto target = [&](int i) {
      return kRowsPerPass % 8 == 0
                 ? base + static_cast<std::uint32_t>(i * kRowsPerPass * Tile::kCols * 2)
                 : tile.address(row + i * kRowsPerPass, chunk);
    };
    if (count >= Tile::kRows && channels == Tile::kCols) {
#pragma unroll
      for (int i = 0; i < kCount; ++i, source += step) ptx::cp_async(target(i), source);
      return;
    }
    const int rows = 8 * chunk < channels ? count : 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i, source += step)
      ptx::cp_async(target(i), source, row + i * kRowsPerPass < rows);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = (thread + i * kThreads) / Tile::kChunks;
      const int chunk = (thread + i * kThreads) % Tile::kChunks;
      ptx::cp_async(tile.address(row, chunk), first + row * stride + 8 * chunk,
                    row < count && 8 * chunk < channels);
    }
  }
}

// Row r of the tile becomes address(r)[0 .. channels), then zeros; nullptr: a row of zeros, of
// which nothing is read. `wide` as load_block needs it; else the elements are read one by one, at
// once.
template <int kThreads, class Tile, class Address>
__device__ __forceinline__ void load_rows(Tile& tile, bool wide, int channels,
                                          const Address& address) {
  using Element = typename Tile::Element;
  constexpr int kCount = Tile::kRows * Tile::kChunks;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < kCount; i += kThreads) {
    const int row = i / Tile::kChunks, first = 8 * (i % Tile::kChunks);
    const Element* source = address(row);
    if (wide) {
      const bool valid = source != nullptr && first < channels;
      ptx::cp_async(tile.address(row, first / 8), valid ? source + first : nullptr, valid);
      continue;
    }
    alignas(16) Element chunk[8];
#pragma unroll
    for (int c = 0; c < 8; ++c)
      chunk[c] = source != nullptr && first + c < channels ? source[first + c] : Element{0};
    *reinterpret_cast<uint4*>(tile.chunk(row, first / 8)) = *reinterpret_cast<const uint4*>(chunk);
  }
}

// address(r)[0 .. channels) becomes row r of the tile for r in [begin, end), by one warp; nullptr:
// nothing is written.
template <class Tile, class Address>
__device__ __forceinline__ void store_rows(const Tile& tile, int begin, int end, bool wide,
                                           int channels, const Address& address) {
  using Element = typename Tile::Element;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < (end - begin) * Tile::kChunks; i += 32) {
    const int row = begin + i / Tile::kChunks, first = 8 * (i % Tile::kChunks);
    Element* target = address(row);
    if (target == nullptr || first >= channels) continue;
    const uint4 bits = *reinterpret_cast<const uint4*>(tile.chunk(row, first / 8));
    if (wide) {
      *reinterpret_cast<uint4*>(target + first) = bits;
      continue;
    }
    alignas(16) Element chunk[8];
    *reinterpret_cast<uint4*>(chunk) = bits;
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (first + c < channels) target[first + c] = chunk[c];
  }
}

}  // namespace heed::tile
