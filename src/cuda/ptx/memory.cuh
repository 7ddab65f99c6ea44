// Asynchronous copies into shared memory and reductions into global memory.
#pragma once

#include <cstdint>

namespace heed::ptx {

__device__ __forceinline__ std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to `target`, through L2 only: zeros unless `valid`, and then `source` is not read.
// Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async(std::uint32_t target, const void* source, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async(std::uint32_t target, const void* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(target), "l"(source)
               : "memory");
}

// kBytes, 4 or 8, which both addresses are multiples of.
template <int kBytes>
__device__ __forceinline__ void cp_async_word(std::uint32_t target, const void* source,
                                              bool valid) {
  const int bytes = valid ? kBytes : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(target), "l"(source),
               "r"(bytes), "n"(kBytes)
               : "memory");
}

// Closes this thread's group of copies.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Returns once at most kPending of this thread's groups are still under way. What other threads
// copied is visible after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// target[kOffset + (0..3)] += x, each component atomic; target + kOffset is a multiple of 16 bytes.
template <int kOffset>
__device__ __forceinline__ void add_to_global(float* target, float4 x) {
#if __CUDA_ARCH__ >= 900  // vector reductions begin with sm_90
  asm volatile("red.global.add.v4.f32 [%0 + %5], {%1, %2, %3, %4};" ::"l"(target), "f"(x.x),
               "f"(x.y), "f"(x.z), "f"(x.w), "n"(4 * kOffset)
               : "memory");
#else
  atomicAdd(target + kOffset, x.x);
  atomicAdd(target + kOffset + 1, x.y);
  atomicAdd(target + kOffset + 2, x.z);
  atomicAdd(target + kOffset + 3, x.w);
#endif
}

// Lets a kernel that was launched to overlap this one start before this one has ended, once every
// block has said so. Nothing before sm_90.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before has ended and its results can be read.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace heed::ptx
