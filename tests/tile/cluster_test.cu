// src/cuda/ptx/cluster.cuh: blocks that read each other's shared memory.
#include "cuda/ptx/cluster.cuh"

#include "tile/support.cuh"

namespace heed::test {
namespace {

class PtxCluster : public GpuTest {};

// Every block leaves four floats a lane, waits for the others, and reads those of the block after it.
struct ReadNeighbour {
  using Shared = float[32][4];
  static constexpr int kBlocks = 4;
  float4* out;  // [blocks][32]

  __device__ void operator()(Shared& shared) const {
    const int lane = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
    for (int i = 0; i < 4; ++i) shared[lane][i] = static_cast<float>(1000 * block + 4 * lane + i);
    ptx::cluster_sync();
    out[32 * block + lane] = ptx::load_of_block(shared[lane], (block + 1) % kBlocks);
    ptx::cluster_sync();  // nobody's memory goes before it has been read
  }
};

TEST_F(PtxCluster, BlocksReadEachOther) {
  constexpr int kClusters = 3, kBlocks = ReadNeighbour::kBlocks;
  const DeviceArray<float> out(kClusters * kBlocks * 32 * 4);
  launch(ReadNeighbour{reinterpret_cast<float4*>(out.data())}, 32, kClusters * kBlocks, kBlocks);
  Matrix expected(kClusters * kBlocks * 32, 4);
  for (int row = 0; row < expected.rows; ++row) {
    const int block = row / 32, first = block / kBlocks * kBlocks;
    const int neighbour = first + (block + 1) % kBlocks;
    for (int i = 0; i < 4; ++i) expected(row, i) = 1000 * neighbour + 4 * (row % 32) + i;
  }
  expect_equal(expected, matrix_of(expected.rows, 4, out.values()), "four floats per lane");
}

}  // namespace
}  // namespace heed::test
