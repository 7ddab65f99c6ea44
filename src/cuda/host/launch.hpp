// The only place where a kernel starts.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <string>

#include "heed/plan.hpp"
#include "heed/status.hpp"

namespace heed::cuda {

inline Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return {Code::device, std::string("CUDA: ") + what + ": " + cudaGetErrorString(error)};
}

struct LaunchShape {
  std::int64_t blocks;
  int threads;
  int smem_bytes = 0;
  // The kernel begins while the one before ends, and waits for it by ptx::wait_for_kernel_before().
  bool overlap = false;
  int cluster = 1;  // blocks that run together (ptx/cluster.cuh)
};

// More shared memory than a kernel gets unasked must be allowed once per kernel and device.
template <auto kKernel>
Status allow_shared_memory(int bytes) {
  constexpr int kUnasked = 48 * 1024;
  static std::atomic<std::uint64_t> allowed{0};  // a bit per device
  if (bytes <= kUnasked) return {};
  int device = 0;
  if (Status s = cuda_status(cudaGetDevice(&device), "device"); !s.ok()) return s;
  const std::uint64_t bit = std::uint64_t{1} << (device & 63);
  if (device < 64 && (allowed.load(std::memory_order_relaxed) & bit) != 0) return {};
  if (Status s =
          cuda_status(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                      "shared memory");
      !s.ok())
    return s;
  allowed.fetch_or(bit, std::memory_order_relaxed);
  return {};
}

// Whether the kernel's code is for sm_90 or later: it waits for the kernel before, and its blocks
// know clusters. What the driver compiles from the PTX of compute_80 does not, whatever the GPU.
template <auto kKernel>
bool is_sm90_code() {
  static std::atomic<std::uint64_t> asked{0}, is{0};  // a bit per device
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) return false;
  const std::uint64_t bit = std::uint64_t{1} << device;
  if ((asked.load(std::memory_order_acquire) & bit) == 0) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)) == cudaSuccess &&
        attributes.ptxVersion >= 90)
      is.fetch_or(bit, std::memory_order_relaxed);
    asked.fetch_or(bit, std::memory_order_release);
  }
  return (is.load(std::memory_order_relaxed) & bit) != 0;
}

// No blocks is no error: there is nothing to do.
template <auto kKernel, class... Params>
Status launch(const LaunchShape& shape, cudaStream_t stream, const Params&... params) {
  if (shape.blocks == 0) return {};
  if (shape.blocks > std::numeric_limits<std::int32_t>::max())
    return {Code::unsupported, "the problem needs " + std::to_string(shape.blocks) +
                                   " blocks, a GPU starts at most 2147483647 at once: split its "
                                   "batch"};
  if (Status s = allow_shared_memory<kKernel>(shape.smem_bytes); !s.ok()) return s;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.smem_bytes);
  config.stream = stream;
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (shape.overlap && is_sm90_code<kKernel>()) {
    cudaLaunchAttribute& overlap = attributes[config.numAttrs++];
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  return cuda_status(cudaLaunchKernelEx(&config, kKernel, params...), "launch");
}

}  // namespace heed::cuda
