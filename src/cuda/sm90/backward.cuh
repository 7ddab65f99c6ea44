// Backward attention on Hopper: dq, dk, dv of softmax(scale q k^T) v.
//
// One CTA owns the keys of a tile of one key head and walks the tiles of query rows that see them,
// for every query head of the group: dk and dv have one writer. Two warpgroups consume
// (backward_by_keys.cuh, backward_by_channels.cuh); a warp of the first warpgroup brings Q, dO and
// what is known of their rows. dQ is added up in fp32 in global memory, in the order of the
// registers.
#pragma once

#include <array>
#include <climits>
#include <cstddef>
#include <cstdint>
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

// ---- loader ----

template <class C>
__device__ __forceinline__ void load_steps(const BackwardParams& p, typename C::Smem& smem) {
  const BackwardWork& work = smem.work;
  const int group = p.base.group, lane = tile::lane();
  Step step = cuda::settle<C>(group, work, {0, work.first_tile, false});
  if (work.last_tile < work.first_tile) step.head = group;
  tile::PipelineState<C::tile.stages> at;
#pragma unroll 1
  for (; step.head < group; at.advance()) {
    const int head = work.head_k * group + step.head, row0 = step.m_tile * C::tile.tile_m;
    const ptx::BoxStart start{0, static_cast<int>(work.at.q.token) + row0, head,
                              static_cast<int>(work.at.q.batch)};
    const cuda::BackwardRow* rows =
        p.base.rows + lse_index(p.base.problem.forward, work.at, head, row0);
    smem.q_empty[at.stage].wait(at.phase ^ 1);
    ptx::Barrier& q_full = smem.q_full[at.stage];
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
    if (lane == 0) {
      smem.visits[at.stage] = {static_cast<int>(cuda::sums_index(p.base, work, step)),
                               work.at.q.length - row0, step.inside,
                               p.base.turns == nullptr ? 0 : cuda::turn_of<C>(work, step)};
      q_full.arrive_and_expect(C::QueryTile::kLoadBytes);
      smem.q[at.stage].load(0, p.q, start, q_full);
      smem.dout_empty[at.stage].wait(at.phase ^ 1);
      smem.dout_full[at.stage].arrive_and_expect(C::QueryTile::kLoadBytes);
      smem.dout[at.stage].load(0, p.dout, start, smem.dout_full[at.stage]);
    }
    __syncwarp();
    step = cuda::settle<C>(group, work, {step.head, step.m_tile + 1, false});
  }
  smem.q_empty[at.stage].wait(at.phase ^ 1);
  if (lane == 0) {
    smem.visits[at.stage] = {-1, INT_MAX, false, 0};
    smem.q_full[at.stage].arrive();
  }
  smem.q_full[at.stage].arrive();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    backward(const __grid_constant__ BackwardParams p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(shared);
  const ForwardProblem& f = p.base.problem.forward;
  BackwardWork work = cuda::work_at<C>(p.base, static_cast<int>(blockIdx.x));
  ptx::launch_dependents();
  if (work.key0 >= work.at.k.length) return ptx::wait_for_kernel_before();
  if (threadIdx.x == 0) {
    smem.keys_full.init(1);
    for (int s = 0; s < C::tile.stages; ++s) {
      smem.q_full[s].init(32 + 1);  // lanes of the loader, and its announcement of bytes
      smem.dout_full[s].init(1);
      smem.q_empty[s].init(4 * C::kConsumers);
      smem.dout_empty[s].init(4 * C::kConsumers);
    }
    ptx::fence_barrier_init();
    const ptx::BoxStart start{0, static_cast<int>(work.at.k.token) + work.key0, work.head_k,
                              static_cast<int>(work.at.k.batch)};
    smem.keys_full.arrive_and_expect(2 * C::KeyTile::kLoadBytes);
    smem.k.load(0, p.k, start, smem.keys_full);
    smem.v.load(0, p.v, start, smem.keys_full);
  }
  const int key_end = min_of(work.key0 + C::tile.tile_n, work.at.k.length);
  const bool holes =
      f.intervals.bits != nullptr &&
      __syncthreads_or(cuda::any_missing(f, work.at, work.key0, key_end,
                                         static_cast<int>(threadIdx.x), C::kThreads));
  ptx::wait_for_kernel_before();  // only inputs of the problem were read until here
  cuda::find_steps<C>(p.base, smem, work);
  if (threadIdx.x == 0) {
    smem.work = work;
    smem.ds_scale = cuda::ds_scale_of<C>(p.base);
  }
  __syncthreads();  // and the barriers are ready
  const int warpgroup = tile::warpgroup();
  if (warpgroup == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    if (__shfl_sync(~0u, tile::warp(), 0) == 0) load_steps<C>(p, smem);
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    using Consumer = std::conditional_t<C::kByKeys, ByKeys<C>, ByChannels<C>>;
    Consumer(p, smem, warpgroup - 1, holes).run();
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
      [&](const cuda::BackwardParams& base, std::int64_t blocks, cudaStream_t stream) {
        BackwardParams p{.base = base, .scale_log2e = base.scale * static_cast<float>(kLog2e)};
        for (const auto& [map, tensor, rows] : {std::tuple{&p.q, &b.forward.q, C::tile.tile_m},
                                                std::tuple{&p.dout, &b.dout, C::tile.tile_m},
                                                std::tuple{&p.k, &b.forward.k, C::tile.tile_n},
                                                std::tuple{&p.v, &b.forward.v, C::tile.tile_n}})
          if (Status s = cuda::tensor_map(*map, *tensor, rows); !s.ok()) return s;
        return cuda::launch<backward<C>>({.blocks = blocks,
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
