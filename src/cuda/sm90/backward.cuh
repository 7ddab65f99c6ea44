// Backward attention on Hopper: dq, dk, dv of softmax(scale q k^T) v.
//
// One CTA per multiprocessor computes one item after another: a tile of keys of one key head, whose
// query rows it walks by tiles, for every query head of the group: dk and dv have one writer. Its
// first warpgroup brings what the others need, in two warps: the scheduler finds items and brings
// their keys, the loader brings Q, dO and what is known of their rows, from item to item without a
// pause. Two warpgroups consume (backward_by_keys.cuh, backward_by_channels.cuh). dQ is added up in
// fp32 in global memory, in the order of the registers: where shared memory has room, two more
// warps have the copy engine do it. tests/python/test_hopper_pipeline.py says who waits for whom.
#pragma once

#include <array>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>

#include "core/layout.hpp"
#include "cuda/common/backward_launch.cuh"
#include "cuda/common/backward_steps.cuh"
#include "cuda/host/launch.hpp"
#include "cuda/host/row.hpp"
#include "cuda/host/tensor_map.hpp"
#include "cuda/sm90/backward_by_channels.cuh"
#include "cuda/sm90/backward_by_keys.cuh"
#include "cuda/sm90/tiles.hpp"
#include "cuda/tile/pipeline.cuh"
#include "registry.hpp"

namespace heed::sm90 {

// ---- scheduler ----

template <class C>
__device__ __forceinline__ void schedule(const BackwardParams& p, typename C::Smem& smem) {
  const ForwardProblem& f = p.base.problem.forward;
  const int lane = tile::lane();
  // Where items wait for smaller ones, a CTA must not have one before it runs.
  const int dealt = p.base.turns == nullptr ? static_cast<int>(gridDim.x) : 0;
  const auto take_item = [&] {
    int taken = 0;
    if (lane == 0) taken = atomicAdd(p.base.counter, 1);
    return dealt + __shfl_sync(~0u, taken, 0);
  };
  int number = static_cast<int>(blockIdx.x);
  if (dealt == 0) {
    ptx::wait_for_kernel_before();
    number = take_item();
  }
  tile::PipelineState<C::kItems> at;
  int key_phase = 0;
#pragma unroll 1
  for (bool first = true;; first = false, number = take_item()) {
    smem.item_empty[at.stage].wait(at.phase ^ 1);
    BackwardItem& item = smem.items[at.stage];
    if (lane == 0) {
      item.last = number >= p.items;
      if (!item.last) item.work = cuda::work_at<C>(p.base, number);
    }
    __syncwarp();
    const BackwardWork& work = item.work;
    const bool there = !item.last && work.key0 < work.at.k.length;
    const auto bring_keys = [&] {
      smem.keys_empty.wait(key_phase ^ 1);
      key_phase ^= 1;
      if (lane == 0) {
        smem.keys_full.arrive_and_expect(2 * C::KeyTile::kLoadBytes);
        smem.k.load(0, p.k, first_key(work), smem.keys_full);
        smem.v.load(0, p.v, first_key(work), smem.keys_full);
      }
      __syncwarp();
    };
    if (first) {
      if (there) bring_keys();
      ptx::wait_for_kernel_before();  // only inputs of the problem were read until here
      if (lane == 0) smem.ds_scale = cuda::ds_scale_of<C>(p.base);
      __syncwarp();
    }
    if (there) {
      const int key_end = min_of(work.key0 + C::tile.tile_n, work.at.k.length);
      const bool holes =
          f.intervals.bits != nullptr &&
          __any_sync(~0u, cuda::any_missing(f, work.at, work.key0, key_end, lane, 32));
      const cuda::StepRange range =
          cuda::find_steps<C>(p.base, work, lane, 32, [](int& first_tile, int& last_tile) {
            first_tile = __reduce_min_sync(~0u, first_tile);
            last_tile = __reduce_max_sync(~0u, last_tile);
          });
      if (lane == 0) {
        item.holes = holes;
        item.work.range = range;
      }
      __syncwarp();
    }
    if (there || item.last) {
      if (lane == 0) smem.item_full[at.stage].arrive();
      __syncwarp();
      if (item.last) return;
      if (!first) bring_keys();
      // Who takes items no sooner than it needs them leaves more of them to others.
      smem.item_soon[at.stage].wait(at.phase);
      at.advance();
    }
  }
}

// ---- loader ----

template <class C>
__device__ __forceinline__ void load(const BackwardParams& p, typename C::Smem& smem) {
  const int group = p.base.group, lane = tile::lane();
  tile::PipelineState<C::kItems> item;
  tile::PipelineState<C::tile.stages> at;
#pragma unroll 1
  for (;; item.advance()) {
    smem.item_full[item.stage].wait(item.phase);
    if (smem.items[item.stage].last) return;
    const BackwardWork& work = smem.items[item.stage].work;
    bool told = false;
    const auto tell = [&] {
      if (!told && lane == 0) smem.item_soon[item.stage].arrive();
      __syncwarp();
      told = true;
    };
    Step step = cuda::settle<C>(group, work, {0, work.range.first_tile, false});
#pragma unroll 1
    for (; step.head < group; at.advance()) {
      if (step.head == group - 1 && step.m_tile + C::kSoon > work.range.last_tile) tell();
      const int head = work.head_k * group + step.head, row0 = step.m_tile * C::tile.tile_m;
      const ptx::BoxStart start{0, static_cast<int>(work.at.q.token) + row0, head,
                                static_cast<int>(work.at.q.batch)};
      const cuda::BackwardRow* rows =
          p.base.rows + lse_index(p.base.problem.forward, work.at, head, row0);
      // dO first: consumers were done with that of its stage sooner.
      if (lane == 0) {
        smem.dout_empty[at.stage].wait(at.phase ^ 1);
        smem.dout_full[at.stage].arrive_and_expect(C::QueryTile::kLoadBytes);
        smem.dout[at.stage].load(0, p.dout, start, smem.dout_full[at.stage]);
      }
      __syncwarp();
      smem.q_empty[at.stage].wait(at.phase ^ 1);
      // Then Q, since consumers may wait for it already; its bytes are announced behind.
      ptx::Barrier& q_full = smem.q_full[at.stage];
      if (lane == 0) smem.q[at.stage].load(0, p.q, start, q_full);
      __syncwarp();
      typename C::Rows& target = smem.rows[at.stage];
#pragma unroll
      for (int row = lane; row < C::tile.tile_m; row += 32) {
        const bool there = row0 + row < work.at.q.length;
        const cuda::BackwardRow* from = rows + (there ? row : 0);
        ptx::cp_async_word<4>(ptx::shared_address(&target.lse_log2[row]), &from->lse_log2, there);
        ptx::cp_async_word<4>(ptx::shared_address(&target.delta[row]), &from->delta, there);
        ptx::cp_async_word<8>(ptx::shared_address(&target.limits[row]), &from->limits, there);
      }
      q_full.arrive_after_copies();
      const Step next = cuda::settle<C>(group, work, {step.head, step.m_tile + 1, false});
      if (lane == 0) {
        smem.visits[at.stage] = {static_cast<int>(cuda::sums_index(p.base, work, step)),
                                 p.base.turns == nullptr ? 0 : cuda::turn_of<C>(work, step),
                                 work.at.q.length - row0,
                                 step.inside && !smem.items[item.stage].holes, next.head == group};
        q_full.arrive_and_expect(C::QueryTile::kLoadBytes);
      }
      __syncwarp();
      step = next;
    }
    tell();
    __syncwarp();
    if (lane == 0) smem.item_empty[item.stage].arrive();
  }
}

// ---- sums ----

// Has the copy engine add a consumer's dQ to dq, step by step.
template <class C>
__device__ __forceinline__ void add_sums(const BackwardParams& p, typename C::Smem& smem,
                                         int consumer) {
  const int lane = tile::lane();
  const int channels = consumer == C::kConsumers - 1 ? C::kLastChannels : C::kQueryChannels;
  const bool ordered = p.base.turns != nullptr;
#pragma unroll 1
  for (int phase = 0;; phase ^= 1) {
    smem.sums_full[consumer].wait(phase);
    // Of what consumers wrote: the barrier stands between, and the copy engine alone reads it.
    ptx::fence_async_proxy();
    const auto [sums, turn] = smem.leaving[consumer];
    if (sums < 0) break;
    if (ordered) {
      if (lane == 0)
        cuda::wait_for_turn(p.base.turns + std::int64_t{sums} * C::kWriters + consumer, turn);
      __syncwarp();
      ptx::fence_all_async_proxy();
    }
    if (lane < 4) {
      ptx::add_bulk(p.base.dq + std::int64_t{sums} * C::kQueryFloats +
                        BackwardConsumer<C>::warp_sums(consumer, lane),
                    smem.sums.of[consumer][lane], 16 * channels * static_cast<int>(sizeof(float)));
      ptx::store_commit();
      if (ordered)
        ptx::wait_stores();
      else
        ptx::wait_stores_read();
    }
    if (ordered) ptx::fence_all_async_proxy();
    __syncwarp();
    if (lane == 0) {
      if (ordered) cuda::pass_turn(p.base.turns + std::int64_t{sums} * C::kWriters + consumer);
      smem.sums_empty[consumer].arrive();
    }
    __syncwarp();
  }
  if (lane < 4) ptx::wait_stores();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    backward(const __grid_constant__ BackwardParams p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(shared);
  ptx::launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kItems; ++i) {
      smem.item_full[i].init(1);
      smem.item_soon[i].init(1);
      smem.item_empty[i].init(C::kWarps + 1);  // of consumers, and the loader
    }
    for (int c = 0; c < C::kConsumers; ++c) {
      smem.sums_full[c].init(4);
      smem.sums_empty[c].init(1);
    }
    smem.keys_full.init(1);
    smem.keys_empty.init(1);
    for (int s = 0; s < C::tile.stages; ++s) {
      smem.q_full[s].init(32 + 1);  // lanes of the loader, and its announcement of bytes
      smem.dout_full[s].init(1);
      smem.q_empty[s].init(C::kWarps);
      smem.dout_empty[s].init(C::kWarps);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  const int warpgroup = tile::warpgroup();
  if (warpgroup == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, tile::warp(), 0);
    if (warp == 0) schedule<C>(p, smem);
    if (warp == 1) load<C>(p, smem);
    if constexpr (C::kBulkSums)
      if (warp >= 2) add_sums<C>(p, smem, warp - 2);
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    using Consumer = std::conditional_t<C::kByKeys, ByKeys<C>, ByChannels<C>>;
    Consumer consumer(p, smem, warpgroup - 1);
    Consumer::attend_all(consumer);
  }
}

// ---- host ----

template <class C>
Status launch_backward(const Plan& plan, const BackwardProblem& b, Workspace workspace,
                       Queue queue) {
  if (!is_bulk(b))
    return {Code::invalid,
            "q, k, v or dout stands elsewhere than the tensor of the plan, at no multiple of 16 "
            "bytes: plan again"};
  return cuda::launch_backward<C>(
      plan, b, workspace, queue,
      [&](const cuda::BackwardParams& base, std::int64_t items, cudaStream_t stream) -> Status {
        if (items > INT_MAX)
          return {Code::unsupported, "the problem has " + std::to_string(items) +
                                         " tiles of keys, a GPU computes at most 2147483647 at "
                                         "once: split its batch"};
        BackwardParams p{.base = base,
                         .scale_log2e = base.scale * static_cast<float>(kLog2e),
                         .items = static_cast<int>(items),
                         .bulk_gradients = is_bulk(b.dk) && is_bulk(b.dv)};
        for (const auto& [map, tensor, rows] : {std::tuple{&p.q, b.forward.q, C::tile.tile_m},
                                                std::tuple{&p.dout, b.dout, C::tile.tile_m},
                                                std::tuple{&p.k, b.forward.k, C::tile.tile_n},
                                                std::tuple{&p.v, b.forward.v, C::tile.tile_n}})
          if (Status s = cuda::tensor_map(*map, tensor, rows); !s.ok()) return s;
        for (const auto& [map, tensor] : {std::tuple{&p.dk, b.dk}, std::tuple{&p.dv, b.dv}})
          if (p.bulk_gradients)
            if (Status s = cuda::tensor_map(*map, tensor, C::tile.tile_n); !s.ok()) return s;
        return cuda::launch<backward<C>>({.blocks = items < plan.workers ? items : plan.workers,
                                          .threads = C::kThreads,
                                          .smem_bytes = sizeof(typename C::Smem),
                                          .overlap = true},
                                         stream, p);
      });
}

template <class C>
constexpr KernelRow backward_row(DType dtype) {
  KernelRow row = cuda::row_of<C>(Arch::sm90, Pass::backward, dtype, C::tile.tile_m);
  row.backward_bytes = cuda::backward_bytes<C>;
  row.backward = launch_backward<C>;
  row.bulk = true;
  return row;
}

template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> backward_rows() {
  constexpr BackwardTile kTile = tile_of(kBackwardTiles, kHeadDim);
  return {backward_row<BackwardConfig<bf16, kTile, Score>>(DType::bf16),
          backward_row<BackwardConfig<f16, kTile, Score>>(DType::f16)};
}

}  // namespace heed::sm90
