// Products of a warpgroup (sm_90): its four warps hold 64 rows, 16 each, as Accumulator<1, kN>.
#pragma once

#include <cstdint>

#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/panel_tile.cuh"

namespace heed::tile {

// The same in every lane, and the compiler knows it.
__device__ __forceinline__ int warpgroup() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
}

// Begins acc = left right^T (rows of left times rows of right), and closes its group.
template <class Left, class Right, int kN>
__device__ __forceinline__ void begin_matmul_nt(Accumulator<1, kN>& acc, Descriptor left,
                                                Descriptor right) {
  static_assert(Left::kCols == Right::kCols && Right::kRows == 8 * kN);
  auto& d = reinterpret_cast<float(&)[4 * kN]>(acc.at);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Left::kCols / 16; ++k)
    ptx::Wgmma<typename Left::Element, 8 * kN>::template ss<0>(
        d, (left + Left::along_columns(k)).bits, (right + Right::along_columns(k)).bits, k > 0);
  ptx::wgmma_commit();
}

// Begins acc += left right, the rows of `right` summed over, and closes its group.
template <class Right, int kK, int kN>
__device__ __forceinline__ void begin_matmul_nn(Accumulator<1, kN>& acc, const Operand<1, kK>& left,
                                                Descriptor right) {
  static_assert(Right::kRows == 16 * kK && Right::kCols == 8 * kN);
  auto& d = reinterpret_cast<float(&)[4 * kN]>(acc.at);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < kK; ++k)
    ptx::Wgmma<typename Right::Element, 8 * kN>::template rs<1>(
        d, left.at[0][k], (right + Right::along_rows(k)).bits, 1);
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

// Rounds to the tile's elements; rows [row, row + 16) of this warp, columns from 0 on.
template <class Tile, int kN>
__device__ __forceinline__ void store_matrices(Tile& tile, int row, const Accumulator<1, kN>& acc) {
  using Element = typename Tile::Element;
  const auto a = to_operand<Element>(acc);
#pragma unroll
  for (int k = 0; k < kN / 2; ++k)
    ptx::stmatrix(ptx::shared_address(tile.chunk(row + lane() % 16, 2 * k + lane() / 16)),
                  a.at[0][k]);
}

}  // namespace heed::tile
