// Decode: few query rows against many keys. The forward kernel on packed rows (all query heads of a
// key head read its keys once), with the keys split among CTAs. Two parts are joined through shared
// memory where there are clusters (sm_90), and else all parts by common/combine.
#pragma once

#include <array>

#include "core/workspace.hpp"
#include "cuda/common/joined.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/sm80/forward.cuh"

namespace heed::sm80 {

// Joins what the warps of a block have of the same rows, or those of both blocks of a cluster: to
// out and lse, or where there are more parts to one of them. K and V have been used.
template <int kBlocks, class C>
__device__ __forceinline__ void join(const ForwardParams& p, typename C::Smem& smem,
                                     const ForwardWork& work, const Attention<C>& a) {
  constexpr int kWidth = C::tile.head_dim, kVectors = kWidth / 4;
  constexpr int kWarps = C::tile.key_warps, kSources = kBlocks * kWarps;
  // Of a warp: its sums, and at column kWidth the row's state. Rows are a quarter of the banks
  // apart.
  using Part = float[C::kRowsPerWarp][kWidth + 8];
  static_assert(sizeof(smem.k) + sizeof(smem.v) >= C::tile.warps * sizeof(Part));
  Part* parts = reinterpret_cast<Part*>(smem.k);
  const int rows = min_of(work.rows - work.row0, C::tile.tile_m);
  const auto row_of = [&](int slot) { return parts[tile::warp()][tile::slot_row(slot)]; };
#pragma unroll
  for (int slot = 0; slot < 2 * C::kM; ++slot) {
    const SoftmaxState state = a.softmax.state(slot);
    if (tile::lane() % 4 == 0)
      *reinterpret_cast<float2*>(row_of(slot) + kWidth) = {state.max, state.sum};
  }
  tile::for_each_pair(a.acc_o, [&](int slot, int col, float x, float y) {
    if (C::warp_row() + tile::slot_row(slot) < rows)
      *reinterpret_cast<float2*>(row_of(slot) + col) = {x, y};
  });
  if constexpr (kBlocks > 1)
    ptx::cluster_sync();
  else
    __syncthreads();

  const int first = static_cast<int>(threadIdx.x) + (kBlocks > 1 ? work.split * C::kThreads : 0);
  for (int i = first; i < rows * kVectors; i += kBlocks * C::kThreads) {
    const int row = i / kVectors, channel = i % kVectors * 4;
    const Part* of_row = parts + row / C::kRowsPerWarp * kWarps;
    float4 states[kSources], sums[kSources];
#pragma unroll
    for (int s = 0; s < kSources; ++s) {
      const float* here = of_row[s % kWarps][row % C::kRowsPerWarp];
      if constexpr (kBlocks > 1) {
        states[s] = ptx::load_of_block(here + kWidth, s / kWarps);
        sums[s] = ptx::load_of_block(here + channel, s / kWarps);
      } else {
        states[s] = *reinterpret_cast<const float4*>(here + kWidth);
        sums[s] = *reinterpret_cast<const float4*>(here + channel);
      }
    }
    cuda::Joined joined;
#pragma unroll
    for (int s = 0; s < kSources; ++s) joined.max = fmaxf(joined.max, states[s].x);
#pragma unroll
    for (int s = 0; s < kSources; ++s) joined.add({states[s].x, states[s].y}, sums[s]);
    const cuda::Place place = place_of<C>(p, work, work.row0 + row);
    if (p.splits.value == kBlocks) {
      cuda::store_row<typename C::Element>(p.problem, work.at, place, channel, p.out_wide, joined);
      continue;
    }
    const ConstTensorView& q = p.problem.q;
    const std::int64_t index = work.split * q.batch() * q.heads() * q.seqlen() +
                               lse_index(p.problem, work.at, place.head, place.row);
    *reinterpret_cast<float4*>(p.parts.out + index * kWidth + channel) = joined.x;
    if (channel == 0) p.parts.states[index] = {joined.max, joined.sum};
  }
  if constexpr (kBlocks > 1) ptx::cluster_sync();  // the other block has read this one's memory
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::tile.ctas)
    decode(const __grid_constant__ ForwardParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(shared);
  // A cluster's blocks are neighbours. Else heads first: blocks that run together read neighbouring
  // memory.
  const int block = static_cast<int>(blockIdx.x);
  const int unsplit = p.in_pairs ? block / 2 : block;
  const int rest = unsplit / p.heads_k, part = rest / p.packed_tiles;
  const int entry = p.in_pairs ? part : part / p.splits;
  ForwardWork work{};
  work.head_k = unsplit - rest * p.heads_k.value;
  work.row0 = (rest - part * p.packed_tiles.value) * C::tile.tile_m;
  work.split = p.in_pairs ? block % 2 : part - entry * p.splits.value;
  work.at = slice_of(p.problem, entry);
  work.head = work.head_k * p.group.value;
  work.rows = work.at.q.length * p.group.value;
  if (work.row0 >= work.rows) return;
  find_limits<C>(p, smem, work);
  Attention<C> attention(p, work);
  attend_staged<C>(p, smem, work, attention);
  ptx::launch_dependents();  // the parts are joined as soon as all of them are there
  attention.finish();
  __syncthreads();  // the last tile has been used
  if (p.in_pairs)
    join<2>(p, smem, work, attention);
  else
    join<1>(p, smem, work, attention);
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
  ForwardParams params = forward_params<C>(plan, f);
  const std::int64_t rows = max_seqlen_q(f) * params.group.value;
  const int splits = plan.splits > 1 ? plan.splits : 1;
  params.heads_k = Divisor(static_cast<int>(f.k.heads()));
  params.packed_tiles =
      Divisor(static_cast<int>(clamp64((rows + C::tile.tile_m - 1) / C::tile.tile_m, 1, INT_MAX)));
  params.splits = Divisor(splits);
  params.in_pairs = splits == 2 && cuda::is_sm90_code<decode<C>>();
  params.parts = cuda::carve_parts(layout, f, splits, C::tile.head_dim);
  const std::int64_t tasks = params.packed_tiles.value * f.k.heads() * batch_entries(f);
  if (Status s = cuda::launch<decode<C>>({.blocks = splits * tasks,
                                          .threads = C::kThreads,
                                          .smem_bytes = sizeof(typename C::Smem),
                                          .cluster = params.in_pairs ? 2 : 1},
                                         queue.stream, params);
      !s.ok() || splits == 1 || params.in_pairs)
    return s;
  return cuda::combine(f, splits, params.parts.out, C::tile.head_dim, params.parts.states,
                       queue.stream);
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
