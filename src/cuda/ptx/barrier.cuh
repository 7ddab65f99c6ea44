// Barriers: in shared memory (mbarrier), for copies and their readers, and by number, for groups of
// warps.
#pragma once

#include <cstdint>

#include "cuda/ptx/memory.cuh"

namespace heed::ptx {

// Completes a phase when `count` arrivals and all bytes that were announced are there. Phases are
// numbered 0, 1, 0, ...; waiting for phase 1 of a new barrier returns at once.
struct Barrier {
  std::uint64_t state;

  __device__ __forceinline__ void init(int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(count)
                 : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("{ .reg .b64 t; mbarrier.arrive.shared.b64 t, [%0]; }" ::"r"(shared_address(this))
                 : "memory");
  }
  // Arrives once all copies that this thread has begun (cp_async) are in shared memory.
  __device__ __forceinline__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(this))
                 : "memory");
  }
  // sm_90: one arrival, and `bytes` more that the copy engine will bring.
  __device__ __forceinline__ void arrive_and_expect(int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
  }
  __device__ __forceinline__ bool has_completed(int phase) const {
    std::uint32_t done;
#if __CUDA_ARCH__ >= 900  // waits for a while before it says no
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(this)), "r"(phase)
        : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(this)), "r"(phase)
        : "memory");
#endif
    return done != 0;
  }
  __device__ __forceinline__ void wait(int phase) const {
    while (!has_completed(phase)) {
    }
  }
};

// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and
// of wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for memory of any kind.
__device__ __forceinline__ void fence_all_async_proxy() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

// Barrier kId of the block, of kThreads threads together; an id in a register would reserve all 16.
template <int kId, int kThreads>
__device__ __forceinline__ void named_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}
template <int kId, int kThreads>
__device__ __forceinline__ void named_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// Moves registers between the warpgroups of a block; each executes one of the two.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace heed::ptx
