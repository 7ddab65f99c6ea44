// Clusters (sm_90 and later): blocks that run at the same time and read each other's shared memory.
// Code for GPUs before has these calls, and no launch that reaches them.
#pragma once

#include <cstdint>

#include "cuda/ptx/memory.cuh"

namespace heed::ptx {

// For all threads of the cluster that have not ended; what they wrote before is seen after.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Four floats of block `rank` of the cluster, which stand there where `here` stands in this block.
__device__ __forceinline__ float4 load_of_block(const float* here, int rank) {
  float4 x{};
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %4, %5;"
      " ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there]; }"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(shared_address(here)), "r"(rank)
      : "memory");
#endif
  return x;
}

}  // namespace heed::ptx
