// The Hopper half of src/cuda/ptx and src/cuda/tile: copies by TMA, barriers, products of a
// warpgroup, and how its results leave the registers. Runs on sm_90 alone.
#include <cuda.h>

#include <string>

#include "cuda/host/tensor_map.hpp"
#include "cuda/sm90/tiles.hpp"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/warpgroup.cuh"
#include "tile/support.cuh"

namespace heed::test {
namespace {

class TileWarpgroup : public GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (!IsSkipped() && Device::cuda()->arch != Arch::sm90) GTEST_SKIP() << "needs sm_90";
  }
};

ConstTensorView view_of(const DeviceArray<bf16>& x, std::array<std::int64_t, 4> shape) {
  return contiguous(static_cast<const void*>(x.data()), DType::bf16, shape);
}
CUtensorMap map_of(const ConstTensorView& view, int rows) {
  CUtensorMap map{};
  const Status status = cuda::tensor_map(map, view, rows);
  EXPECT_TRUE(status.ok()) << status.message();
  return map;
}

// Every element has bits of its own.
std::vector<bf16> numbered(std::size_t count) {
  std::vector<bf16> x(count);
  for (std::size_t i = 0; i < count; ++i) x[i] = {static_cast<std::uint16_t>(1 + i % 65000)};
  return x;
}

// The tile, in boxes of kBox rows, from several places of one tensor.
template <class Tile, int kBox>
struct Load {
  struct alignas(1024) Shared {
    Tile tile;
    ptx::Barrier full;
  };
  CUtensorMap map;
  ptx::BoxStart start;
  bf16* out;

  __device__ void operator()(Shared& shared) const {
    if (threadIdx.x == 0) {
      shared.full.init(1);
      ptx::fence_barrier_init();
      shared.full.arrive_and_expect(Tile::kLoadBytes);
      for (int row = 0; row < Tile::kRows; row += kBox)
        shared.tile.load(row, map, {start.channel, start.row + row, start.head, start.batch},
                         shared.full);
    }
    __syncthreads();
    shared.full.wait(0);
    unload(shared.tile, out);
  }
};

template <int kRows, int kCols, int kBox>
void check_load(int channels, int row0) {
  SCOPED_TRACE(std::to_string(kRows) + " x " + std::to_string(kCols) + " in boxes of " +
               std::to_string(kBox) + ", " + std::to_string(channels) + " channels, from row " +
               std::to_string(row0));
  using Tile = tile::PanelTile<bf16, kRows, kCols>;
  constexpr int kBatch = 2, kSeqlen = 150, kHeads = 3;
  const std::vector<bf16> source =
      numbered(static_cast<std::size_t>(kBatch * kSeqlen * kHeads * channels));
  const DeviceArray<bf16> x(source), out(kRows * kCols);
  const ConstTensorView view = view_of(x, {kBatch, kSeqlen, kHeads, channels});
  launch(Load<Tile, kBox>{map_of(view, kBox), {0, row0, 1, 1}, out.data()}, 128);
  Matrix expected(kRows, kCols);
  for (int row = 0; row < kRows && row0 + row < kSeqlen; ++row)
    for (int c = 0; c < channels && row0 + row >= 0; ++c)
      expected(row, c) =
          source[static_cast<std::size_t>(((kSeqlen + row0 + row) * kHeads + 1) * channels + c)]
              .bits;
  expect_equal(expected, bits_of(kRows, kCols, out.values()), "tile");
}

TEST_F(TileWarpgroup, LoadBringsBoxesAndZerosBehindTheTensor) {
  for (const int row0 : {0, 17, 100, 149, 150}) {
    check_load<128, 64, 128>(64, row0);
    check_load<128, 128, 128>(128, row0);
    check_load<80, 256, 16>(256, row0);
    check_load<64, 96, 64>(96, row0);
  }
}
TEST_F(TileWarpgroup, LoadFillsChannelsWithZeros) {
  for (const int channels : {8, 40, 72, 120}) check_load<64, 128, 8>(channels, 90);
}

// ---- products ----

template <class Element, int kN, int kCols>
struct Scores {
  using Left = tile::PanelTile<Element, 128, kCols>;
  using Right = tile::PanelTile<Element, kN, kCols>;
  struct alignas(1024) Shared {
    Left left;
    Right right;
  };
  const Element *left, *right;
  float* out;  // [128][kN]

  __device__ void operator()(Shared& shared) const {
    fill(shared.left, left);
    fill(shared.right, right);
    ptx::fence_async_proxy();
    __syncthreads();
    const int group = tile::warpgroup();
    tile::Accumulator<1, kN / 8> acc;
    tile::begin_matmul_nt<Left, Right>(acc, shared.left.by_rows(64 * group),
                                       shared.right.by_rows());
    tile::wait_matmul<0>(acc);
    unload(acc, out + 16 * tile::warp() * kN, kN);
  }
};

// Over the last kK rows of `right`.
template <class Element, int kK, int kCols, int kRows = kK>
struct Sums {
  using Right = tile::PanelTile<Element, kRows, kCols>;
  using Shared = Right;
  const float* left;     // [64][kK]
  const Element* right;  // [kRows][kCols]
  float* out;            // [64][kCols]

  __device__ void operator()(Right& shared) const {
    fill(shared, right);
    ptx::fence_async_proxy();
    __syncthreads();
    tile::Accumulator<1, kK / 8> from;
    fill(from, left + 16 * tile::warp() * kK, kK);
    tile::Accumulator<1, kCols / 8> acc;
    fill(acc, out + 16 * tile::warp() * kCols, kCols);
    tile::begin_matmul_nn<Right>(acc, tile::to_operand<Element>(from),
                                 shared.by_columns() + Right::after_rows(kRows - kK));
    tile::wait_matmul<0>(acc);
    unload(acc, out + 16 * tile::warp() * kCols, kCols);
  }
};

// What the backward at head_dim 256 computes of 64 keys: of S^T the query rows of a warpgroup, and
// sums over query rows of its channels. Both operands in shared memory, P written there in parts.
template <class Element>
struct SharedSums {
  static constexpr int kRows = 64, kCols = 256, kPart = 32, kWidth = 128;
  using Keys = tile::PanelTile<Element, kRows, kCols>;
  using Weights = tile::PanelTile<Element, kRows, kRows>;
  struct alignas(1024) Shared {
    Keys k, q;
    Weights weights;
  };
  const Element *k, *q;
  float* scores;  // [64][64]: K Q^T
  float* out;     // [64][kCols]: += K Q^T Q

  __device__ void operator()(Shared& shared) const {
    fill(shared.k, k);
    fill(shared.q, q);
    ptx::fence_async_proxy();
    __syncthreads();
    const int group = tile::warpgroup(), row = 16 * (tile::warp() % 4);
    tile::Accumulator<1, kPart / 8> part;
    tile::begin_matmul_nt<Keys, Keys>(part, shared.k.by_rows(), shared.q.by_rows(kPart * group));
    tile::wait_matmul<0>(part);
    unload(part, scores + row * kRows + kPart * group, kRows);
    tile::store_matrices(shared.weights, row, tile::to_operand<Element>(part), kPart / 8 * group);
    ptx::fence_async_proxy();
    __syncthreads();
    tile::Accumulator<1, kWidth / 8> acc;
    fill(acc, out + row * kCols + kWidth * group, kCols);
    tile::begin_matmul_nn<Weights, Keys>(
        acc, shared.weights.by_rows(),
        tile::columns_from<Keys>(shared.q.by_columns(), kWidth * group));
    tile::wait_matmul<0>(acc);
    unload(acc, out + row * kCols + kWidth * group, kCols);
  }
};

// Columns [kFirst, kFirst + kWidth) of left^T right, of the last 64 columns of `left`; those from
// kCols on are anything.
template <class Element, int kLeftCols, int kCols, int kFirst, int kWidth>
struct TransposedSums {
  using Left = tile::PanelTile<Element, 128, kLeftCols>;
  using Right = tile::PanelTile<Element, 128, kCols>;
  struct alignas(1024) Shared {
    Left left;
    Right right;
  };
  const Element *left, *right;
  float* out;  // [64][kWidth]

  __device__ void operator()(Shared& shared) const {
    fill(shared.left, left);
    fill(shared.right, right);
    ptx::fence_async_proxy();
    __syncthreads();
    tile::Accumulator<1, kWidth / 8> acc;
    tile::begin_matmul_tn<Left, Right>(
        acc, tile::columns_from<Left>(shared.left.by_columns(), kLeftCols - 64),
        tile::columns_from<Right>(shared.right.by_columns(), kFirst));
    tile::wait_matmul<0>(acc);
    unload(acc, out + 16 * tile::warp() * kWidth, kWidth);
  }
};

Matrix product(Matrix c, const Matrix& a, const Matrix& b) {
  for (int row = 0; row < c.rows; ++row)
    for (int k = 0; k < a.cols; ++k)
      for (int col = 0; col < c.cols; ++col) c(row, col) += a(row, k) * b(k, col);
  return c;
}
Matrix transposed(const Matrix& m) {
  Matrix t(m.cols, m.rows);
  for (int row = 0; row < m.rows; ++row)
    for (int col = 0; col < m.cols; ++col) t(col, row) = m(row, col);
  return t;
}

// Both products of the forward, at its tile. What stood in the scores before is overwritten.
template <class Element, sm90::ForwardTile kTile>
void check_products() {
  constexpr int kDim = kTile.head_dim, kDimV = kTile.head_dim_v, kTileN = kTile.tile_n;
  SCOPED_TRACE("head_dim " + std::to_string(kDim));
  const Matrix q = small_integers(128, kDim, 1), k = small_integers(kTileN, kDim, 2);
  {
    const DeviceArray<Element> left(rounded<Element>(q)), right(rounded<Element>(k));
    const DeviceArray<float> out(128 * kTileN);
    launch(Scores<Element, kTileN, kDim>{left.data(), right.data(), out.data()}, 256);
    expect_equal(product(Matrix(128, kTileN), q, transposed(k)),
                 matrix_of(128, kTileN, out.values()), "S = Q K^T");
  }
  const Matrix p = small_integers(64, kTileN, 3), v = small_integers(kTileN, kDimV, 4);
  const Matrix o = small_integers(64, kDimV, 5);
  const DeviceArray<float> left(rounded<float>(p)), out(rounded<float>(o));
  const DeviceArray<Element> right(rounded<Element>(v));
  launch(Sums<Element, kTileN, kDimV>{left.data(), right.data(), out.data()}, 128);
  expect_equal(product(o, p, v), matrix_of(64, kDimV, out.values()), "O += P V");
}
template <class Element, std::size_t... kIndex>
void check_products(std::index_sequence<kIndex...>) {
  (check_products<Element, sm90::kForwardTiles[kIndex]>(), ...);
}

TEST_F(TileWarpgroup, ProductsOfTheForward) {
  constexpr auto kAll = std::make_index_sequence<sm90::kForwardTiles.size()>();
  check_products<bf16>(kAll);
  check_products<f16>(kAll);
}

template <class Element>
void check_shared() {
  using Case = SharedSums<Element>;
  // Sums of few products, which 16 bits hold.
  Matrix k = small_integers(64, 256, 10), q = small_integers(64, 256, 11);
  for (int row = 0; row < 64; ++row)
    for (int col = 0; col < 256; ++col)
      if ((row + col) % 32 != 0) k(row, col) = 0;
  const Matrix o = small_integers(64, 256, 12);
  const DeviceArray<Element> left(rounded<Element>(k)), right(rounded<Element>(q));
  const DeviceArray<float> scores(64 * 64), out(rounded<float>(o));
  launch(Case{left.data(), right.data(), scores.data(), out.data()}, 256);
  const Matrix s = product(Matrix(64, 64), k, transposed(q));
  expect_equal(s, matrix_of(64, 64, scores.values()), "S^T = K Q^T");
  expect_equal(product(o, s, q), matrix_of(64, 256, out.values()), "dV += P^T dO");
}

TEST_F(TileWarpgroup, ProductsThroughSharedMemory) {
  check_shared<bf16>();
  check_shared<f16>();
}

// dQ = dS K, a part of the channels.
template <class Element, int kLeftCols, int kCols, int kFirst, int kWidth>
void check_transposed() {
  constexpr int kWanted = kFirst + kWidth < kCols ? kWidth : kCols - kFirst;
  SCOPED_TRACE("channels " + std::to_string(kFirst) + " to " + std::to_string(kFirst + kWanted) +
               " of " + std::to_string(kCols));
  const Matrix ds = small_integers(128, kLeftCols, 8), k = small_integers(128, kCols, 9);
  const DeviceArray<Element> left(rounded<Element>(ds)), right(rounded<Element>(k));
  const DeviceArray<float> out(64 * kWidth);
  launch(TransposedSums<Element, kLeftCols, kCols, kFirst, kWidth>{left.data(), right.data(),
                                                                   out.data()},
         128);
  const Matrix whole = product(Matrix(kLeftCols, kCols), transposed(ds), k);
  const Matrix found = matrix_of(64, kWidth, out.values());
  Matrix expected(64, kWanted), wanted(64, kWanted);
  for (int row = 0; row < 64; ++row)
    for (int col = 0; col < kWanted; ++col) {
      expected(row, col) = whole(kLeftCols - 64 + row, kFirst + col);
      wanted(row, col) = found(row, col);
    }
  expect_equal(expected, wanted, "dQ = dS K");
}
template <class Element>
void check_transposed() {
  check_transposed<Element, 128, 64, 0, 64>();
  check_transposed<Element, 64, 64, 32, 32>();
  check_transposed<Element, 64, 96, 0, 64>();
  check_transposed<Element, 64, 96, 64, 64>();
  check_transposed<Element, 64, 128, 64, 64>();
}

TEST_F(TileWarpgroup, TransposedProductsOfTheBackward) {
  check_transposed<bf16>();
  check_transposed<f16>();
}

// dV += P^T dO, of the last 64 of 128 query rows.
template <class Element>
void check_half() {
  const Matrix p = small_integers(64, 64, 1), dout = small_integers(128, 64, 2);
  const Matrix dv = small_integers(64, 64, 3);
  const DeviceArray<float> left(rounded<float>(p)), out(rounded<float>(dv));
  const DeviceArray<Element> right(rounded<Element>(dout));
  launch(Sums<Element, 64, 64, 128>{left.data(), right.data(), out.data()}, 128);
  Matrix last(64, 64);
  for (int row = 0; row < 64; ++row)
    for (int col = 0; col < 64; ++col) last(row, col) = dout(64 + row, col);
  expect_equal(product(dv, p, last), matrix_of(64, 64, out.values()), "dV += P^T dO");
}

TEST_F(TileWarpgroup, ProductsOfHalfOfTheRows) {
  check_half<bf16>();
  check_half<f16>();
}

// ---- results ----

template <int kCols>
struct Store {
  using Tile = tile::PanelTile<bf16, 128, kCols>;
  struct alignas(1024) Shared {
    Tile tile;
  };
  CUtensorMap map;
  ptx::BoxStart start;
  const float* from;  // [128][kCols]

  __device__ void operator()(Shared& shared) const {
    const int group = tile::warpgroup(), row = 16 * tile::warp();
    tile::Accumulator<1, kCols / 8> acc;
    fill(acc, from + row * kCols, kCols);
    tile::store_matrices(shared.tile, row, acc);
    ptx::fence_async_proxy();
    __syncthreads();
    if (threadIdx.x % 128 > 0) return;
    shared.tile.store(64 * group, map,
                      {start.channel, start.row + 64 * group, start.head, start.batch});
    ptx::store_commit();
    ptx::wait_stores_read();
  }
};

template <int kCols>
void check_store(int channels, int row0) {
  SCOPED_TRACE(std::to_string(kCols) + " columns, " + std::to_string(channels) +
               " channels, to row " + std::to_string(row0));
  constexpr int kSeqlen = 150, kHeads = 2;
  const Matrix from = small_integers(128, kCols, 7);
  const DeviceArray<float> from_device(rounded<float>(from));
  const DeviceArray<bf16> out(static_cast<std::size_t>(kSeqlen * kHeads * channels));
  const ConstTensorView view = view_of(out, {1, kSeqlen, kHeads, channels});
  launch(Store<kCols>{map_of(view, 64), {0, row0, 1, 0}, from_device.data()}, 256);
  Matrix expected(kSeqlen, kHeads * channels, 0xFFFF);  // what nobody writes
  for (int row = 0; row < 128 && row0 + row < kSeqlen; ++row)
    for (int c = 0; c < channels; ++c)
      expected(row0 + row, channels + c) = from_float<bf16>(static_cast<float>(from(row, c))).bits;
  expect_equal(expected, bits_of(kSeqlen, kHeads * channels, out.values()), "tensor");
}

TEST_F(TileWarpgroup, StoreWritesWhatIsInsideTheTensor) {
  for (const int row0 : {0, 22, 100}) {
    check_store<64>(64, row0);
    check_store<96>(96, row0);
    check_store<128>(128, row0);
    check_store<128>(80, row0);
  }
}

// Adds what warps put into shared memory; another warp has the copy engine do it.
struct AddBulk {
  static constexpr int kWarps = 4, kFloats = 16 * 64;
  struct alignas(1024) Shared {
    float of[kWarps][kFloats];
    ptx::Barrier full;
  };
  float* out;  // [kWarps][kFloats]

  __device__ void operator()(Shared& shared) const {
    if (threadIdx.x == 0) {
      shared.full.init(kWarps);
      ptx::fence_barrier_init();
    }
    __syncthreads();
    const int warp = tile::warp() - 1, lane = tile::lane();
    if (warp >= 0) {
      for (int i = lane; i < kFloats; i += 32) shared.of[warp][i] = static_cast<float>(warp + i);
      __syncwarp();
      if (lane == 0) shared.full.arrive();
      return;
    }
    shared.full.wait(0);
    ptx::fence_async_proxy();
    if (lane < kWarps) {
      ptx::add_bulk(out + lane * kFloats, shared.of[lane],
                    kFloats * static_cast<int>(sizeof(float)));
      ptx::store_commit();
      ptx::wait_stores();
    }
  }
};

TEST_F(TileWarpgroup, CopyEngineAddsWhatWarpsPut) {
  constexpr int kWarps = AddBulk::kWarps, kFloats = AddBulk::kFloats;
  const Matrix from = small_integers(kWarps, kFloats, 5);
  const DeviceArray<float> out(rounded<float>(from));
  for (int times = 0; times < 3; ++times) launch(AddBulk{out.data()}, 32 * (kWarps + 1));
  Matrix expected = from;
  for (int row = 0; row < kWarps; ++row)
    for (int col = 0; col < kFloats; ++col) expected(row, col) += 3 * (row + col);
  expect_equal(expected, matrix_of(kWarps, kFloats, out.values()), "sums");
}

// ---- barriers ----

// A producer and a consumer pass numbers through a ring of two stages.
struct Ring {
  struct Shared {
    ptx::Barrier full[2], empty[2];
    int slot[2];
  };
  int* out;
  int count;

  __device__ void operator()(Shared& shared) const {
    if (threadIdx.x == 0) {
      for (int s = 0; s < 2; ++s) {
        shared.full[s].init(1);
        shared.empty[s].init(32);
      }
      ptx::fence_barrier_init();
    }
    __syncthreads();
    tile::PipelineState<2> at;
    for (int i = 0; i < count; ++i, at.advance()) {
      if (tile::warp() == 0) {
        shared.empty[at.stage].wait(at.phase ^ 1);
        if (tile::lane() == 0) {
          shared.slot[at.stage] = 3 * i;
          shared.full[at.stage].arrive();
        }
      } else {
        shared.full[at.stage].wait(at.phase);
        const int seen = shared.slot[at.stage];
        shared.empty[at.stage].arrive();
        if (tile::lane() == 31) out[i] = seen;
      }
    }
  }
};

TEST_F(TileWarpgroup, RingHandsOverInOrder) {
  constexpr int kCount = 1000;
  const DeviceArray<int> out(kCount);
  launch(Ring{out.data(), kCount}, 64);
  Matrix expected(1, kCount);
  for (int i = 0; i < kCount; ++i) expected(0, i) = 3 * i;
  expect_equal(expected, matrix_of(1, kCount, out.values()), "numbers");
}

}  // namespace
}  // namespace heed::test
