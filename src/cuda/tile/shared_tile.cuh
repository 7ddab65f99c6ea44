// A tile of 16-bit elements in shared memory, swizzled so that ldmatrix and row copies meet no bank
// twice.
#pragma once

#include <cstdint>

#include "cuda/ptx/memory.cuh"

namespace heed::tile {

// kRows x kCols, row-major in chunks of 8 elements (16 bytes). Chunk c of row r stands at place
// c ^ (r & 7) of its row: eight rows that ldmatrix reads at one chunk lie in eight different groups
// of four banks. Rows of 64 n + 32 elements begin in alternating halves of the banks, so two bits
// of r / 2 do the same.
template <class ElementType, int kRowCount, int kColCount>
struct alignas(128) SharedTile {
  using Element = ElementType;
  static constexpr int kRows = kRowCount;
  static constexpr int kCols = kColCount;
  static constexpr int kChunks = kCols / 8;
  static_assert(kCols % 32 == 0 && sizeof(Element) == 2);

  Element data[kRows * kCols];

  static constexpr int place(int row, int chunk) {
    const int key = kCols % 64 == 0 ? row & 7 : row >> 1 & 3;
    return row * kCols + 8 * (chunk ^ key);
  }
  __device__ Element* chunk(int row, int chunk) { return data + place(row, chunk); }
  __device__ const Element* chunk(int row, int chunk) const { return data + place(row, chunk); }
  __device__ std::uint32_t address(int row, int chunk) const {
    return ptx::shared_address(data) + 2 * static_cast<std::uint32_t>(place(row, chunk));
  }
};

}  // namespace heed::tile
