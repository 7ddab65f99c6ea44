// Copies of boxes of a tensor by the copy engine (TMA) of sm_90.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"

namespace heed::ptx {

// Where a box begins: channel, row, head, and entry or page. What lies outside the tensor is zeros.
struct BoxStart {
  int channel, row, head, batch;
};

// The box of `map` at `start` to `target` (a multiple of 128 bytes); its bytes complete on `done`.
__device__ __forceinline__ void copy_box(void* target, const CUtensorMap& map, BoxStart start,
                                         Barrier& done) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(target)),
      "l"(&map), "r"(shared_address(&done)), "r"(start.channel), "r"(start.row), "r"(start.head),
      "r"(start.batch)
      : "memory");
}

// Brings the box into L2.
__device__ __forceinline__ void prefetch_box(const CUtensorMap& map, BoxStart start) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map),
      "r"(start.channel), "r"(start.row), "r"(start.head), "r"(start.batch)
      : "memory");
}

// The box in shared memory to `map` at `start`; rows and channels outside the tensor are left out.
// What threads wrote must be fenced (fence_async_proxy) before.
__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* source,
                                          BoxStart start) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(&map),
      "r"(shared_address(source)), "r"(start.channel), "r"(start.row), "r"(start.head),
      "r"(start.batch)
      : "memory");
}

// Adds `bytes` of floats in shared memory to those at `target`, both multiples of 16 bytes.
// What threads wrote must be fenced (fence_async_proxy) before.
__device__ __forceinline__ void add_bulk(float* target, const float* source, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
      "r"(shared_address(source)), "r"(bytes)
      : "memory");
}

// Closes this thread's group of stores; returns once all of its groups have read shared memory.
__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Returns once all of this thread's groups are done.
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

}  // namespace heed::ptx
