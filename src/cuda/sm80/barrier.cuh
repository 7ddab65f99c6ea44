// Barriers in shared memory: warps arrive and go on, and wait only where they need what the others
// did before they arrived.
#pragma once

#include <cstdint>

#include "cuda/ptx/memory.cuh"

namespace heed::sm80 {

struct Barrier {
  std::uint64_t state;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(ptx::shared_address(&state)),
                 "r"(arrivals)
                 : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile(
        "{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(ptx::shared_address(&state))
        : "memory");
  }
  // Arrives once all copies that this thread has begun are in shared memory.
  __device__ __forceinline__ void arrive_after_copies() {
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(ptx::shared_address(&state))
        : "memory");
  }
  // Waits for the end of a phase; `parity`: 0 for the first, 1 for the second, 0 for the third ...
  __device__ __forceinline__ void wait(int parity) const {
    std::uint32_t done = 0;
    while (done == 0)
#if __CUDA_ARCH__ >= 900
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(ptx::shared_address(&state)), "r"(parity)
          : "memory");
#else
      asm volatile(
          "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
          "}"
          : "=r"(done)
          : "r"(ptx::shared_address(&state)), "r"(parity)
          : "memory");
#endif
  }
};

}  // namespace heed::sm80
