// The host half of the backward: scratch memory, the kernels before and after, and the rows of the
// table.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/workspace.hpp"
#include "cuda/common/dbias.cuh"
#include "cuda/common/fill_gaps.cuh"
#include "cuda/host/launch.hpp"
#include "cuda/host/row.hpp"
#include "cuda/sm80/backward.cuh"
#include "registry.hpp"

namespace heed::sm80 {

// dq = scale * the sums, rounded: one CTA per tile of query rows and head.
template <class C>
__global__ void __launch_bounds__(C::kThreads) finish_dq(const __grid_constant__ BackwardParams p) {
  using Element = typename C::Element;
  __shared__ typename C::QueryTile tile;
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
  tile::add_in_order(
      acc, p.dq + (p.tiles.index(at, m_tile) * heads + head) * (C::tile.tile_m * C::tile.head_dim) +
               tile::warp() * (16 * C::kQueryM * C::kQueryChannels));
  tile::scale(acc, p.scale / ds_scale_of<C>(p));
  tile::store(tile, tile::warp() / C::kQueryParts * (16 * C::kQueryM), acc,
              tile::warp() % C::kQueryParts * C::kQueryChannels);
  __syncthreads();
  constexpr int kRows = C::tile.tile_m / C::kWarps;
  Element* first = cuda::first_row<Element>(p.problem.dq, at.q, head);
  tile::store_rows(
      tile, tile::warp() * kRows, (tile::warp() + 1) * kRows, p.dq_wide,
      static_cast<int>(f.q.head_dim()), [&](int r) {
        return row0 + r < at.q.length ? first + (row0 + r) * p.problem.dq.seqlen_stride() : nullptr;
      });
}

// ---- host ----

struct BackwardMemory {
  cuda::BackwardRow* rows;
  cuda::TileLimits* limits;
  float* dq;
  int* turns;
  cuda::BackwardBounds* bounds;
  float* dbias;  // full_dbias_shape(); nullptr: every element of the caller's has one writer
};

// Broadcast axes of dbias are added up by atomics, or in one order from a tensor without them.
inline std::int64_t full_dbias_count(const Plan& plan, const BackwardProblem& b) {
  if (b.dbias.data == nullptr || !plan.deterministic) return 0;
  const auto full = cuda::full_dbias_shape(b.forward);
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
  const std::int64_t tiles = count_of(cuda::query_tiles(f, C::tile.tile_m), f);
  BackwardMemory m{};
  m.rows = layout.add<cuda::BackwardRow>(f.q.batch() * f.q.heads() * f.q.seqlen());
  m.limits = layout.add<cuda::TileLimits>(tiles);
  m.dq = layout.add<float>(tiles * f.q.heads() * C::tile.tile_m * C::tile.head_dim);
  m.turns = layout.add<int>(plan.deterministic ? tiles * f.q.heads() : 0);
  m.bounds = layout.add<cuda::BackwardBounds>(1);
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

// Key heads of entries whose CTAs run together, those of the first key tiles first: enough CTAs
// that the light ones of a causal mask, which come last, fill a GPU evenly, and few enough heads
// that several CTAs read the same Q and dO and add to the same dq at a time. Measured on an H200.
constexpr int backward_items_at_once(int n_tiles) {
  constexpr int kCtas = 1024, kMostItems = 32;
  return n_tiles == 0 ? 1 : static_cast<int>(clamp64(kCtas / n_tiles, 1, kMostItems));
}

template <class C>
Status launch_backward(const Plan& plan, const BackwardProblem& b, Workspace workspace,
                       Queue queue) {
  const ForwardProblem& f = b.forward;
  if (Status s = cuda::fill_gaps_of_backward(b, queue.stream); !s.ok()) return s;
  WorkspaceLayout layout(workspace);
  const BackwardMemory memory = carve<C>(layout, plan, b);
  const cuda::QueryTiles tiles = cuda::query_tiles(f, C::tile.tile_m);
  BackwardProblem problem = b;
  if (memory.dbias != nullptr)
    problem.dbias = contiguous(memory.dbias, DType::f32, cuda::full_dbias_shape(f));
  if (Status s = cuda::clear_dbias(problem.dbias, queue.stream); !s.ok()) return s;
  if (f.q.heads() == 0) return {};
  const int n_tiles = static_cast<int>((max_seqlen_k(f) + C::tile.tile_n - 1) / C::tile.tile_n);
  const BackwardParams params{.problem = problem,
                              .scale = cuda::scale_of(f).value(),
                              .order = {static_cast<int>(f.k.heads() * batch_entries(f)),
                                        backward_items_at_once(n_tiles), n_tiles},
                              .group = static_cast<int>(f.q.heads() / f.k.heads()),
                              .tiles = tiles,
                              .rows = memory.rows,
                              .limits = memory.limits,
                              .dq = memory.dq,
                              .bounds = memory.bounds,
                              .turns = plan.deterministic ? memory.turns : nullptr,
                              .q_wide = is_wide(f.q),
                              .k_wide = is_wide(f.k),
                              .v_wide = is_wide(f.v),
                              .dout_wide = is_wide(b.dout),
                              .dq_wide = is_wide(b.dq),
                              .dk_wide = is_wide(b.dk),
                              .dv_wide = is_wide(b.dv)};
  if (Status s = find_backward_rows(b, tiles, memory.rows, memory.limits, memory.bounds,
                                    {memory.dq, C::tile.tile_m * C::tile.head_dim, params.turns},
                                    queue.stream);
      !s.ok())
    return s;
  if (Status s = sum_dsink(b, memory.rows, queue.stream); !s.ok()) return s;
  if (Status s =
          cuda::launch<backward<C>>({.blocks = n_tiles * f.k.heads() * batch_entries(f),
                                     .threads = C::kThreads,
                                     .smem_bytes = sizeof(typename C::Smem),
                                     .overlap = true},
                                    queue.stream, params);
      !s.ok())
    return s;
  if (memory.dbias != nullptr)
    if (Status s = cuda::sum_dbias(problem.dbias, b.dbias, queue.stream); !s.ok()) return s;
  return cuda::launch<finish_dq<C>>({.blocks = tiles.per_entry * f.q.heads() * batch_entries(f),
                                     .threads = C::kThreads,
                                     .overlap = true},
                                    queue.stream, params);
}

template <class C>
constexpr KernelRow backward_row(DType dtype) {
  KernelRow row = cuda::row_of<C>(Arch::sm80, Pass::backward, dtype, C::tile.tile_m);
  row.backward_bytes = backward_bytes<C>;
  row.backward = launch_backward<C>;
  return row;
}

// The kernels of one head_dim and score policy.
template <BackwardTile kTile, class Score>
constexpr std::array<KernelRow, 2> rows_of_tile() {
  return {backward_row<BackwardConfig<bf16, kTile, Score>>(DType::bf16),
          backward_row<BackwardConfig<f16, kTile, Score>>(DType::f16)};
}

template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> backward_rows() {
  return rows_of_tile<tile_of(kBackwardTiles, kHeadDim), Score>();
}

template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> backward_compact_rows() {
  constexpr BackwardTile kTile = tile_of(kCompactBackwardTiles, kHeadDim);
  static_assert(sizeof(typename BackwardConfig<f16, kTile, Score>::Smem) <= kCompactSmemBytes);
  return rows_of_tile<kTile, Score>();
}

}  // namespace heed::sm80
