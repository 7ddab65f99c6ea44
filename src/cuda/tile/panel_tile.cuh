// A tile of 16-bit elements in shared memory as the copy engine writes it and wgmma reads it.
#pragma once

#include <cstdint>

#include "cuda/ptx/tensor_copy.cuh"

namespace heed::tile {

// Where wgmma finds an operand in shared memory with the 128-byte swizzle and 1024 bytes from eight
// rows to the next. Distances are multiples of 16 bytes, and addresses stay below 256 KB, so that
// adding a distance never reaches the upper word, which is the same for all.
struct Descriptor {
  std::uint32_t low;

  // leading: bytes; what it means depends on which axis is contiguous (see PanelTile).
  static __device__ __forceinline__ Descriptor at(std::uint32_t address, int leading) {
    return {(address & 0x3ffff) >> 4 | static_cast<std::uint32_t>(leading >> 4) << 16};
  }
  __device__ __forceinline__ Descriptor operator+(int bytes) const {
    return {low + static_cast<std::uint32_t>(bytes >> 4)};
  }
  __device__ __forceinline__ std::uint64_t bits() const {
    constexpr std::uint64_t kUpper = 1024 >> 4 | 1 << 30;  // stride, swizzle
    return kUpper << 32 | low;
  }
};

// kRows x kCols in panels of 64 columns, each row-major with 128 bytes a row; chunk c (16 bytes) of
// a panel's row r stands at place c ^ (r & 7). The last panel's columns from kCols on are there but
// are not used.
template <class ElementType, int kRowCount, int kColCount>
struct alignas(1024) PanelTile {
  using Element = ElementType;
  static constexpr int kRows = kRowCount;
  static constexpr int kCols = kColCount;
  static constexpr int kChunks = kCols / 8;
  static constexpr int kPanels = (kCols + 63) / 64;
  static constexpr int kRowBytes = 128;  // of a panel
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kStep = 16;  // of k, by one instruction
  static_assert(kRows % 8 == 0 && kCols % 16 == 0 && sizeof(Element) == 2);

  Element data[kPanels * kRows * 64];

  static constexpr int place(int row, int chunk) {
    return (chunk / 8 * kRows + row) * 64 + 8 * (chunk % 8 ^ (row & 7));
  }
  __device__ Element* chunk(int row, int chunk) { return data + place(row, chunk); }
  __device__ const Element* chunk(int row, int chunk) const { return data + place(row, chunk); }

  // Rows from `row` on (a multiple of 8), columns as k.
  __device__ __forceinline__ Descriptor by_rows(int row = 0) const {
    return Descriptor::at(ptx::shared_address(data) + row * kRowBytes, 16);
  }
  static constexpr int after_rows(int count) { return count * kRowBytes; }
  static constexpr int along_columns(int step) { return step / 4 * kPanelBytes + step % 4 * 32; }
  // Columns as n, rows as k.
  __device__ __forceinline__ Descriptor by_columns() const {
    return Descriptor::at(ptx::shared_address(data), kPanelBytes);
  }
  static constexpr int along_rows(int step) { return step * 2048; }

  // Rows [first, first + box rows of the map) from `start` on, by one thread.
  __device__ __forceinline__ void load(int first, const CUtensorMap& map, ptx::BoxStart start,
                                       ptx::Barrier& done) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::copy_box(data + (panel * kRows + first) * 64, map,
                    {64 * panel, start.row, start.head, start.batch}, done);
  }
  static __device__ __forceinline__ void prefetch(const CUtensorMap& map, ptx::BoxStart start) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::prefetch_box(map, {64 * panel, start.row, start.head, start.batch});
  }
  // Rows from `first` on, as many as the map's boxes have, to `start`, by one thread.
  __device__ __forceinline__ void store(int first, const CUtensorMap& map,
                                        ptx::BoxStart start) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      ptx::store_box(map, data + (panel * kRows + first) * 64,
                     {64 * panel, start.row, start.head, start.batch});
  }
  static constexpr int kLoadBytes = kPanels * kPanelBytes;
};

}  // namespace heed::tile
