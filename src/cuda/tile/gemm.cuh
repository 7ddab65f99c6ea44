// Products of one warp: left operand in shared memory or registers, right operand in shared memory.
#pragma once

#include "cuda/ptx/mma.cuh"
#include "cuda/tile/fragment.cuh"

namespace heed::tile {

// This lane's address for ldmatrix at (row, chunk), and from it those at compile-time distances.
// Where rows fill whole 128-byte lines the swizzle is an exclusive or within a line, so a distance
// costs at most one instruction and distances that differ by lines or rows share it. `kAligned`: no
// carry can leave the line's three chunk bits when a distance is added to `chunk`.
template <class Tile, bool kAligned>
struct LaneAddress {
  static constexpr bool kFolds = kAligned && Tile::kCols % 64 == 0;
  const Tile& tile;
  int row, chunk;
  std::uint32_t base;

  __device__ __forceinline__ LaneAddress(const Tile& t, int lane_row, int lane_chunk)
      : tile(t), row(lane_row), chunk(lane_chunk), base(t.address(lane_row, lane_chunk)) {}
  // `rows` is a multiple of 8, `chunks` of 2.
  __device__ __forceinline__ std::uint32_t at(int rows, int chunks) const {
    if constexpr (kFolds)
      return (base ^ static_cast<std::uint32_t>((chunks & 7) << 4)) +
             static_cast<std::uint32_t>((chunks >> 3) * 128 + rows * Tile::kCols * 2);
    return tile.address(row + rows, chunk + chunks);
  }
};

// Left operands [row .. row + 16) x 16 columns, from a tile stored [m][k].
template <class Tile>
__device__ __forceinline__ LaneAddress<Tile, true> left_of(const Tile& tile, int row) {
  return {tile, row + lane() % 16, lane() / 16};
}

// The same from a tile stored [k][m], for ldmatrix_trans; `col` is the first m.
template <class Tile>
__device__ __forceinline__ LaneAddress<Tile, true> left_transposed_of(const Tile& tile, int col) {
  return {tile, lane() % 8 + lane() / 16 * 8, col / 8 + lane() / 8 % 2};
}

// Two right operands, columns n of [row, row + 8) and [row + 8, row + 16), from a tile stored
// [n][k].
template <class Tile>
__device__ __forceinline__ LaneAddress<Tile, true> right_of(const Tile& tile, int row) {
  return {tile, row + lane() % 8 + lane() / 16 * 8, lane() / 8 % 2};
}

// The same from a tile stored [k][n], for ldmatrix_trans. `col`, the first n, is a multiple of
// kWidth.
template <int kWidth, class Tile>
__device__ __forceinline__ auto right_transposed_of(const Tile& tile, int col, int row = 0) {
  return LaneAddress < Tile,
         kWidth % 64 == 0 || 64 % kWidth == 0 > (tile, row + lane() % 16, col / 8 + lane() / 16);
}

template <class Element, int kM, int kN>
__device__ __forceinline__ void multiply(Accumulator<kM, kN>& acc, int pair,
                                         const std::uint32_t (&a)[kM][4],
                                         const std::uint32_t (&b)[4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    ptx::mma<Element>(acc.at[m][2 * pair], a[m], b[0], b[1]);
    ptx::mma<Element>(acc.at[m][2 * pair + 1], a[m], b[2], b[3]);
  }
}

// acc += left[row .. row + 16 kM) right[right_row .. right_row + 8 kN)^T over the columns of both:
// acc[i][j] = left_i . right_j.
template <int kM, int kN, class Left, class Right>
__device__ __forceinline__ void matmul_nt(Accumulator<kM, kN>& acc, const Left& left, int row,
                                          const Right& right, int right_row = 0) {
  static_assert(Left::kCols == Right::kCols && kN % 2 == 0);
  const auto from_left = left_of(left, row);
  const auto from_right = right_of(right, right_row);
#pragma unroll
  for (int k = 0; k < Left::kCols / 16; ++k) {
    std::uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::ldmatrix(a[m], from_left.at(16 * m, 2 * k));
#pragma unroll
    for (int pair = 0; pair < kN / 2; ++pair) {
      std::uint32_t b[4];
      ptx::ldmatrix(b, from_right.at(16 * pair, 2 * k));
      multiply<typename Left::Element>(acc, pair, a, b);
    }
  }
}

// acc += left right[row .. row + 16 kK): the rows of `right` are summed over. `row` is a multiple
// of 8.
template <class Element, int kM, int kK, int kN, class Right>
__device__ __forceinline__ void matmul_nn(Accumulator<kM, kN>& acc, const Operand<kM, kK>& left,
                                          const Right& right, int row = 0) {
  static_assert(Right::kCols == 8 * kN && kN % 2 == 0);
  const auto from_right = right_transposed_of<8 * kN>(right, 0, row);
#pragma unroll
  for (int k = 0; k < kK; ++k) {
    std::uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = left.at[m][k][i];
#pragma unroll
    for (int pair = 0; pair < kN / 2; ++pair) {
      std::uint32_t b[4];
      ptx::ldmatrix_trans(b, from_right.at(16 * k, 2 * pair));
      multiply<Element>(acc, pair, a, b);
    }
  }
}

// acc += left[row .. row + 16 kM) right[:, col .. col + 8 kN), with `left` in shared memory.
template <int kM, int kN, class Left, class Right>
__device__ __forceinline__ void matmul_nn(Accumulator<kM, kN>& acc, const Left& left, int row,
                                          const Right& right, int col) {
  static_assert(Left::kCols == Right::kRows && kN % 2 == 0);
  const auto from_left = left_of(left, row);
  const auto from_right = right_transposed_of<8 * kN>(right, col);
#pragma unroll
  for (int k = 0; k < Left::kCols / 16; ++k) {
    std::uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::ldmatrix(a[m], from_left.at(16 * m, 2 * k));
#pragma unroll
    for (int pair = 0; pair < kN / 2; ++pair) {
      std::uint32_t b[4];
      ptx::ldmatrix_trans(b, from_right.at(16 * k, 2 * pair));
      multiply<typename Left::Element>(acc, pair, a, b);
    }
  }
}

// acc += left[:, row .. row + 16 kM)^T right[:, col .. col + 8 kN): the rows of both are summed
// over.
template <int kM, int kN, class Left, class Right>
__device__ __forceinline__ void matmul_tn(Accumulator<kM, kN>& acc, const Left& left, int row,
                                          const Right& right, int col) {
  static_assert(Left::kRows == Right::kRows && kN % 2 == 0);
  const auto from_left = left_transposed_of(left, row);
  const auto from_right = right_transposed_of<8 * kN>(right, col);
#pragma unroll
  for (int k = 0; k < Left::kRows / 16; ++k) {
    std::uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::ldmatrix_trans(a[m], from_left.at(16 * k, 2 * m));
#pragma unroll
    for (int pair = 0; pair < kN / 2; ++pair) {
      std::uint32_t b[4];
      ptx::ldmatrix_trans(b, from_right.at(16 * k, 2 * pair));
      multiply<typename Left::Element>(acc, pair, a, b);
    }
  }
}

// As store, whole matrices at a time where the GPU has stmatrix. `col` is a multiple of 8 kN.
template <int kM, int kN, class Tile>
__device__ __forceinline__ void store_matrices(Tile& target, int row,
                                               const Accumulator<kM, kN>& acc, int col) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kN >= 4) {  // two columns of matrices are stored faster word by word
    const LaneAddress<Tile, 8 * kN % 64 == 0 || 64 % (8 * kN) == 0> place(
        target, row + lane() % 16, col / 8 + lane() / 16);
    const auto a = to_operand<typename Tile::Element>(acc);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int k = 0; k < kN / 2; ++k) ptx::stmatrix(place.at(16 * m, 2 * k), a.at[m][k]);
    return;
  }
#endif
  store(target, row, acc, col);
}

}  // namespace heed::tile
