// What the backward kernels walk over: the tiles of query rows that see the keys of a CTA.
#pragma once

#include <climits>
#include <cstdint>

#include "core/mask.hpp"
#include "core/schedule.hpp"
#include "core/score.hpp"
#include "cuda/common/backward_rows.cuh"
#include "heed/problem.hpp"

namespace heed::cuda {

struct BackwardParams {
  BackwardProblem problem;  // pointers are device pointers
  float scale;
  ItemOrder order;  // items are key heads of all entries
  int group;
  QueryTiles tiles;
  const BackwardRow* rows;       // as lse
  const TileLimits* limits;      // [query tiles]
  float* dq;                     // [query tiles, heads_q, kQueryFloats] in register order
  const BackwardBounds* bounds;  // f16 only
  int* turns;    // [query tiles, heads_q, kWriters] key tiles that were added; nullptr: any order
  int* counter;  // 0; where CTAs take items one after another: of those after their first
  bool q_wide, k_wide, v_wide, dout_wide, dq_wide, dk_wide, dv_wide;
};

// What dS is multiplied by before it is rounded to 16 bits.
template <class C>
__device__ __forceinline__ float ds_scale_of(const BackwardParams& p) {
  if constexpr (!C::kBounded) return 1.f;
  const BackwardBounds b = *p.bounds;
  return f16_ds_scale(b.dout, b.v, b.delta, 1.f / (1.f - p.problem.forward.dropout.probability));
}

// Tiles of query rows that see some of a tile of keys: all of [first_tile, last_tile], or, where
// `listed`, those of them that `limits` says. The rows of [first_inside, last_inside] see all those
// keys; where listed, `limits` says that too.
struct StepRange {
  int first_tile, last_tile, first_inside, last_inside;
  bool listed;
};

// A tile of keys of a key head.
struct BackwardWork {
  SequenceSlice at;
  const TileLimits* limits;  // of the entry's tiles of query rows
  int head_k;
  int n_tile, key0;
  StepRange range;
};

template <class C>
__device__ __forceinline__ BackwardWork work_at(const BackwardParams& p, int block) {
  const int heads_k = static_cast<int>(p.problem.forward.k.heads());
  const ItemTile tile = p.order.at(block);
  BackwardWork work{};
  work.at = slice_of(p.problem.forward, tile.item / heads_k);
  work.limits = p.limits + p.tiles.index(work.at, 0);
  work.head_k = tile.item % heads_k;
  work.n_tile = tile.tile;
  work.key0 = work.n_tile * C::tile.tile_n;
  return work;
}

// One step: a tile of query rows of one head.
struct Step {
  int head;  // within the group; group: no step is left
  int m_tile;
  bool inside;  // every row sees all the keys
};

template <class C>
__device__ __forceinline__ bool meets(const TileLimits& t, const BackwardWork& work) {
  return t.first < work.key0 + C::tile.tile_n && t.end > work.key0;
}

// Which tiles of query rows see keys of `work`. Deterministic turns count those that `limits` has.
// All of `threads` look, and `join` makes of what each found, the first tile and the last one, what
// all did.
template <class C, class Join>
__device__ __forceinline__ StepRange find_steps(const BackwardParams& p, const BackwardWork& work,
                                                int thread, int threads, const Join& join) {
  constexpr int kTile = C::tile.tile_m;
  const ForwardProblem& f = p.problem.forward;
  if (f.intervals.rows == nullptr && p.turns == nullptr) {
    const int key_end = work.key0 + C::tile.tile_n;
    const TileRange rows = q_range(f.band, work.key0, key_end, work.at.q.length, work.at.k.length);
    return {rows.begin / kTile, ceil_div(rows.end, kTile) - 1, ceil_div(rows.interior_begin, kTile),
            key_end <= work.at.k.length ? rows.interior_end / kTile - 1 : -1, false};
  }
  const int count = ceil_div(work.at.q.length, kTile);
  int first = INT_MAX, last = -1;
  for (int m = thread; m < count; m += threads)
    if (meets<C>(work.limits[m], work)) {
      first = min_of(first, m);
      last = m;
    }
  join(first, last);
  return {first, last, 0, -1, true};
}

// The step at or after `step`.
template <class C>
__device__ __forceinline__ Step settle(int group, const BackwardWork& work, Step step) {
  const StepRange& range = work.range;
  for (; step.head < group; ++step.head, step.m_tile = range.first_tile)
    for (; step.m_tile <= range.last_tile; ++step.m_tile) {
      if (!range.listed) {
        step.inside = step.m_tile >= range.first_inside && step.m_tile <= range.last_inside;
        return step;
      }
      const TileLimits limits = work.limits[step.m_tile];
      step.inside = limits.all_first <= work.key0 && limits.all_end >= work.key0 + C::tile.tile_n;
      if (meets<C>(limits, work)) return step;
    }
  return step;
}

// Number of a step's tile and head among the sums.
__device__ __forceinline__ std::int64_t sums_index(const BackwardParams& p,
                                                   const BackwardWork& work, const Step& step) {
  return (work.limits - p.limits + step.m_tile) * p.problem.forward.q.heads() +
         work.head_k * p.group + step.head;
}
// How many key tiles are added to a tile of dq before this one, where there is an order. CTAs are
// dispatched in the order of their numbers, or take items in it, and those of this entry's smaller
// key tiles that see the rows all add to the counter, whatever the contents of the arrays: who
// waits for it waits not for ever.
template <class C>
__device__ __forceinline__ int turn_of(const BackwardWork& work, const Step& step) {
  return work.n_tile - work.limits[step.m_tile].first / C::tile.tile_n;
}
// By one thread, before a barrier of those that add, and behind another one: barriers and fences
// together order what all of them add.
__device__ __forceinline__ void wait_for_turn(const int* counter, int turn) {
  while (*static_cast<const volatile int*>(counter) < turn) {
  }
  __threadfence();
}
__device__ __forceinline__ void pass_turn(int* counter) {
  __threadfence();
  atomicAdd(counter, 1);
}

}  // namespace heed::cuda
