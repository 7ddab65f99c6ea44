// src/cuda/tile/copy.cuh: rows of a global tensor into a shared tile and back.
#include "cuda/tile/copy.cuh"

#include "tile/support.cuh"

namespace heed::test {
namespace {

class TileCopy : public GpuTest {};

constexpr std::uint16_t kCanary = 0xFFFF;

// Rows of `channels` elements, `stride` apart; every element has bits of its own, those between the
// rows are canaries. Ends with the last row's last channel.
std::vector<bf16> tensor(int rows, int channels, int stride) {
  if (rows <= 0) return {};
  std::vector<bf16> x(static_cast<std::size_t>((rows - 1) * stride + channels), bf16{kCanary});
  for (int row = 0; row < rows; ++row)
    for (int c = 0; c < channels; ++c)
      x[static_cast<std::size_t>(row * stride + c)] = {
          static_cast<std::uint16_t>(1 + row * channels + c)};
  return x;
}

template <int kThreads, class Tile>
struct LoadBlock {
  using Shared = Tile;
  const bf16* first;
  std::int64_t stride;
  int count, channels;
  bf16* out;

  __device__ void operator()(Tile& tile) const {
    tile::load_block<kThreads>(tile, first, stride, count, channels);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    unload(tile, out);
  }
};

template <int kThreads, int kRows, int kCols>
void check_load_block(int count, int channels) {
  SCOPED_TRACE(std::to_string(kRows) + " x " + std::to_string(kCols) + " by " +
               std::to_string(kThreads) + " threads: " + std::to_string(count) + " rows of " +
               std::to_string(channels));
  using Tile = tile::SharedTile<bf16, kRows, kCols>;
  const int stride = channels + 24;
  const std::vector<bf16> source = tensor(std::min(count, kRows), channels, stride);
  const DeviceArray<bf16> source_device(source), out(kRows * kCols);
  launch(LoadBlock<kThreads, Tile>{source_device.data(), stride, count, channels, out.data()},
         kThreads);
  Matrix expected(kRows, kCols);
  for (int row = 0; row < std::min(count, kRows); ++row)
    for (int c = 0; c < channels; ++c)
      expected(row, c) = source[static_cast<std::size_t>(row * stride + c)].bits;
  expect_equal(expected, bits_of(kRows, kCols, out.values()), "tile");
}

template <int kThreads, int kRows, int kCols>
void check_load_block() {
  for (const int count : {kRows, kRows + 100, kRows - 1, 5, 0, -3})
    for (const int channels : {kCols, kCols - 8, 8})
      check_load_block<kThreads, kRows, kCols>(count, channels);
}

// Passes that are multiples of 8 rows apart, shorter passes, and chunks that do not divide the
// threads.
TEST_F(TileCopy, LoadBlockInPassesOfWholeSwizzles) {
  check_load_block<128, 64, 64>();
  check_load_block<128, 128, 128>();
}
TEST_F(TileCopy, LoadBlockInShortPasses) {
  check_load_block<128, 64, 256>();
  check_load_block<64, 32, 256>();
}
TEST_F(TileCopy, LoadBlockInBrokenPasses) {
  check_load_block<128, 64, 96>();
  check_load_block<256, 64, 192>();
  check_load_block<64, 32, 192>();
}

// Row r of the tile is row count - 1 - r of the source; every fourth row of the tile has none.
template <int kThreads, class Tile>
struct LoadRows {
  using Shared = Tile;
  const bf16* first;
  std::int64_t stride;
  int count, channels;
  bool wide;
  bf16* out;

  __device__ void operator()(Tile& tile) const {
    tile::load_rows<kThreads>(tile, wide, channels, [&](int r) -> const bf16* {
      return r % 4 == 2 || r >= count ? nullptr : first + (count - 1 - r) * stride;
    });
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    unload(tile, out);
  }
};

// `phase`: elements from a multiple of 16 bytes to the first row.
template <int kThreads, int kRows, int kCols>
void check_load_rows(bool wide, int count, int channels, int stride, int phase) {
  SCOPED_TRACE(std::to_string(kRows) + " x " + std::to_string(kCols) + ": " +
               std::to_string(count) + " rows of " + std::to_string(channels));
  using Tile = tile::SharedTile<bf16, kRows, kCols>;
  std::vector<bf16> source = tensor(count, channels, stride);
  source.insert(source.begin(), static_cast<std::size_t>(phase), bf16{kCanary});
  const DeviceArray<bf16> source_device(source), out(kRows * kCols);
  launch(LoadRows<kThreads, Tile>{source_device.data() + phase, stride, count, channels, wide,
                                  out.data()},
         kThreads);
  Matrix expected(kRows, kCols);
  for (int row = 0; row < count; ++row)
    for (int c = 0; c < channels && row % 4 != 2; ++c)
      expected(row, c) =
          source[static_cast<std::size_t>(phase + (count - 1 - row) * stride + c)].bits;
  expect_equal(expected, bits_of(kRows, kCols, out.values()), "tile");
}

TEST_F(TileCopy, LoadRowsWide) {
  check_load_rows<128, 64, 64>(true, 64, 64, 72, 0);
  check_load_rows<128, 16, 96>(true, 13, 80, 80, 0);
  check_load_rows<256, 32, 256>(true, 32, 8, 264, 8);
  check_load_rows<64, 32, 192>(true, 0, 192, 192, 0);
}

TEST_F(TileCopy, LoadRowsElementByElement) {
  check_load_rows<128, 64, 64>(false, 64, 64, 65, 1);
  check_load_rows<128, 16, 96>(false, 13, 93, 93, 3);
  check_load_rows<256, 32, 256>(false, 32, 1, 3, 0);
  check_load_rows<64, 32, 192>(false, 30, 191, 200, 7);
}

// Warp w stores the rows [begin, end) of its quarter of the tile; every fifth row has no target.
template <class Tile>
struct StoreRows {
  using Shared = Tile;
  const bf16* from;
  bf16* first;
  std::int64_t stride;
  int begin, end, channels;
  bool wide;

  __device__ void operator()(Tile& tile) const {
    fill(tile, from);
    __syncthreads();
    const int row0 = tile::warp() * (Tile::kRows / 4);
    tile::store_rows(tile, row0 + begin, row0 + end, wide, channels,
                     [&](int r) -> bf16* { return r % 5 == 3 ? nullptr : first + r * stride; });
  }
};

template <int kRows, int kCols>
void check_store_rows(bool wide, int begin, int end, int channels, int stride, int phase) {
  SCOPED_TRACE(std::to_string(kRows) + " x " + std::to_string(kCols) + ": rows " +
               std::to_string(begin) + " to " + std::to_string(end) + " of " +
               std::to_string(channels));
  using Tile = tile::SharedTile<bf16, kRows, kCols>;
  const std::vector<bf16> source = tensor(kRows, kCols, kCols);
  const int count = phase + kRows * stride;
  const DeviceArray<bf16> source_device(source);
  const DeviceArray<bf16> target(std::vector<bf16>(static_cast<std::size_t>(count), bf16{kCanary}));
  launch(StoreRows<Tile>{source_device.data(), target.data() + phase, stride, begin, end, channels,
                         wide},
         128);
  Matrix expected(1, count, kCanary);
  for (int row = 0; row < kRows; ++row) {
    const int in_quarter = row % (kRows / 4);
    if (in_quarter < begin || in_quarter >= end || row % 5 == 3) continue;
    for (int c = 0; c < channels; ++c)
      expected(0, phase + row * stride + c) =
          source[static_cast<std::size_t>(row * kCols + c)].bits;
  }
  expect_equal(expected, bits_of(1, count, target.values()), "target");
}

TEST_F(TileCopy, StoreRowsWide) {
  check_store_rows<64, 64>(true, 0, 16, 64, 64, 0);
  check_store_rows<64, 96>(true, 3, 11, 88, 104, 8);
  check_store_rows<128, 256>(true, 31, 32, 8, 264, 0);
  check_store_rows<128, 192>(true, 7, 7, 192, 192, 0);
}

TEST_F(TileCopy, StoreRowsElementByElement) {
  check_store_rows<64, 64>(false, 0, 16, 64, 65, 1);
  check_store_rows<64, 96>(false, 3, 11, 93, 97, 5);
  check_store_rows<128, 256>(false, 0, 32, 1, 2, 0);
  check_store_rows<128, 192>(false, 8, 25, 191, 193, 7);
}

}  // namespace
}  // namespace heed::test
