// Accumulators into a shared tile by stmatrix, where the GPU has it.
#pragma once

#include <cstdint>

#include "cuda/tile/gemm.cuh"

namespace heed::sm80 {

#if __CUDA_ARCH__ >= 900
// The inverse of ldmatrix: lane 4 g + t gives elements 2t, 2t + 1 of row g of every matrix.
__device__ __forceinline__ void stmatrix(std::uint32_t address, const std::uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
#endif

// As tile::store, whole matrices at a time where the GPU has stmatrix. `col` is a multiple of 8 kN.
template <int kM, int kN, class Tile>
__device__ __forceinline__ void store_matrices(Tile& target, int row,
                                               const tile::Accumulator<kM, kN>& acc, int col) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kN >= 4) {  // two columns of matrices are stored faster word by word
    const tile::LaneAddress<Tile, 8 * kN % 64 == 0 || 64 % (8 * kN) == 0> place(
        target, row + tile::lane() % 16, col / 8 + tile::lane() / 16);
    const auto a = tile::to_operand<typename Tile::Element>(acc);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int k = 0; k < kN / 2; ++k) stmatrix(place.at(16 * m, 2 * k), a.at[m][k]);
    return;
  }
#endif
  tile::store(target, row, acc, col);
}

}  // namespace heed::sm80
