// src/cuda/tile/gemm.cuh: every product, at the shapes and offsets of the kernels' tiles.
#include "cuda/tile/gemm.cuh"

#include <cstddef>
#include <utility>

#include "cuda/sm80/tiles.hpp"
#include "tile/support.cuh"

namespace heed::test {
namespace {

class TileGemm : public GpuTest {};

// The warps of a block each own a part of the result, as in the kernels, and add to what is there.

// out[kLeftRows][kRightRows] += left right^T
template <class Element, int kLeftRows, int kRightRows, int kCols, int kM, int kN>
struct MatmulNt {
  static constexpr int kParts = kRightRows / (8 * kN);
  static constexpr int kWarps = kLeftRows / (16 * kM) * kParts;
  struct Shared {
    tile::SharedTile<Element, kLeftRows, kCols> left;
    tile::SharedTile<Element, kRightRows, kCols> right;
  };
  const Element *left, *right;
  float* out;

  __device__ void operator()(Shared& shared) const {
    fill(shared.left, left);
    fill(shared.right, right);
    __syncthreads();
    const int row = tile::warp() / kParts * 16 * kM, col = tile::warp() % kParts * 8 * kN;
    float* mine = out + row * kRightRows + col;
    tile::Accumulator<kM, kN> acc;
    fill(acc, mine, kRightRows);
    tile::matmul_nt(acc, shared.left, row, shared.right, col);
    unload(acc, mine, kRightRows);
  }
};

// out[part][kLeftRows][kCols] += left right over the rows [16 kK part, 16 kK (part + 1)) of
// `right`, with `left` in registers.
template <class Element, int kLeftRows, int kRightRows, int kCols, int kM, int kK>
struct MatmulNnOfRegisters {
  static constexpr int kParts = kRightRows / (16 * kK);
  static constexpr int kWarps = kLeftRows / (16 * kM) * kParts;
  using Shared = tile::SharedTile<Element, kRightRows, kCols>;
  const float* left;  // [kLeftRows][kRightRows]
  const Element* right;
  float* out;

  __device__ void operator()(Shared& shared) const {
    fill(shared, right);
    __syncthreads();
    const int row = tile::warp() / kParts * 16 * kM, part = tile::warp() % kParts;
    tile::Accumulator<kM, 2 * kK> from;
    fill(from, left + row * kRightRows + part * 16 * kK, kRightRows);
    float* mine = out + (part * kLeftRows + row) * kCols;
    tile::Accumulator<kM, kCols / 8> acc;
    fill(acc, mine, kCols);
    tile::matmul_nn<Element>(acc, tile::to_operand<Element>(from), shared, part * 16 * kK);
    unload(acc, mine, kCols);
  }
};

// out[kLeftRows][kCols] += left right
template <class Element, int kLeftRows, int kInner, int kCols, int kM, int kN>
struct MatmulNn {
  static constexpr int kParts = kCols / (8 * kN);
  static constexpr int kWarps = kLeftRows / (16 * kM) * kParts;
  struct Shared {
    tile::SharedTile<Element, kLeftRows, kInner> left;
    tile::SharedTile<Element, kInner, kCols> right;
  };
  const Element *left, *right;
  float* out;

  __device__ void operator()(Shared& shared) const {
    fill(shared.left, left);
    fill(shared.right, right);
    __syncthreads();
    const int row = tile::warp() / kParts * 16 * kM, col = tile::warp() % kParts * 8 * kN;
    float* mine = out + row * kCols + col;
    tile::Accumulator<kM, kN> acc;
    fill(acc, mine, kCols);
    tile::matmul_nn(acc, shared.left, row, shared.right, col);
    unload(acc, mine, kCols);
  }
};

// out[kLeftCols][kCols] += left^T right
template <class Element, int kInner, int kLeftCols, int kCols, int kN>
struct MatmulTn {
  static constexpr int kParts = kCols / (8 * kN);
  static constexpr int kWarps = kLeftCols / 16 * kParts;
  struct Shared {
    tile::SharedTile<Element, kInner, kLeftCols> left;
    tile::SharedTile<Element, kInner, kCols> right;
  };
  const Element *left, *right;
  float* out;

  __device__ void operator()(Shared& shared) const {
    fill(shared.left, left);
    fill(shared.right, right);
    __syncthreads();
    const int row = tile::warp() / kParts * 16, col = tile::warp() % kParts * 8 * kN;
    float* mine = out + row * kCols + col;
    tile::Accumulator<1, kN> acc;
    fill(acc, mine, kCols);
    tile::matmul_tn(acc, shared.left, row, shared.right, col);
    unload(acc, mine, kCols);
  }
};

Matrix transposed(const Matrix& m) {
  Matrix t(m.cols, m.rows);
  for (int row = 0; row < m.rows; ++row)
    for (int col = 0; col < m.cols; ++col) t(col, row) = m(row, col);
  return t;
}

// c + a b over the inner indices [begin, end).
Matrix plus_product(Matrix c, const Matrix& a, const Matrix& b, int begin, int end) {
  for (int row = 0; row < c.rows; ++row)
    for (int k = begin; k < end; ++k)
      for (int col = 0; col < c.cols; ++col) c(row, col) += a(row, k) * b(k, col);
  return c;
}

template <class Body, class Left, class Right>
Matrix run_body(const std::vector<Left>& left, const std::vector<Right>& right,
                const Matrix& before) {
  const DeviceArray<Left> left_device(left);
  const DeviceArray<Right> right_device(right);
  const DeviceArray<float> out(rounded<float>(before));
  launch(Body{left_device.data(), right_device.data(), out.data()}, 32 * Body::kWarps);
  return matrix_of(before.rows, before.cols, out.values());
}

// S = Q K^T and O += P V, of forward and decode.
template <class Element, sm80::ForwardTile kTile>
void check_forward() {
  constexpr int kDim = kTile.head_dim, kTileM = kTile.tile_m, kTileN = kTile.tile_n;
  constexpr int kM = kTileM / (kTile.warps / kTile.key_warps) / 16;
  constexpr int kKeys = kTileN / kTile.key_warps;
  SCOPED_TRACE("head_dim " + std::to_string(kDim));

  const Matrix q = small_integers(kTileM, kDim, 1), k = small_integers(kTileN, kDim, 2);
  const Matrix s = small_integers(kTileM, kTileN, 3);
  expect_equal(plus_product(s, q, transposed(k), 0, kDim),
               run_body<MatmulNt<Element, kTileM, kTileN, kDim, kM, kKeys / 8>>(
                   rounded<Element>(q), rounded<Element>(k), s),
               "matmul_nt: S += Q K^T");

  const Matrix p = small_integers(kTileM, kTileN, 4), v = small_integers(kTileN, kDim, 5);
  const Matrix o = small_integers(kTileM, kDim, 6);
  Matrix expected(0, kDim), before(0, kDim);
  const auto append = [](Matrix& all, const Matrix& rows) {
    all.at.insert(all.at.end(), rows.at.begin(), rows.at.end());
    all.rows += rows.rows;
  };
  for (int key = 0; key < kTileN; key += kKeys) {
    append(before, o);
    append(expected, plus_product(o, p, v, key, key + kKeys));
  }
  expect_equal(expected,
               run_body<MatmulNnOfRegisters<Element, kTileM, kTileN, kDim, kM, kKeys / 16>>(
                   rounded<float>(p), rounded<Element>(v), before),
               "matmul_nn of registers: O += P V");
}

// S^T = K Q^T, dV += P^T dO and dQ = dS K; P and dS stand in memory as keys x query rows.
template <class Element, sm80::BackwardTile kTile>
void check_backward() {
  constexpr int kDim = kTile.head_dim, kTileM = kTile.tile_m, kTileN = kTile.tile_n;
  constexpr int kM = kTile.keys / 16, kShare = kTile.share;
  constexpr int kWarps = kTileN / kTile.keys * kShare;
  constexpr int kQueryParts = kWarps / (kTileM / 16);
  SCOPED_TRACE("head_dim " + std::to_string(kDim));

  const Matrix k = small_integers(kTileN, kDim, 1), q = small_integers(kTileM, kDim, 2);
  const Matrix s = small_integers(kTileN, kTileM, 3);
  expect_equal(plus_product(s, k, transposed(q), 0, kDim),
               run_body<MatmulNt<Element, kTileN, kTileM, kDim, kM, kTileM / kShare / 8>>(
                   rounded<Element>(k), rounded<Element>(q), s),
               "matmul_nt: S^T += K Q^T");

  const Matrix p = small_integers(kTileN, kTileM, 4), dout = small_integers(kTileM, kDim, 5);
  const Matrix dv = small_integers(kTileN, kDim, 6);
  expect_equal(plus_product(dv, p, dout, 0, kTileM),
               run_body<MatmulNn<Element, kTileN, kTileM, kDim, kM, kDim / kShare / 8>>(
                   rounded<Element>(p), rounded<Element>(dout), dv),
               "matmul_nn: dV += P^T dO");

  const Matrix dq = small_integers(kTileM, kDim, 7);
  expect_equal(plus_product(dq, transposed(p), k, 0, kTileN),
               run_body<MatmulTn<Element, kTileN, kTileM, kDim, kDim / kQueryParts / 8>>(
                   rounded<Element>(p), rounded<Element>(k), dq),
               "matmul_tn: dQ += dS K");
}

// Every tile of one of the tables in tiles.hpp.
template <class Element, const auto& kTiles, std::size_t... kIndex>
void check_forward_tiles(std::index_sequence<kIndex...>) {
  (check_forward<Element, kTiles[kIndex]>(), ...);
}
template <class Element, const auto& kTiles, std::size_t... kIndex>
void check_backward_tiles(std::index_sequence<kIndex...>) {
  (check_backward<Element, kTiles[kIndex]>(), ...);
}
template <const auto& kTiles>
using Indices = std::make_index_sequence<kTiles.size()>;

using sm80::kBackwardTiles, sm80::kCompactBackwardTiles, sm80::kCompactDecodeTiles,
    sm80::kDecodeTiles, sm80::kForwardTiles, sm80::kWideDecodeTiles;

TEST_F(TileGemm, ForwardTiles) {
  check_forward_tiles<bf16, kForwardTiles>(Indices<kForwardTiles>{});
}
TEST_F(TileGemm, DecodeTiles) { check_forward_tiles<bf16, kDecodeTiles>(Indices<kDecodeTiles>{}); }
TEST_F(TileGemm, CompactDecodeTiles) {
  check_forward_tiles<bf16, kCompactDecodeTiles>(Indices<kCompactDecodeTiles>{});
}
TEST_F(TileGemm, WideDecodeTiles) {
  check_forward_tiles<bf16, kWideDecodeTiles>(Indices<kWideDecodeTiles>{});
}
TEST_F(TileGemm, BackwardTiles) {
  check_backward_tiles<bf16, kBackwardTiles>(Indices<kBackwardTiles>{});
}
TEST_F(TileGemm, CompactBackwardTiles) {
  check_backward_tiles<bf16, kCompactBackwardTiles>(Indices<kCompactBackwardTiles>{});
}
TEST_F(TileGemm, F16) {
  check_forward<f16, kForwardTiles[0]>();
  check_backward<f16, kBackwardTiles[0]>();
}

}  // namespace
}  // namespace heed::test
