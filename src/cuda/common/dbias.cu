// The gradient of a bias: clearing it, and adding up its broadcast axes in one order.
#include "cuda/common/dbias.cuh"

#include "cuda/host/launch.hpp"

namespace heed::cuda {
namespace {

constexpr int kThreads = 256;

struct Place4 {
  std::int64_t at[4];
};

__device__ Place4 place_of(const TensorView& x, std::int64_t i) {
  Place4 p;
  for (int d = 3; d >= 0; --d) {
    p.at[d] = i % x.shape[d];
    i /= x.shape[d];
  }
  return p;
}

__device__ float& element(const TensorView& x, const Place4& p) {
  std::int64_t offset = 0;
  for (int d = 0; d < 4; ++d) offset += p.at[d] * x.stride[d];
  return static_cast<float*>(x.data)[offset];
}

__global__ void clear(const __grid_constant__ TensorView x) {
  const std::int64_t count = x.numel();
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads)
    element(x, place_of(x, i)) = 0.f;
}

// A thread adds all that belongs to an element, in the order of memory.
__global__ void sum(const __grid_constant__ TensorView full,
                    const __grid_constant__ TensorView target) {
  const std::int64_t count = target.numel();
  const auto extent = [&](int d) { return target.shape[d] == 1 ? full.shape[d] : 1; };
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kThreads) {
    const Place4 to = place_of(target, i);
    float total = 0.f;
    for (std::int64_t b = 0; b < extent(0); ++b)
      for (std::int64_t h = 0; h < extent(1); ++h)
        for (std::int64_t r = 0; r < extent(2); ++r)
          for (std::int64_t c = 0; c < extent(3); ++c)
            total += element(full, {to.at[0] + b, to.at[1] + h, to.at[2] + r, to.at[3] + c});
    element(target, to) = total;
  }
}

LaunchShape shape_for(const TensorView& x) {
  return {.blocks = clamp64((x.numel() + kThreads - 1) / kThreads, 0, 4096), .threads = kThreads};
}

}  // namespace

Status clear_dbias(const TensorView& x, cudaStream_t stream) {
  if (x.data == nullptr) return {};
  return launch<clear>(shape_for(x), stream, x);
}

Status sum_dbias(const TensorView& full, const TensorView& target, cudaStream_t stream) {
  return launch<sum>(shape_for(target), stream, full, target);
}

}  // namespace heed::cuda
