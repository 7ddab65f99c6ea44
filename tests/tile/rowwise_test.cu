// src/cuda/tile/rowwise.cuh: masks, and the running softmax of rows.
#include "cuda/tile/rowwise.cuh"

#include <limits>

#include "core/softmax_state.hpp"
#include "tile/support.cuh"

namespace heed::test {
namespace {

class TileRowwise : public GpuTest {};

constexpr int kM = 2, kN = 8, kRows = 16 * kM, kCols = 8 * kN;
using Scores = tile::Accumulator<kM, kN>;

struct ReduceQuad {
  using Shared = Nothing;
  const float* x;      // [32]
  float *sums, *most;  // [32]

  __device__ void operator()(Shared&) const {
    const int lane = tile::lane();
    sums[lane] = tile::reduce_quad(x[lane], [](float a, float b) { return a + b; });
    most[lane] = tile::reduce_quad(x[lane], [](float a, float b) { return fmaxf(a, b); });
  }
};

TEST_F(TileRowwise, ReduceQuadGivesAllFourLanesTheResult) {
  const Matrix x = small_integers(8, 4, 1);
  const DeviceArray<float> x_device(rounded<float>(x)), sums(32), most(32);
  launch(ReduceQuad{x_device.data(), sums.data(), most.data()});
  Matrix expected_sums(8, 4), expected_most(8, 4);
  for (int quad = 0; quad < 8; ++quad)
    for (int lane = 0; lane < 4; ++lane) {
      expected_sums(quad, lane) = x(quad, 0) + x(quad, 1) + x(quad, 2) + x(quad, 3);
      expected_most(quad, lane) = std::max({x(quad, 0), x(quad, 1), x(quad, 2), x(quad, 3)});
    }
  expect_equal(expected_sums, matrix_of(8, 4, sums.values()), "sum");
  expect_equal(expected_most, matrix_of(8, 4, most.values()), "max");
}

struct MaskRows {
  using Shared = Nothing;
  float* x;                 // [kRows][kCols]
  const RowLimits* limits;  // [kRows]
  int col0;

  __device__ void operator()(Shared&) const {
    Scores acc;
    fill(acc, x, kCols);
    tile::mask_rows(acc, limits, col0);
    unload(acc, x, kCols);
  }
};

TEST_F(TileRowwise, MaskRowsHidesKeysOutsideTheRowsLimits) {
  for (const int col0 : {0, 64, 1000}) {
    SCOPED_TRACE("col0 = " + std::to_string(col0));
    // All, none, one key at either end, and limits that lie outside of the tile.
    std::vector<RowLimits> limits{
        {col0, col0 + kCols}, {0, 0},    {col0, col0 + 1},        {col0 + kCols - 1, col0 + kCols},
        {0, 100'000},         {0, col0}, {col0 + kCols, 100'000}, {col0 + 20, col0 + 10}};
    Random random(1);
    while (limits.size() < kRows)
      limits.push_back({col0 + random.between(-10, kCols), col0 + random.between(0, kCols + 10)});
    const Matrix before = small_integers(kRows, kCols, 2);
    const DeviceArray<float> x(rounded<float>(before));
    const DeviceArray<RowLimits> limits_device(limits);
    launch(MaskRows{x.data(), limits_device.data(), col0});
    Matrix expected = before;
    for (int row = 0; row < kRows; ++row)
      for (int col = 0; col < kCols; ++col) {
        const RowLimits r = limits[static_cast<std::size_t>(row)];
        if (!(r.first <= col0 + col && col0 + col < r.end)) expected(row, col) = -kInfinity;
      }
    expect_equal(expected, matrix_of(kRows, kCols, x.values()), "scores");
  }
}

struct MaskColumns {
  using Shared = Nothing;
  float* x;  // [kRows][kCols]
  const std::uint32_t* words;
  int col0;

  __device__ void operator()(Shared&) const {
    Scores acc;
    fill(acc, x, kCols);
    tile::mask_columns(acc, words, col0);
    unload(acc, x, kCols);
  }
};

TEST_F(TileRowwise, MaskColumnsHidesKeysWhoseBitIsClear) {
  for (const int col0 : {0, 16, 48, 64}) {
    SCOPED_TRACE("col0 = " + std::to_string(col0));
    const std::vector<std::uint32_t> words{0x80000001u, 0xDEADBEEFu, 0x00000000u, 0xFFFF7FFEu};
    const Matrix before = small_integers(kRows, kCols, 2);
    const DeviceArray<float> x(rounded<float>(before));
    const DeviceArray<std::uint32_t> words_device(words);
    launch(MaskColumns{x.data(), words_device.data(), col0});
    Matrix expected = before;
    for (int row = 0; row < kRows; ++row)
      for (int col = 0; col < kCols; ++col) {
        const auto key = static_cast<std::size_t>(col0 + col);
        if ((words[key / 32] >> key % 32) % 2 == 0) expected(row, col) = -kInfinity;
      }
    expect_equal(expected, matrix_of(kRows, kCols, x.values()), "scores");
  }
}

// One warp runs through `tiles` tiles of scores. Weights of tile i are exp2(logit - max after i);
// `sums` are what O += P V would be with the identity for V: the sum of the tiles' weights, which
// update() keeps relative to the present max.
struct Update {
  using Shared = Nothing;
  int tiles;
  float scale;
  const float* scores;   // [tiles][kRows][kCols]
  float* weights;        // [tiles][kRows][kCols]
  float* maxima;         // [tiles][kRows], after each tile
  float* sums;           // [kRows][kCols]
  SoftmaxState* states;  // [32 lanes][2 kM]

  __device__ void operator()(Shared&) const {
    tile::RowSoftmax<kM> softmax;
    softmax.clear();
    Scores out;
    out.clear();
    for (int i = 0; i < tiles; ++i) {
      Scores acc;
      fill(acc, scores + i * kRows * kCols, kCols);
      softmax.update(acc, scale, out);
      unload(acc, weights + i * kRows * kCols, kCols);
      tile::for_each(out, acc, [](int, int, float& sum, float& weight) { sum += weight; });
      for (int slot = 0; slot < 2 * kM; ++slot)
        if (tile::lane() % 4 == 0) maxima[i * kRows + tile::slot_row(slot)] = softmax.max[slot];
    }
    unload(out, sums, kCols);
    for (int slot = 0; slot < 2 * kM; ++slot)
      states[2 * kM * tile::lane() + slot] = softmax.state(slot);
  }
};

struct Updated {
  std::vector<SoftmaxState> states;  // [kRows]
  Matrix weights, maxima, sums;      // [tiles * kRows][kCols], [tiles][kRows], [kRows][kCols]
};

Updated update(const Matrix& scores, float scale) {
  const int tiles = scores.rows / kRows;
  const DeviceArray<float> scores_device(rounded<float>(scores)), weights(scores.at.size()),
      maxima(static_cast<std::size_t>(tiles * kRows)), sums(kRows * kCols);
  const DeviceArray<SoftmaxState> states(32 * 2 * kM);
  launch(Update{tiles, scale, scores_device.data(), weights.data(), maxima.data(), sums.data(),
                states.data()});
  const std::vector<SoftmaxState> of_lanes = states.values();
  std::vector<SoftmaxState> of_rows(kRows);
  for (int row = 0; row < kRows; ++row)
    for (int t = 0; t < 4; ++t) {
      const int slot = row / 8;
      const SoftmaxState state =
          of_lanes[static_cast<std::size_t>((4 * (row % 8) + t) * 2 * kM + slot)];
      if (t == 0) of_rows[static_cast<std::size_t>(row)] = state;
      EXPECT_EQ(state.max, of_rows[static_cast<std::size_t>(row)].max) << "row " << row;
      EXPECT_EQ(state.sum, of_rows[static_cast<std::size_t>(row)].sum) << "row " << row;
    }
  return {of_rows, matrix_of(scores.rows, kCols, weights.values()),
          matrix_of(tiles, kRows, maxima.values()), matrix_of(kRows, kCols, sums.values())};
}

// log2 of a row's sum of 2^logit over the tiles [begin, end), in double; -inf for no key.
double log2_sum(const Matrix& scores, double scale, int row, int begin, int end) {
  double most = -INFINITY, sum = 0;
  const auto each = [&](const auto& body) {
    for (int i = begin; i < end; ++i)
      for (int col = 0; col < kCols; ++col) body(scale * scores(i * kRows + row, col));
  };
  each([&](double logit) { most = std::max(most, logit); });
  if (most == -INFINITY) return most;
  each([&](double logit) { sum += std::exp2(logit - most); });
  return most + std::log2(sum);
}

// Scores of 5 tiles that drift up or down by up to 12 in log2 per tile. Row 0 sees no key, row 1
// none in tiles 0 and 1, row 2 none from tile 2 on, row 3 one key in all, row 4 half of them.
Matrix drifting_scores() {
  constexpr int kTiles = 5;
  Matrix scores(kTiles * kRows, kCols);
  Random random(3);
  for (int row = 0; row < kRows; ++row) {
    const int drift = random.between(-48, 48);
    for (int i = 0; i < kTiles; ++i)
      for (int col = 0; col < kCols; ++col) {
        const bool hidden = row == 0 || (row == 1 && i < 2) || (row == 2 && i >= 2) ||
                            (row == 3 && (i != 3 || col != 17)) || (row == 4 && col % 2 == 0);
        scores(i * kRows + row, col) =
            hidden ? -INFINITY : random.between(-16, 16) + i * drift + row;
      }
  }
  return scores;
}

// Scores are integers and the scale is a power of two: logits are exact, and what is left are the
// roundings of exp2 (2^-22) and of sums of up to 80 positive numbers per lane (2^-24 each).
constexpr float kScale = 0.25f;
constexpr double kTolerance = 1e-5;

TEST_F(TileRowwise, UpdateKeepsTheSoftmaxOfTheTilesSoFar) {
  const Matrix scores = drifting_scores();
  const int tiles = scores.rows / kRows;
  const Updated actual = update(scores, kScale);
  Matrix expected_lse(kRows, 1), actual_lse(kRows, 1);  // natural logs
  Matrix expected_share(kRows, kCols), actual_share(kRows, kCols);
  for (int row = 0; row < kRows; ++row) {
    const SoftmaxState state = actual.states[static_cast<std::size_t>(row)];
    const double all = log2_sum(scores, kScale, row, 0, tiles);
    expected_lse(row, 0) = all * kLn2;
    actual_lse(row, 0) = natural_lse(state);
    if (all == -INFINITY) {
      EXPECT_EQ(state.max, -kInfinity);
      EXPECT_EQ(state.sum, 0.f);
    }
    for (int col = 0; col < kCols; ++col) {
      for (int i = 0; i < tiles && all != -INFINITY; ++i)
        expected_share(row, col) += std::exp2(kScale * scores(i * kRows + row, col) - all);
      actual_share(row, col) =
          all == -INFINITY ? actual.sums(row, col) : actual.sums(row, col) / state.sum;
    }
  }
  expect_equal(expected_lse, actual_lse, "lse", kTolerance);
  expect_equal(expected_share, actual_share, "weights, normalised", kTolerance);
}

TEST_F(TileRowwise, UpdateKeepsWeightsBelow2To8) {
  const Matrix scores = drifting_scores();
  const Updated actual = update(scores, kScale);
  for (int i = 0; i < scores.rows / kRows; ++i)
    for (int row = 0; row < kRows; ++row)
      for (int col = 0; col < kCols; ++col) {
        const double max = actual.maxima(i, row), logit = kScale * scores(i * kRows + row, col);
        const double expected = logit == -INFINITY ? 0 : std::exp2(logit - max);
        const double weight = actual.weights(i * kRows + row, col);
        EXPECT_LE(expected, 256) << "tile " << i << ", row " << row;
        EXPECT_NEAR(expected, weight, expected * 0x1p-22 + 0x1p-126)
            << "tile " << i << ", row " << row << ", column " << col;
      }
}

// Tile 0: zeros. Tile 1: `growth` at one column of row 5, `others` at that column of other rows.
Matrix growing_scores(double growth, double others) {
  Matrix scores(2 * kRows, kCols);
  for (int row = 0; row < kRows; ++row)
    scores(kRows + row, 9) = (row == 5 ? growth : others) / kScale;
  return scores;
}

void expect_states(const std::vector<SoftmaxState>& actual, const SoftmaxState& row5,
                   const SoftmaxState& others) {
  Matrix expected(kRows, 2), got(kRows, 2);
  for (int row = 0; row < kRows; ++row) {
    const SoftmaxState& want = row == 5 ? row5 : others;
    expected(row, 0) = want.max;
    expected(row, 1) = want.sum;
    got(row, 0) = actual[static_cast<std::size_t>(row)].max;
    got(row, 1) = actual[static_cast<std::size_t>(row)].sum;
  }
  expect_equal(expected, got, "max and sum of rows", 400 * kTolerance);
}

// 64 + 63 keys of weight 1 and one of 2^growth, relative to the max that was there before.
TEST_F(TileRowwise, UpdateLeavesTheMaxAloneUpToAGrowthOf8) {
  const Updated actual = update(growing_scores(8, 7.5), kScale);
  expect_states(actual.states, {0.f, 127.f + 256.f}, {0.f, 127.f + std::exp2(7.5f)});
}

// One row that grows by more makes its warp take every row's own maximum.
TEST_F(TileRowwise, UpdateRescalesTheWarpWhenOneRowGrowsByMore) {
  const Updated actual = update(growing_scores(8.25, 3), kScale);
  expect_states(actual.states, {8.25f, 1.f + 127.f * std::exp2(-8.25f)}, {3.f, 1.f + 127.f / 8});
}

TEST_F(TileRowwise, UpdateKeepsTheMaxWhenNothingGrows) {
  const Updated actual = update(growing_scores(-2, -1), kScale);
  expect_states(actual.states, {0.f, 127.25f}, {0.f, 127.5f});
}

// The law of core/softmax_state.hpp: the states of two parts of the keys merge into that of all.
TEST_F(TileRowwise, StatesOfPartsMerge) {
  const Matrix scores = drifting_scores();
  const int tiles = scores.rows / kRows, split = 2;
  const auto part = [&](int begin, int end) {
    Matrix m((end - begin) * kRows, kCols);
    std::copy_n(scores.at.begin() + begin * kRows * kCols, m.at.size(), m.at.begin());
    return update(m, kScale).states;
  };
  const std::vector<SoftmaxState> first = part(0, split), second = part(split, tiles);
  Matrix expected(kRows, 1), actual(kRows, 1);
  for (int row = 0; row < kRows; ++row) {
    const auto at = static_cast<std::size_t>(row);
    expected(row, 0) = log2_sum(scores, kScale, row, 0, tiles) * kLn2;
    actual(row, 0) = natural_lse(merge(first[at], second[at]));
  }
  expect_equal(expected, actual, "lse", kTolerance);
}

struct Finish {
  using Shared = Nothing;
  SoftmaxState keys;
  float sink;
  tile::RowResult* out;

  __device__ void operator()(Shared&) const { *out = tile::finish_row(keys, sink); }
};

TEST_F(TileRowwise, FinishRowNormalisesAndAddsTheSink) {
  const auto finish = [](SoftmaxState keys, float sink) {
    const DeviceArray<tile::RowResult> out(1);
    launch(Finish{keys, sink, out.data()});
    return out.values().front();
  };
  for (const float max : {-30.f, 0.f, 5.f})
    for (const float sum : {1.f, 3.f, 1e6f})
      for (const float sink : {-kInfinity, -40.f, 0.f, 9.f}) {
        const double scale = std::exp2(static_cast<double>(max)), keys = sum * scale;
        const double all = keys + std::exp2(static_cast<double>(sink));
        const tile::RowResult r = finish({max, sum}, sink);
        EXPECT_NEAR(r.factor / (scale / all), 1., 1e-6) << max << " " << sum << " " << sink;
        EXPECT_NEAR(r.lse, std::log(all), 1e-6 * (1 + std::abs(std::log(all))));
      }
  EXPECT_EQ(finish({}, -kInfinity).factor, 0.f);
  EXPECT_EQ(finish({}, -kInfinity).lse, -kInfinity);
  EXPECT_EQ(finish({}, 2.f).factor, 0.f);
  EXPECT_NEAR(finish({}, 2.f).lse, 2 * kLn2, 1e-6);
  EXPECT_TRUE(std::isnan(finish({0.f, NAN}, -kInfinity).factor));
}

}  // namespace
}  // namespace heed::test
