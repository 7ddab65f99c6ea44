// Runs a piece of device code on the GPU and shows what it left beside what it should have left.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/half.hpp"
#include "cuda/tile/fragment.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "heed/plan.hpp"
#include "support/random.hpp"

namespace heed::test {

class GpuTest : public testing::Test {
 protected:
  void SetUp() override {
    const Result<Device> device = Device::cuda();
    if (!device.ok()) GTEST_SKIP() << "needs a GPU: " << device.status().message();
  }
};

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Device memory of exactly `count` elements, so that compute-sanitizer sees both ends.
template <class T>
class DeviceArray {
 public:
  // Every byte is 0xFF, a NaN in every format: an element that nobody writes shows.
  explicit DeviceArray(std::size_t count) : count_(count) {
    check(cudaMalloc(&data_, std::max<std::size_t>(bytes(), 1)), "cudaMalloc");
    check(cudaMemset(data_, 0xFF, bytes()), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    check(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice), "upload");
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> values(count_);
    check(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost), "download");
    return values;
  }

 private:
  std::size_t bytes() const { return count_ * sizeof(T); }

  T* data_ = nullptr;
  std::size_t count_;
};

// What a body declares that needs no shared memory.
struct Nothing {};

// Shared memory is all 0xFF when the body starts.
template <class Body>
__global__ void run(const __grid_constant__ Body body) {
  extern __shared__ __align__(1024) unsigned char shared[];
  using Shared = typename Body::Shared;
  for (std::size_t i = threadIdx.x; i < sizeof(Shared); i += blockDim.x) shared[i] = 0xFF;
  __syncthreads();
  body(*reinterpret_cast<Shared*>(shared));
}

// Calls body(Body::Shared&) in every thread, and returns after all of them have.
template <class Body>
void launch(const Body& body, int threads = 32, int blocks = 1, int cluster = 1) {
  const std::size_t bytes = sizeof(typename Body::Shared);
  check(cudaFuncSetAttribute(run<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "shared memory");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, run<Body>, body), "launch");
  check(cudaDeviceSynchronize(), "kernel");
}

// Row-major. Everything that is compared becomes one: values, or bits.
struct Matrix {
  int rows, cols;
  std::vector<double> at;

  Matrix(int row_count, int col_count, double value = 0)
      : rows(row_count),
        cols(col_count),
        at(static_cast<std::size_t>(row_count) * static_cast<std::size_t>(col_count), value) {}
  double& operator()(int row, int col) { return at[static_cast<std::size_t>(row * cols + col)]; }
  double operator()(int row, int col) const {
    return at[static_cast<std::size_t>(row * cols + col)];
  }
};

// Exact in every format; products of two and sums of some thousand of these are exact in fp32.
inline Matrix small_integers(int rows, int cols, std::uint64_t seed) {
  Matrix m(rows, cols);
  Random random(seed);
  for (double& x : m.at) x = random.between(-4, 4);
  return m;
}

template <class T>
std::vector<T> rounded(const Matrix& m) {
  std::vector<T> values(m.at.size());
  std::transform(m.at.begin(), m.at.end(), values.begin(),
                 [](double x) { return from_float<T>(static_cast<float>(x)); });
  return values;
}

template <class T>
Matrix matrix_of(int rows, int cols, const std::vector<T>& values) {
  Matrix m(rows, cols);
  std::transform(values.begin(), values.end(), m.at.begin(),
                 [](T x) { return static_cast<double>(x); });
  return m;
}
template <class Element>
Matrix bits_of(int rows, int cols, const std::vector<Element>& values) {
  Matrix m(rows, cols);
  std::transform(values.begin(), values.end(), m.at.begin(),
                 [](Element x) { return static_cast<double>(x.bits); });
  return m;
}

// A NaN equals nothing; infinities equal themselves. The first few differences are listed.
inline void expect_equal(const Matrix& expected, const Matrix& actual, const std::string& what = "",
                         double tolerance = 0) {
  ASSERT_EQ(expected.rows, actual.rows) << what;
  ASSERT_EQ(expected.cols, actual.cols) << what;
  int count = 0;
  std::ostringstream list;
  list.precision(9);
  for (int row = 0; row < expected.rows; ++row)
    for (int col = 0; col < expected.cols; ++col) {
      const double want = expected(row, col), have = actual(row, col);
      if (want == have || std::abs(want - have) <= tolerance) continue;
      if (++count <= 8)
        list << "\n  row " << row << ", column " << col << ": expected " << want << ", actual "
             << have;
    }
  EXPECT_EQ(count, 0) << what << ": elements that differ" << list.str();
}

// ---- device ----

// A whole tile <-> row-major memory, by all threads of the block, element by element.
template <class Tile>
__device__ void fill(Tile& tile, const typename Tile::Element* from) {
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kCols;
       i += static_cast<int>(blockDim.x))
    tile.data[Tile::place(i / Tile::kCols, i % Tile::kCols / 8) + i % 8] = from[i];
}
template <class Tile>
__device__ void unload(const Tile& tile, typename Tile::Element* to) {
  for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * Tile::kCols;
       i += static_cast<int>(blockDim.x))
    to[i] = tile.data[Tile::place(i / Tile::kCols, i % Tile::kCols / 8) + i % 8];
}

// Calls body(row, col, x) for this lane's elements, by the layout of the PTX manual.
template <int kM, int kN, class Body>
__device__ void each(tile::Accumulator<kM, kN>& acc, const Body& body) {
  const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      body(16 * m + g, 8 * n + 2 * t, acc.at[m][n][0]);
      body(16 * m + g, 8 * n + 2 * t + 1, acc.at[m][n][1]);
      body(16 * m + g + 8, 8 * n + 2 * t, acc.at[m][n][2]);
      body(16 * m + g + 8, 8 * n + 2 * t + 1, acc.at[m][n][3]);
    }
}

// An accumulator <-> row-major memory with rows `stride` apart, by one warp.
template <int kM, int kN>
__device__ void fill(tile::Accumulator<kM, kN>& acc, const float* from, int stride) {
  each(acc, [&](int row, int col, float& x) { x = from[row * stride + col]; });
}
template <int kM, int kN>
__device__ void unload(tile::Accumulator<kM, kN>& acc, float* to, int stride) {
  each(acc, [&](int row, int col, float& x) { to[row * stride + col] = x; });
}

}  // namespace heed::test
