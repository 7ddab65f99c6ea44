// Products of a warpgroup (sm_90): its four warps hold 64 rows, 16 each, as Accumulator<1, kN>.
#pragma once

#include <cstdint>

#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/panel_tile.cuh"

namespace heed::tile {

// Columns [begin, ...) of a tile that is read by columns; `begin` is a multiple of 32.
template <class Tile>
__device__ __forceinline__ Descriptor columns_from(Descriptor tile, int begin) {
  return tile + (begin / 64 * Tile::kPanelBytes + begin % 64 * 2);
}

// The same in every lane, and the compiler knows it.
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
}

// Begins acc = left right^T (rows of left times the 8 kN rows of right from the descriptor's on),
// and closes its group.
template <class Left, class Right, int kN>
__device__ __forceinline__ void begin_matmul_nt(Accumulator<1, kN>& acc, Descriptor left,
                                                Descriptor right) {
  static_assert(Left::kCols == Right::kCols && Right::kRows % (8 * kN) == 0);
  auto& d = reinterpret_cast<float(&)[4 * kN]>(acc.at);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Left::kCols / 16; ++k)
    ptx::Wgmma<typename Left::Element, 8 * kN>::template ss<0, 0>(
        d, (left + Left::along_columns(k)).bits(), (right + Right::along_columns(k)).bits(), k > 0);
  ptx::wgmma_commit();
}

// Begins acc += left right, summed over 16 kK rows of `right` from the descriptor's on, and closes
// its group.
template <class Right, int kK, int kN>
__device__ __forceinline__ void begin_matmul_nn(Accumulator<1, kN>& acc, const Operand<1, kK>& left,
                                                Descriptor right) {
  static_assert(Right::kRows % (16 * kK) == 0 && Right::kCols == 8 * kN);
  auto& d = reinterpret_cast<float(&)[4 * kN]>(acc.at);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kK; ++k)
    ptx::Wgmma<typename Right::Element, 8 * kN>::template rs<1>(
        d, left.at[0][k], (right + Right::along_rows(k)).bits(), 1);
  ptx::wgmma_commit();
}

// The same with `left` in shared memory, by rows, and columns of `right` from the descriptor's on.
template <class Left, class Right, int kN>
__device__ __forceinline__ void begin_matmul_nn(Accumulator<1, kN>& acc, Descriptor left,
                                                Descriptor right) {
  static_assert(Left::kCols == Right::kRows);
  auto& d = reinterpret_cast<float(&)[4 * kN]>(acc.at);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Left::kCols / 16; ++k)
    ptx::Wgmma<typename Left::Element, 8 * kN>::template ss<0, 1>(
        d, (left + Left::along_columns(k)).bits(), (right + Right::along_rows(k)).bits(), 1);
  ptx::wgmma_commit();
}

// Begins acc = left^T right[:, begin .. begin + 8 kN), the rows of both summed over, and closes its
// group. `left` as PanelTile::by_columns, 64 columns of a panel; `right` likewise, from column
// `begin` on.
template <class Left, class Right, int kN>
__device__ __forceinline__ void begin_matmul_tn(Accumulator<1, kN>& acc, Descriptor left,
                                                Descriptor right) {
  static_assert(Left::kRows == Right::kRows && Left::kCols % 64 == 0);
  auto& d = reinterpret_cast<float(&)[4 * kN]>(acc.at);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Left::kRows / 16; ++k)
    ptx::Wgmma<typename Left::Element, 8 * kN>::template ss<1, 1>(
        d, (left + Left::along_rows(k)).bits(), (right + Right::along_rows(k)).bits(), k > 0);
  ptx::wgmma_commit();
}

// Returns once at most kPending groups are under way; acc belongs to one that is complete, and its
// registers may be read from here on.
template <int kPending, int kN>
__device__ __forceinline__ void wait_matmul(Accumulator<1, kN>& acc) {
  ptx::wgmma_wait<kPending>();
#pragma unroll
  for (auto& four : acc.at[0])
#pragma unroll
    for (float& x : four) asm volatile("" : "+f"(x));
}

// Rows [row, row + 16) of this warp, columns from chunk `from` on; `row` is a multiple of 8, `from`
// of 2 kK within a panel, or 0.
template <class Tile, int kK>
__device__ __forceinline__ void store_matrices(Tile& tile, int row, const Operand<1, kK>& a,
                                               int from = 0) {
  // Within a panel the chunks of a row differ by an exclusive or.
  const std::uint32_t first =
      ptx::shared_address(tile.chunk(row + lane() % 16, from + lane() / 16));
#pragma unroll
  for (int k = 0; k < kK; ++k)
    ptx::stmatrix((first ^ static_cast<std::uint32_t>(k % 4 * 32)) + k / 4 * Tile::kPanelBytes,
                  a.at[0][k]);
}
// The same, rounded to the tile's elements.
template <class Tile, int kN>
__device__ __forceinline__ void store_matrices(Tile& tile, int row, const Accumulator<1, kN>& acc,
                                               int from = 0) {
  store_matrices(tile, row, to_operand<typename Tile::Element>(acc), from);
}

}  // namespace heed::tile
