// src/cuda/tile/fragment.cuh: what a warp's lanes hold, and how it leaves them.
#include "cuda/tile/fragment.cuh"

#include "cuda/tile/gemm.cuh"

#include "tile/support.cuh"

namespace heed::test {
namespace {

class TileFragment : public GpuTest {};

constexpr int kM = 2, kN = 4, kRows = 16 * kM, kCols = 8 * kN;
using Fragment = tile::Accumulator<kM, kN>;

// Puts x where slot_row and pair_col say that it stands.
__device__ void put(float* out, int slot, int col, float x) {
  out[tile::slot_row(slot) * kCols + col] = x;
}

struct ForEach {
  using Shared = Nothing;
  const float *a, *b;                // [kRows][kCols]
  float *singles, *pairs, *doubles;  // [kRows][kCols]: a, a, a - 10 b

  __device__ void operator()(Shared&) const {
    Fragment x, y;
    fill(x, a, kCols);
    fill(y, b, kCols);
    tile::for_each(x, [&](int slot, int col, float& v) { put(singles, slot, col, v); });
    tile::for_each_pair(x, [&](int slot, int col, float v, float w) {
      put(pairs, slot, col, v);
      put(pairs, slot, col + 1, w);
    });
    tile::for_each(
        x, y, [&](int slot, int col, float& v, float& w) { put(doubles, slot, col, v - 10 * w); });
  }
};

TEST_F(TileFragment, ForEachSaysWhereElementsStand) {
  const Matrix a = small_integers(kRows, kCols, 1), b = small_integers(kRows, kCols, 2);
  const DeviceArray<float> a_device(rounded<float>(a)), b_device(rounded<float>(b));
  const DeviceArray<float> singles(kRows * kCols), pairs(kRows * kCols), doubles(kRows * kCols);
  launch(ForEach{a_device.data(), b_device.data(), singles.data(), pairs.data(), doubles.data()});
  Matrix a_less_10_b = a;
  for (std::size_t i = 0; i < b.at.size(); ++i) a_less_10_b.at[i] -= 10 * b.at[i];
  expect_equal(a, matrix_of(kRows, kCols, singles.values()), "for_each");
  expect_equal(a, matrix_of(kRows, kCols, pairs.values()), "for_each_pair");
  expect_equal(a_less_10_b, matrix_of(kRows, kCols, doubles.values()), "for_each of two");
}

struct Lanes {
  using Shared = Nothing;
  int *rows, *cols;  // [32 lanes][4 slots], [32 lanes][kN]

  __device__ void operator()(Shared&) const {
    for (int slot = 0; slot < 2 * kM; ++slot)
      rows[2 * kM * tile::lane() + slot] = tile::slot_row(slot);
    for (int n = 0; n < kN; ++n) cols[kN * tile::lane() + n] = tile::pair_col(n);
  }
};

TEST_F(TileFragment, SlotsAndPairsOfLanes) {
  const DeviceArray<int> rows(32 * 2 * kM), cols(32 * kN);
  launch(Lanes{rows.data(), cols.data()});
  Matrix expected_rows(32, 2 * kM), expected_cols(32, kN);
  for (int g = 0; g < 8; ++g)
    for (int t = 0; t < 4; ++t) {
      for (int m = 0; m < kM; ++m)
        for (int h = 0; h < 2; ++h) expected_rows(4 * g + t, 2 * m + h) = 16 * m + g + 8 * h;
      for (int n = 0; n < kN; ++n) expected_cols(4 * g + t, n) = 8 * n + 2 * t;
    }
  expect_equal(expected_rows, matrix_of(32, 2 * kM, rows.values()), "slot_row");
  expect_equal(expected_cols, matrix_of(32, kN, cols.values()), "pair_col");
}

struct Scale {
  using Shared = Nothing;
  const float *a, *factor;      // [kRows][kCols], [kRows]
  float *cleared, *all, *each;  // [kRows][kCols]: 0, 3 a, factor a

  __device__ void operator()(Shared&) const {
    Fragment x;
    x.clear();
    unload(x, cleared, kCols);
    fill(x, a, kCols);
    tile::scale(x, 3.f);
    unload(x, all, kCols);
    fill(x, a, kCols);
    float factors[2 * kM];
    for (int slot = 0; slot < 2 * kM; ++slot) factors[slot] = factor[tile::slot_row(slot)];
    tile::scale_rows(x, factors);
    unload(x, each, kCols);
  }
};

TEST_F(TileFragment, ClearAndScale) {
  const Matrix a = small_integers(kRows, kCols, 1), factor = small_integers(kRows, 1, 2);
  const DeviceArray<float> a_device(rounded<float>(a)), factor_device(rounded<float>(factor));
  const DeviceArray<float> cleared(kRows * kCols), all(kRows * kCols), each(kRows * kCols);
  launch(Scale{a_device.data(), factor_device.data(), cleared.data(), all.data(), each.data()});
  Matrix a_times_3 = a, a_times_factor = a;
  for (int row = 0; row < kRows; ++row)
    for (int col = 0; col < kCols; ++col) {
      a_times_3(row, col) *= 3;
      a_times_factor(row, col) *= factor(row, 0);
    }
  expect_equal(Matrix(kRows, kCols), matrix_of(kRows, kCols, cleared.values()), "clear");
  expect_equal(a_times_3, matrix_of(kRows, kCols, all.values()), "scale");
  expect_equal(a_times_factor, matrix_of(kRows, kCols, each.values()), "scale_rows");
}

// Numbers that rounding changes.
Matrix fractions(int rows, int cols, std::uint64_t seed) {
  Matrix m(rows, cols);
  Random random(seed);
  for (double& x : m.at) x = static_cast<float>(random.normal());
  return m;
}

template <class Element>
struct ToOperand {
  using Shared = Nothing;
  const float* a;        // [kRows][kCols]
  std::uint32_t* words;  // [32 lanes][kM][kCols / 16][4]

  __device__ void operator()(Shared&) const {
    Fragment x;
    fill(x, a, kCols);
    const auto operand = tile::to_operand<Element>(x);
    static_assert(sizeof(operand.at) == kM * (kCols / 16) * 4 * sizeof(std::uint32_t));
    int i = static_cast<int>(threadIdx.x) * kM * (kCols / 16) * 4;
    for (const auto& m : operand.at)
      for (const auto& k : m)
        for (const std::uint32_t word : k) words[i++] = word;
  }
};

template <class Element>
void check_to_operand() {
  const Matrix a = fractions(kRows, kCols, 1);
  const DeviceArray<float> a_device(rounded<float>(a));
  const DeviceArray<std::uint32_t> words(32 * kM * (kCols / 16) * 4);
  launch(ToOperand<Element>{a_device.data(), words.data()});
  const auto bits = [&](int row, int col) {
    return from_float<Element>(static_cast<float>(a(row, col))).bits;
  };
  // A row per lane; rows g, g + 8, g, g + 8 at k = 2 t, 2 t, 2 t + 8, 2 t + 8, as mma takes them.
  Matrix expected(32, kM * (kCols / 16) * 4);
  for (int g = 0; g < 8; ++g)
    for (int t = 0; t < 4; ++t)
      for (int m = 0; m < kM; ++m)
        for (int k = 0; k < kCols / 16; ++k)
          for (int i = 0; i < 4; ++i) {
            const int row = 16 * m + g + (i % 2 == 1 ? 8 : 0);
            const int col = 16 * k + 2 * t + (i >= 2 ? 8 : 0);
            expected(4 * g + t, (m * (kCols / 16) + k) * 4 + i) =
                bits(row, col) + 65536. * bits(row, col + 1);
          }
  expect_equal(expected, matrix_of(32, expected.cols, words.values()), "words per lane");
}

TEST_F(TileFragment, ToOperandBf16) { check_to_operand<bf16>(); }
TEST_F(TileFragment, ToOperandF16) { check_to_operand<f16>(); }

template <class Tile>
struct Store {
  using Shared = Tile;
  const float* a;  // [kRows][kCols]
  int row, col;
  bool matrices;
  typename Tile::Element* out;

  __device__ void operator()(Tile& tile) const {
    Fragment x;
    fill(x, a, kCols);
    if (matrices)
      tile::store_matrices(tile, row, x, col);
    else
      tile::store(tile, row, x, col);
    __syncthreads();
    unload(tile, out);
  }
};

template <class Element, int kTileCols>
void check_store(int row0, int col0, bool matrices) {
  SCOPED_TRACE(std::to_string(kTileCols) + " columns, to row " + std::to_string(row0) +
               ", column " + std::to_string(col0));
  constexpr int kTileRows = 64;
  const Matrix a = fractions(kRows, kCols, 1);
  const DeviceArray<float> a_device(rounded<float>(a));
  const DeviceArray<Element> out(kTileRows * kTileCols);
  launch(Store<tile::SharedTile<Element, kTileRows, kTileCols>>{a_device.data(), row0, col0,
                                                                matrices, out.data()});
  Matrix expected(kTileRows, kTileCols, 0xFFFF);  // as shared memory was before
  for (int row = 0; row < kRows; ++row)
    for (int col = 0; col < kCols; ++col)
      expected(row0 + row, col0 + col) = from_float<Element>(static_cast<float>(a(row, col))).bits;
  expect_equal(expected, bits_of(kTileRows, kTileCols, out.values()), "tile");
}

TEST_F(TileFragment, StoreRoundsIntoItsPartOfATile) {
  check_store<bf16, 32>(0, 0, false);
  check_store<bf16, 64>(32, 32, false);
  check_store<f16, 96>(16, 64, false);
  check_store<f16, 256>(32, 216, false);
}

TEST_F(TileFragment, StoreMatricesRoundsIntoItsPartOfATile) {
  check_store<bf16, 32>(0, 0, true);
  check_store<bf16, 64>(32, 32, true);
  check_store<f16, 96>(16, 64, true);
  check_store<f16, 256>(32, 192, true);
}

enum class Step { store, add, load };

// One step on memory in the order of the registers, each warp at its own part of it.
struct InOrder {
  using Shared = Nothing;
  Step step;
  float* matrix;  // [warps][kRows][kCols]
  float* memory;  // [warps][kRows * kCols]

  __device__ void operator()(Shared&) const {
    const int part = tile::warp() * kRows * kCols;
    Fragment x;
    fill(x, matrix + part, kCols);
    if (step == Step::store) tile::store_in_order(memory + part, x);
    if (step == Step::add) tile::add_to_global(memory + part, x);
    if (step == Step::load) tile::add_in_order(x, memory + part);
    unload(x, matrix + part, kCols);
  }
};

TEST_F(TileFragment, StoreAddAndLoadInTheOrderOfTheRegisters) {
  constexpr int kWarps = 2, kAllRows = kWarps * kRows;
  const Matrix a = small_integers(kAllRows, kCols, 1), b = small_integers(kAllRows, kCols, 2),
               c = small_integers(kAllRows, kCols, 3);
  const DeviceArray<float> a_device(rounded<float>(a)), b_device(rounded<float>(b)),
      c_device(rounded<float>(c)), memory(kAllRows * kCols);

  launch(InOrder{Step::store, a_device.data(), memory.data()}, 32 * kWarps);
  // Fragments one after another, in each the four of lane 0, of lane 1, ...
  Matrix in_order(kWarps * kM * kN, 32 * 4);
  for (int w = 0; w < kWarps; ++w)
    for (int m = 0; m < kM; ++m)
      for (int n = 0; n < kN; ++n)
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i)
            in_order((w * kM + m) * kN + n, 4 * lane + i) =
                a(w * kRows + 16 * m + lane / 4 + 8 * (i / 2), 8 * n + 2 * (lane % 4) + i % 2);
  expect_equal(in_order, matrix_of(in_order.rows, in_order.cols, memory.values()),
               "store_in_order");

  launch(InOrder{Step::add, b_device.data(), memory.data()}, 32 * kWarps);
  launch(InOrder{Step::load, c_device.data(), memory.data()}, 32 * kWarps);
  Matrix sum = c;
  for (std::size_t i = 0; i < sum.at.size(); ++i) sum.at[i] += a.at[i] + b.at[i];
  expect_equal(sum, matrix_of(kAllRows, kCols, c_device.values()),
               "store_in_order, add_to_global, add_in_order");
}

// A warp's rows to memory, every other one.
template <class Element, int kColumns>
struct StoreGlobal {
  using Shared = Nothing;
  const float* from;  // [kRows][kColumns]
  Element* out;       // [kRows][stride]
  int stride, channels;
  bool wide;

  __device__ void operator()(Shared&) const {
    tile::Accumulator<kM, kColumns / 8> x;
    fill(x, from, kColumns);
    tile::store_global<Element>(x, wide, channels, [&](int slot) {
      const int row = slot / 2 * 16 + slot % 2 * 8 + tile::lane() / 4;
      return row % 2 == 0 ? out + row * stride : nullptr;
    });
  }
};

template <class Element, int kColumns>
void check_store_global(int channels, bool wide) {
  SCOPED_TRACE(std::to_string(kColumns) + " columns, " + std::to_string(channels) + " channels");
  const int stride = wide ? kColumns + 8 : kColumns + 3;
  const Matrix from = small_integers(kRows, kColumns, 3);
  const DeviceArray<float> from_device(rounded<float>(from));
  const DeviceArray<Element> out(static_cast<std::size_t>(kRows * stride));
  launch(StoreGlobal<Element, kColumns>{from_device.data(), out.data(), stride, channels, wide});
  Matrix expected(kRows, stride, 0xFFFF);  // what nobody writes
  for (int row = 0; row < kRows; row += 2)
    for (int c = 0; c < channels; ++c)
      expected(row, c) = from_float<Element>(static_cast<float>(from(row, c))).bits;
  expect_equal(expected, bits_of(kRows, stride, out.values()), "rows");
}

TEST_F(TileFragment, StoreGlobalWritesTheRowsThatHaveAnAddress) {
  check_store_global<bf16, 64>(64, true);
  check_store_global<f16, 96>(96, true);
  check_store_global<bf16, 128>(72, true);
  for (const int channels : {1, 7, 61, 64}) check_store_global<f16, 64>(channels, false);
}

}  // namespace
}  // namespace heed::test
