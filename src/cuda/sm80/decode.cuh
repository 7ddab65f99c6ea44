// Decode: few query rows against many keys. The forward kernel on packed rows (all query heads of a
// key head read its keys once), with the keys split among CTAs and the parts joined by
// common/combine.
#pragma once

#include <array>

#include "core/workspace.hpp"
#include "cuda/sm80/forward.cuh"

namespace heed::sm80 {

// The warps that share their rows leave what they have in the first of them.
template <class C>
__device__ __forceinline__ void join_warps(typename C::Smem& smem, Attention<C>& a) {
  constexpr int kWarps = C::tile.key_warps, kFloats = C::kRowsPerWarp * C::tile.head_dim;
  constexpr int kSlots = 2 * C::kM;
  const int part = tile::warp() % kWarps, first_warp = tile::warp() - part;
  SoftmaxState(*states)[C::kRowsPerWarp] = smem.states + first_warp;
  // K has been used, and of it there is enough for all but the first warp.
  static_assert(sizeof(smem.k) >=
                (kWarps - 1) * (C::tile.warps / kWarps) * kFloats * sizeof(float));
  float* sums = reinterpret_cast<float*>(smem.k) + first_warp / kWarps * (kWarps - 1) * kFloats;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const SoftmaxState mine = a.softmax.state(slot);
    if (tile::lane() % 4 == 0) states[part][tile::slot_row(slot)] = mine;
  }
  __syncthreads();
  float factor[kSlots];
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    SoftmaxState all;
    for (int w = 0; w < kWarps; ++w) all = merge(all, states[w][tile::slot_row(slot)]);
    factor[slot] = rescale(a.softmax.max[slot], all.max);
    a.softmax.max[slot] = all.max;
    a.softmax.sum[slot] = tile::lane() % 4 == 0 ? all.sum : 0.f;
  }
  tile::scale_rows(a.acc_o, factor);
  if (part > 0) tile::store_in_order(sums + (part - 1) * kFloats, a.acc_o);
  __syncthreads();
  if (part > 0) return;
  for (int w = 0; w < kWarps - 1; ++w) tile::add_in_order(a.acc_o, sums + w * kFloats);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::tile.ctas)
    decode(const __grid_constant__ ForwardParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(shared);
  const int heads_k = static_cast<int>(p.problem.k.heads());
  ptx::launch_dependents();  // the parts are joined as soon as all of them are there
  // Heads first: blocks that run together read neighbouring memory.
  int item = static_cast<int>(blockIdx.x);
  ForwardWork work{};
  work.head_k = item % heads_k;
  item /= heads_k;
  work.row0 = item % p.m_tiles * C::tile.tile_m;
  item /= p.m_tiles;
  work.split = item % p.splits;
  work.at = slice_of(p.problem, item / p.splits);
  work.head = work.head_k * p.group;
  work.rows = work.at.q.length * p.group;
  if (work.row0 >= work.rows) return;
  find_limits<C>(p, smem, work);
  Attention<C> attention(p, work);
  attend_staged<C>(p, smem, work, attention);
  attention.finish();
  if constexpr (C::tile.key_warps > 1) {
    __syncthreads();  // the last tile has been used
    join_warps<C>(smem, attention);
    if (tile::warp() % C::tile.key_warps > 0) return;
  }
  if (p.splits > 1) {
    store_part<C>(p, work, attention.acc_o, attention.softmax);
  } else {
    store_out<C>(p, smem, work, attention.acc_o, attention.softmax);
  }
}

// ---- host ----

template <class C>
std::size_t decode_bytes(const Plan& plan, const ForwardProblem& f) {
  WorkspaceLayout layout;
  cuda::carve_parts(layout, f, plan.splits, C::tile.head_dim);
  return layout.bytes();
}

template <class C>
Status launch_decode(const Plan& plan, const ForwardProblem& f, Workspace workspace, Queue queue) {
  if (Status s = cuda::fill_gaps_of_forward(f, queue.stream); !s.ok()) return s;
  if (f.k.heads() == 0) return {};
  WorkspaceLayout layout(workspace);
  const cuda::Parts memory = cuda::carve_parts(layout, f, plan.splits, C::tile.head_dim);
  ForwardParams params = forward_params<C>(f);
  params.m_tiles =
      static_cast<int>((max_seqlen_q(f) * params.group + C::tile.tile_m - 1) / C::tile.tile_m);
  params.splits = plan.splits > 1 ? plan.splits : 1;
  params.parts = memory;
  const std::int64_t tasks = params.m_tiles * f.k.heads() * batch_entries(f);
  if (Status s = cuda::launch<decode<C>>({.blocks = params.splits * tasks,
                                          .threads = C::kThreads,
                                          .smem_bytes = sizeof(typename C::Smem)},
                                         queue.stream, params);
      !s.ok() || params.splits == 1)
    return s;
  return cuda::combine(f, params.splits, memory.out, C::tile.head_dim, memory.states, queue.stream);
}

template <class C>
constexpr KernelRow decode_row(DType dtype) {
  KernelRow row = cuda::row_of<C>(Arch::sm80, Pass::decode, dtype, C::tile.tile_m);
  row.max_query_rows = C::tile.tile_m;
  row.ctas = C::tile.ctas;
  row.forward_bytes = decode_bytes<C>;
  row.forward = launch_decode<C>;
  return row;
}

// The kernels of one head_dim and score policy.
template <ForwardTile kTile, class Score>
constexpr std::array<KernelRow, 2> decode_rows_of_tile() {
  static_assert(kTile.packed && kTile.stages >= 2);
  return {decode_row<ForwardConfig<bf16, kTile, Score>>(DType::bf16),
          decode_row<ForwardConfig<f16, kTile, Score>>(DType::f16)};
}

template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> decode_rows() {
  return decode_rows_of_tile<tile_of(kDecodeTiles, kHeadDim), Score>();
}

template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> decode_compact_rows() {
  constexpr ForwardTile kTile = tile_of(kCompactDecodeTiles, kHeadDim);
  static_assert(sizeof(typename ForwardConfig<f16, kTile, Score>::Smem) <= kCompactSmemBytes);
  return decode_rows_of_tile<kTile, Score>();
}

template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> decode_wide_rows() {
  return decode_rows_of_tile<tile_of(kWideDecodeTiles, kHeadDim), Score>();
}

}  // namespace heed::sm80
