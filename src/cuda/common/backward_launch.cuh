// The host half of the backward: scratch memory, and the kernels before and after.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/layout.hpp"
#include "core/workspace.hpp"
#include "cuda/common/backward_steps.cuh"
#include "cuda/common/dbias.cuh"
#include "cuda/common/fill_gaps.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/score.cuh"
#include "cuda/host/launch.hpp"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/fragment.cuh"

namespace heed::cuda {

// dq = scale * the sums, rounded: one CTA per tile of query rows and head.
template <class C>
__global__ void __launch_bounds__(32 * C::kWarps)
    finish_dq(const __grid_constant__ BackwardParams p) {
  using Element = typename C::Element;
  __shared__ typename C::RoundedQueries tile;
  ptx::wait_for_kernel_before();
  const ForwardProblem& f = p.problem.forward;
  const int heads = static_cast<int>(f.q.heads());
  const int item = static_cast<int>(blockIdx.x / p.tiles.per_entry);
  const int m_tile = static_cast<int>(blockIdx.x % p.tiles.per_entry);
  const int head = item % heads;
  const SequenceSlice at = slice_of(f, item / heads);
  const int row0 = m_tile * C::tile.tile_m;
  if (row0 >= at.q.length) return;
  typename C::Queries acc;
  acc.clear();
  tile::add_in_order(acc, p.dq + (p.tiles.index(at, m_tile) * heads + head) * C::kQueryFloats +
                              tile::warp() * (16 * C::kQueryM * C::kQueryChannels));
  tile::scale(acc, p.scale / ds_scale_of<C>(p));
  tile::store(tile, tile::warp() / C::kQueryParts * (16 * C::kQueryM), acc,
              tile::warp() % C::kQueryParts * C::kQueryChannels);
  __syncthreads();
  constexpr int kRows = C::tile.tile_m / C::kWarps;
  Element* first = first_row<Element>(p.problem.dq, at.q, head);
  tile::store_rows(
      tile, tile::warp() * kRows, (tile::warp() + 1) * kRows, p.dq_wide,
      static_cast<int>(f.q.head_dim()), [&](int r) {
        return row0 + r < at.q.length ? first + (row0 + r) * p.problem.dq.seqlen_stride() : nullptr;
      });
}

// ---- host ----

struct BackwardMemory {
  BackwardRow* rows;
  TileLimits* limits;
  float* dq;
  int* turns;
  int* counter;
  BackwardBounds* bounds;
  float* dbias;  // full_dbias_shape(); nullptr: every element of the caller's has one writer
};

// Broadcast axes of dbias are added up by atomics, or in one order from a tensor without them.
inline std::int64_t full_dbias_count(const Plan& plan, const BackwardProblem& b) {
  if (b.dbias.data == nullptr || !plan.deterministic) return 0;
  const auto full = full_dbias_shape(b.forward);
  std::int64_t count = 1;
  bool broadcast = false;
  for (int d = 0; d < 4; ++d) {
    count *= full[d];
    broadcast = broadcast || b.dbias.shape[d] != full[d];
  }
  return broadcast ? count : 0;
}

template <class C>
BackwardMemory carve(WorkspaceLayout& layout, const Plan& plan, const BackwardProblem& b) {
  const ForwardProblem& f = b.forward;
  const std::int64_t tiles = count_of(query_tiles(f, C::tile.tile_m), f);
  BackwardMemory m{};
  m.rows = layout.add<BackwardRow>(f.q.batch() * f.q.heads() * f.q.seqlen());
  m.limits = layout.add<TileLimits>(tiles);
  m.dq = layout.add<float>(tiles * f.q.heads() * C::kQueryFloats);
  m.turns = layout.add<int>(plan.deterministic ? tiles * f.q.heads() * C::kWriters : 0);
  m.counter = layout.add<int>(1);
  m.bounds = layout.add<BackwardBounds>(1);
  const std::int64_t dbias = full_dbias_count(plan, b);
  m.dbias = dbias > 0 ? layout.add<float>(dbias) : nullptr;
  return m;
}

template <class C>
std::size_t backward_bytes(const Plan& plan, const BackwardProblem& b) {
  WorkspaceLayout layout;
  carve<C>(layout, plan, b);
  return layout.bytes();
}

// Key heads of entries whose CTAs run together, those of the first key tiles first. Few enough that
// their q, dout and sums of dq, which several CTAs read and add to at a time, stay in L2; and of
// short heads enough that the light CTAs of a causal mask, which come last, fill a GPU evenly.
// Measured on an H100: with twice as much, 2048 tokens are 5 to 18 % slower. But of few key heads
// that serve many query heads, a section of less than a GPU's CTAs would let heavy ones of a mask
// begin last: on an H200 8192 tokens took 19 % longer with 4:1, 39 % with 8:1.
inline int backward_items_at_once(const ForwardProblem& f, int n_tiles, int multiprocessors) {
  constexpr std::int64_t kBytes = std::int64_t{32} << 20, kMostItems = 32;
  const std::int64_t group = f.k.heads() == 0 ? 1 : f.q.heads() / f.k.heads();
  // 2 bytes an element of q and dout, 4 of dq.
  const std::int64_t bytes = group * max_seqlen_q(f) * (6 * f.q.head_dim() + 2 * f.v.head_dim());
  std::int64_t items = clamp64(bytes == 0 ? 1 : kBytes / bytes, 1, kMostItems);
  const bool alike = f.band == kFull && f.intervals.rows == nullptr;
  while (!alike && 8 * items * n_tiles < 7 * multiprocessors && items < kMostItems) items *= 2;
  return static_cast<int>(items);
}

// `start` launches the kernel of one configuration: (params, blocks, stream).
template <class C, class Start>
Status launch_backward(const Plan& plan, const BackwardProblem& b, Workspace workspace, Queue queue,
                       const Start& start) {
  const ForwardProblem& f = b.forward;
  if (Status s = fill_gaps_of_backward(b, queue.stream); !s.ok()) return s;
  WorkspaceLayout layout(workspace);
  const BackwardMemory memory = carve<C>(layout, plan, b);
  const QueryTiles tiles = query_tiles(f, C::tile.tile_m);
  BackwardProblem problem = b;
  if (memory.dbias != nullptr)
    problem.dbias = contiguous(memory.dbias, DType::f32, full_dbias_shape(f));
  if (Status s = clear_dbias(problem.dbias, queue.stream); !s.ok()) return s;
  if (f.q.heads() == 0) return {};
  const int n_tiles = static_cast<int>((max_seqlen_k(f) + C::tile.tile_n - 1) / C::tile.tile_n);
  const BackwardParams params{.problem = problem,
                              .scale = scale_of(f).value(),
                              .order = {static_cast<int>(f.k.heads() * batch_entries(f)),
                                        backward_items_at_once(f, n_tiles, plan.workers), n_tiles},
                              .group = static_cast<int>(f.q.heads() / f.k.heads()),
                              .tiles = tiles,
                              .rows = memory.rows,
                              .limits = memory.limits,
                              .dq = memory.dq,
                              .bounds = memory.bounds,
                              .turns = plan.deterministic ? memory.turns : nullptr,
                              .counter = memory.counter,
                              .q_wide = is_wide(f.q),
                              .k_wide = is_wide(f.k),
                              .v_wide = is_wide(f.v),
                              .dout_wide = is_wide(b.dout),
                              .dq_wide = is_wide(b.dq),
                              .dk_wide = is_wide(b.dk),
                              .dv_wide = is_wide(b.dv)};
  if (Status s = find_backward_rows(
          b, tiles, memory.rows, memory.limits, memory.bounds,
          {memory.dq, C::kQueryFloats, params.turns, C::kWriters, memory.counter}, queue.stream);
      !s.ok())
    return s;
  if (Status s = sum_dsink(b, memory.rows, queue.stream); !s.ok()) return s;
  if (Status s = start(params, n_tiles * f.k.heads() * batch_entries(f), queue.stream); !s.ok())
    return s;
  if (memory.dbias != nullptr)
    if (Status s = sum_dbias(problem.dbias, b.dbias, queue.stream); !s.ok()) return s;
  return launch<finish_dq<C>>({.blocks = tiles.per_entry * f.q.heads() * batch_entries(f),
                               .threads = 32 * C::kWarps,
                               .overlap = true},
                              queue.stream, params);
}

}  // namespace heed::cuda
