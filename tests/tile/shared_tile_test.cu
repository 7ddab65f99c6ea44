// src/cuda/tile/shared_tile.cuh: where the chunks of a tile stand, and in which banks.
#include "cuda/tile/shared_tile.cuh"

#include <set>
#include <utility>

#include "tile/support.cuh"

namespace heed::test {
namespace {

class SharedTile : public GpuTest {};

// Bytes from the tile's first to every chunk, [kRows][kChunks].
template <class Tile>
struct Offsets {
  using Shared = Tile;
  int* by_address;
  int* by_pointer;

  __device__ void operator()(Tile& tile) const {
    for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kChunks; i += 32) {
      const int row = i / Tile::kChunks, chunk = i % Tile::kChunks;
      by_address[i] = static_cast<int>(tile.address(row, chunk) - ptx::shared_address(tile.data));
      by_pointer[i] = 2 * static_cast<int>(std::as_const(tile).chunk(row, chunk) - tile.data);
    }
  }
};

// Whether 16-byte chunks lie in different groups of four banks.
bool in_different_banks(const std::vector<int>& bytes) {
  std::set<int> groups;
  for (const int b : bytes) groups.insert(b / 16 % 8);
  return groups.size() == bytes.size();
}

template <int kRows, int kCols>
void check_tile() {
  using Tile = tile::SharedTile<bf16, kRows, kCols>;
  SCOPED_TRACE(std::to_string(kRows) + " rows of " + std::to_string(kCols));
  const DeviceArray<int> by_address(kRows * Tile::kChunks), by_pointer(kRows * Tile::kChunks);
  launch(Offsets<Tile>{by_address.data(), by_pointer.data()});

  Matrix expected(kRows, Tile::kChunks);
  for (int row = 0; row < kRows; ++row)
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
      expected(row, chunk) = 2 * Tile::place(row, chunk);
  const std::vector<int> bytes = by_address.values();
  expect_equal(expected, matrix_of(kRows, Tile::kChunks, bytes), "address()");
  expect_equal(expected, matrix_of(kRows, Tile::kChunks, by_pointer.values()), "chunk()");

  std::set<int> places;
  for (int row = 0; row < kRows; ++row)
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      const int place = bytes[static_cast<std::size_t>(row * Tile::kChunks + chunk)];
      EXPECT_EQ(place % 16, 0);
      EXPECT_EQ(place / (2 * kCols), row) << "a chunk stays in its row";
      EXPECT_TRUE(places.insert(place).second) << "two chunks at byte " << place;
    }
  EXPECT_EQ(places.size(), sizeof(Tile) / 16);

  // A phase of ldmatrix reads one chunk of eight rows.
  for (int row = 0; row < kRows; row += 8)
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
      std::vector<int> phase;
      for (int r = row; r < row + 8; ++r)
        phase.push_back(bytes[static_cast<std::size_t>(r * Tile::kChunks + chunk)]);
      EXPECT_TRUE(in_different_banks(phase)) << "rows from " << row << ", chunk " << chunk;
    }
  // Eight threads of a copy reach for neighbouring chunks, of one row or two.
  for (auto first = bytes.begin(); first != bytes.end(); first += 8)
    EXPECT_TRUE(in_different_banks({first, first + 8})) << "from chunk " << first - bytes.begin();
}

template <int kCols>
void check_columns() {
  check_tile<16, kCols>();
  check_tile<32, kCols>();
  check_tile<64, kCols>();
  check_tile<128, kCols>();
}

TEST_F(SharedTile, Of32Columns) { check_columns<32>(); }
TEST_F(SharedTile, Of64Columns) { check_columns<64>(); }
TEST_F(SharedTile, Of96Columns) { check_columns<96>(); }
TEST_F(SharedTile, Of128Columns) { check_columns<128>(); }
TEST_F(SharedTile, Of192Columns) { check_columns<192>(); }
TEST_F(SharedTile, Of256Columns) { check_columns<256>(); }

}  // namespace
}  // namespace heed::test
