// src/cuda/ptx/memory.cuh: asynchronous copies into shared memory, reductions into global memory.
#include "cuda/ptx/memory.cuh"

#include "tile/support.cuh"

namespace heed::test {
namespace {

class PtxMemory : public GpuTest {};

std::vector<std::uint32_t> counting(std::uint32_t count) {
  std::vector<std::uint32_t> values(count);
  for (std::uint32_t i = 0; i < count; ++i) values[i] = i + 1;
  return values;
}

// Lane l copies the 16 bytes at 4 l, but every third lane has none; it would fault if it read.
struct CopyValid {
  using Shared = uint4[32];
  const std::uint32_t* source;
  uint4* out;

  __device__ void operator()(Shared& shared) const {
    const int lane = static_cast<int>(threadIdx.x);
    const bool valid = lane % 3 != 0;
    ptx::cp_async(ptx::shared_address(&shared[lane]), valid ? source + 4 * lane : nullptr, valid);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    out[lane] = shared[lane];
  }
};

TEST_F(PtxMemory, CpAsyncCopiesOrClears) {
  const DeviceArray<std::uint32_t> source(counting(32 * 4)), out(32 * 4);
  launch(CopyValid{source.data(), reinterpret_cast<uint4*>(out.data())});
  Matrix expected(32, 4);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) expected(lane, i) = lane % 3 == 0 ? 0 : 4 * lane + i + 1;
  expect_equal(expected, matrix_of(32, 4, out.values()), "16 bytes per lane");
}

// Two groups of copies: out[0] is read when one may be under way, out[1] when none is.
struct CopyGroups {
  using Shared = uint4[2][32];
  const uint4* source;  // [2][32]
  uint4* out;           // [2][32]

  __device__ void operator()(Shared& shared) const {
    const int lane = static_cast<int>(threadIdx.x);
    for (int group = 0; group < 2; ++group) {
      ptx::cp_async(ptx::shared_address(&shared[group][lane]), source + 32 * group + lane);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<1>();
    out[lane] = shared[0][lane];
    ptx::cp_async_wait<0>();
    out[32 + lane] = shared[1][lane];
  }
};

TEST_F(PtxMemory, CpAsyncWaitLeavesOnlyTheLastGroupsPending) {
  const std::vector<std::uint32_t> expected = counting(2 * 32 * 4);
  const DeviceArray<std::uint32_t> source(expected), out(expected.size());
  launch(CopyGroups{reinterpret_cast<const uint4*>(source.data()),
                    reinterpret_cast<uint4*>(out.data())});
  expect_equal(matrix_of(64, 4, expected), matrix_of(64, 4, out.values()), "16 bytes per lane");
}

// Every block adds to the same 32 places, 8 floats apart; the 4 floats between them stay.
struct Add {
  using Shared = Nothing;
  float* target;  // [32][8]

  __device__ void operator()(Shared&) const {
    const auto block = static_cast<float>(blockIdx.x), lane = static_cast<float>(threadIdx.x);
    ptx::add_to_global<0>(target + 8 * threadIdx.x, {1.f, lane, -2.f * lane, block});
  }
};

TEST_F(PtxMemory, AddToGlobalAddsUpFromManyBlocks) {
  constexpr int kBlocks = 500;
  const Matrix before = small_integers(32, 8, 1);
  const DeviceArray<float> target(rounded<float>(before));
  launch(Add{target.data()}, 32, kBlocks);
  Matrix expected = before;
  for (int lane = 0; lane < 32; ++lane) {
    expected(lane, 0) += kBlocks;
    expected(lane, 1) += kBlocks * lane;
    expected(lane, 2) -= kBlocks * 2 * lane;
    expected(lane, 3) += kBlocks * (kBlocks - 1) / 2;
  }
  expect_equal(expected, matrix_of(32, 8, target.values()), "sums");
}

}  // namespace
}  // namespace heed::test
