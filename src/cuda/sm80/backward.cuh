// Backward attention on tensor cores of sm_80 and later: dq, dk, dv (and dbias) of softmax(score(q
// k^T)) v.
//
// One CTA owns tile_n keys of one key head and walks the tiles of query rows that see them, for
// every query head of the group: dk and dv have one writer. Scores are computed transposed, keys by
// query rows:
//
//   S^T = K Q^T    dP^T = V dO^T    P = exp2(S - lse)    dS = P (dP - delta)
//   dV += P^T dO   dK += dS^T Q     dQ += dS K
//
// What limits the speed is reading shared memory, so warps own 32 keys, and several share them:
// each computes a part of their scores, hands it over through shared memory and owns a part of the
// channels of dK and dV. dQ is added up in fp32 in global memory, in the order of the registers: by
// reductions in any order, or in the order of the key tiles where the plan is deterministic.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/mask.hpp"
#include "core/score.hpp"
#include "cuda/common/backward_rows.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/score.cuh"
#include "cuda/sm80/tiles.hpp"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/gemm.cuh"

namespace heed::sm80 {

template <class ElementType, BackwardTile kTile, class ScorePolicy>
struct BackwardConfig {
  using Element = ElementType;
  using Score = ScorePolicy;
  static constexpr BackwardTile tile = kTile;
  static constexpr bool kBounded = std::is_same_v<Element, f16>;
  static constexpr int kM = tile.keys / 16;
  static constexpr int kWarps = tile.tile_n / tile.keys * tile.share;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kScoreCols = tile.tile_m / tile.share;   // query rows of a warp's scores
  static constexpr int kChannels = tile.head_dim / tile.share;  // of a warp's dK and dV
  // dQ: warps are 16 rows each by a part of the channels.
  static constexpr int kQueryParts = kWarps / (tile.tile_m / 16);
  static constexpr int kQueryChannels = tile.head_dim / kQueryParts;
  using Scores = tile::Accumulator<kM, kScoreCols / 8>;
  using Keys = tile::Accumulator<kM, kChannels / 8>;
  using Queries = tile::Accumulator<1, kQueryChannels / 8>;
  using KeyTile = tile::SharedTile<Element, tile.tile_n, tile.head_dim>;
  using QueryTile = tile::SharedTile<Element, tile.tile_m, tile.head_dim>;
  using ScoreTile = tile::SharedTile<Element, tile.tile_n, tile.tile_m>;

  struct Smem {
    KeyTile k, v;  // later dK and dV
    QueryTile q[tile.stages], dout[tile.stages];
    ScoreTile p, ds;
    cuda::BackwardRow rows[tile.stages][tile.tile_m];
    int first_tile, last_tile;
  };
  static_assert(kWarps % (tile.tile_m / 16) == 0 && tile.head_dim % (16 * kQueryParts) == 0);
  static_assert(sizeof(Smem) <= 227 * 1024, "the tile does not fit in shared memory");
};

struct BackwardParams {
  BackwardProblem problem;  // pointers are device pointers
  float scale;
  int n_tiles;  // per entry
  int group;
  cuda::QueryTiles tiles;
  const cuda::BackwardRow* rows;   // as lse
  const cuda::TileLimits* limits;  // [query tiles]
  float* dq;                       // [query tiles, heads_q, tile_m * head_dim] in register order
  const cuda::BackwardBounds* bounds;  // f16 only
  int* turns;  // [query tiles, heads_q] key tiles that were added; nullptr: any order
  bool q_wide, k_wide, v_wide, dout_wide, dq_wide, dk_wide, dv_wide;
};

// What dS is multiplied by before it is rounded to 16 bits.
template <class C>
__device__ __forceinline__ float ds_scale_of(const BackwardParams& p) {
  if constexpr (!C::kBounded) return 1.f;
  const cuda::BackwardBounds b = *p.bounds;
  return f16_ds_scale(b.dout, b.v, b.delta, 1.f / (1.f - p.problem.forward.dropout.probability));
}

struct BackwardWork {
  SequenceSlice at;
  int head_k;
  int n_tile, key0;
};

// One step: a tile of query rows of one head.
struct Step {
  int head;  // within the group; group: no step is left
  int m_tile;
};

__device__ __forceinline__ cuda::TileLimits limits_of(const BackwardParams& p,
                                                      const BackwardWork& work, int m_tile) {
  return p.limits[p.tiles.index(work.at, m_tile)];
}

template <class C>
__device__ __forceinline__ bool meets(const cuda::TileLimits& t, const BackwardWork& work) {
  return t.first < work.key0 + C::tile.tile_n && t.end > work.key0;
}

// The first and last tile of query rows that sees a key of this CTA.
template <class C>
__device__ __forceinline__ void find_steps(const BackwardParams& p, typename C::Smem& smem,
                                           const BackwardWork& work) {
  if (threadIdx.x == 0) {
    smem.first_tile = INT_MAX;
    smem.last_tile = -1;
  }
  __syncthreads();
  const int count = ceil_div(work.at.q.length, C::tile.tile_m);
  int first = INT_MAX, last = -1;
  for (int m = static_cast<int>(threadIdx.x); m < count; m += C::kThreads)
    if (meets<C>(limits_of(p, work, m), work)) {
      first = min_of(first, m);
      last = m;
    }
  if (last >= 0) {
    atomicMin(&smem.first_tile, first);
    atomicMax(&smem.last_tile, last);
  }
  __syncthreads();
}

// The step at or after `step`.
template <class C>
__device__ __forceinline__ Step settle(const BackwardParams& p, const typename C::Smem& smem,
                                       const BackwardWork& work, Step step) {
  for (; step.head < p.group; ++step.head, step.m_tile = smem.first_tile)
    for (; step.m_tile <= smem.last_tile; ++step.m_tile)
      if (meets<C>(limits_of(p, work, step.m_tile), work)) return step;
  return step;
}

template <class C>
__device__ __forceinline__ void load_step(const BackwardParams& p, typename C::Smem& smem,
                                          const BackwardWork& work, Step step, int stage) {
  using Element = typename C::Element;
  const ForwardProblem& f = p.problem.forward;
  const int head = work.head_k * p.group + step.head;
  const int row0 = step.m_tile * C::tile.tile_m;
  const auto load = [&](auto& tile, const ConstTensorView& x, bool wide) {
    const Element* first = cuda::first_row<const Element>(x, work.at.q, head);
    const int channels = static_cast<int>(x.head_dim());
    if (wide)
      return tile::load_block<C::kThreads>(tile, first + row0 * x.seqlen_stride(),
                                           x.seqlen_stride(), work.at.q.length - row0, channels);
    tile::load_rows<C::kThreads>(tile, wide, channels, [&](int r) {
      return row0 + r < work.at.q.length ? first + (row0 + r) * x.seqlen_stride() : nullptr;
    });
  };
  load(smem.q[stage], f.q, p.q_wide);
  load(smem.dout[stage], p.problem.dout, p.dout_wide);
  for (int r = static_cast<int>(threadIdx.x); r < C::tile.tile_m; r += C::kThreads) {
    const bool exists = row0 + r < work.at.q.length;
    ptx::cp_async(ptx::shared_address(&smem.rows[stage][r]),
                  exists ? p.rows + lse_index(f, work.at, head, row0 + r) : p.rows, exists);
  }
  ptx::cp_async_commit();
}

// Scores S^T and dP^T become P^T, zero where it is dropped, and slope * dS^T.
template <class C>
__device__ __forceinline__ void differentiate(const BackwardParams& p, const typename C::Smem& smem,
                                              const BackwardWork& work,
                                              const typename C::Score& score, bool boundary,
                                              cuda::Place first, int key0, std::uint32_t present,
                                              int first_col, int stage, typename C::Scores& s,
                                              typename C::Scores& dp) {
  const cuda::BackwardRow* rows = smem.rows[stage] + first_col;
  const auto hidden = [&](int slot, int col) {
    const RowLimits limits = rows[col].limits;
    const int key = key0 + tile::slot_row(slot);
    return key < limits.first || key >= limits.end || (present >> slot & 1u) == 0;
  };
  if constexpr (C::Score::kLocal) {
    tile::for_each(s, dp, [&](int, int col, float& x, float& dx) {
      const float slope = score.slope(x);
      x = ptx::exp2(score.value(x, {}, 0) - rows[col].lse_log2);
      dx = (dx - rows[col].delta) * slope;
    });
    if (boundary)
      tile::for_each(s, [&](int slot, int col, float& x) { x = hidden(slot, col) ? 0.f : x; });
    tile::for_each(s, dp, [](int, int, float& x, float& dx) { dx *= x; });
  } else {
    tile::for_each(s, dp, [&](int slot, int col, float& x, float& dx) {
      if (hidden(slot, col)) {
        x = dx = 0.f;
        return;
      }
      const cuda::Place at{first.row + first_col + col, first.head};
      const int key = key0 + tile::slot_row(slot);
      const float weight = ptx::exp2(score.value(x, at, key) - rows[col].lse_log2);
      const bool keeps = score.keeps(at, key);
      const float ds = weight * ((keeps ? score.kept * dx : 0.f) - rows[col].delta);
      score.add_gradient(at, key, ds);
      dx = ds * score.slope(x);
      x = keeps ? weight : 0.f;
    });
  }
}

// Adds this CTA's part of a tile of dq.
template <class C>
__device__ __forceinline__ void add_queries(const BackwardParams& p, const BackwardWork& work,
                                            Step step, const cuda::TileLimits& limits,
                                            const typename C::Queries& acc) {
  const int head = work.head_k * p.group + step.head;
  const std::int64_t index =
      p.tiles.index(work.at, step.m_tile) * p.problem.forward.q.heads() + head;
  float* base =
      p.dq + index * (C::tile.tile_m * C::tile.head_dim) + tile::warp() * (16 * C::kQueryChannels);
  if (p.turns == nullptr) {
    tile::add_to_global(base, acc);
    return;
  }
  // CTAs are dispatched in the order of their numbers, and those of this entry's smaller key tiles
  // that see the rows all add to this counter, whatever the contents of the arrays: the wait ends.
  const int turn = work.n_tile - limits.first / C::tile.tile_n;
  if (threadIdx.x == 0)
    while (*static_cast<volatile int*>(p.turns + index) < turn) {
    }
  __syncthreads();
  __threadfence();
  tile::add_to_global(base, acc);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(p.turns + index, 1);
}

template <class C>
__device__ __forceinline__ void store_keys(const BackwardParams& p, typename C::Smem& smem,
                                           const BackwardWork& work, typename C::Keys& acc_dk,
                                           typename C::Keys& acc_dv) {
  using Element = typename C::Element;
  const int row = tile::warp() / C::tile.share * C::tile.keys;
  const int col = tile::warp() % C::tile.share * C::kChannels;
  __syncthreads();  // the last dQ = dS K has read K
  tile::scale(acc_dk, p.scale / ds_scale_of<C>(p));
  if constexpr (C::Score::kDrops)
    tile::scale(acc_dv, 1.f / (1.f - p.problem.forward.dropout.probability));
  tile::store(smem.k, row, acc_dk, col);
  tile::store(smem.v, row, acc_dv, col);
  __syncthreads();
  constexpr int kRows = C::tile.tile_n / C::kWarps;
  const int begin = tile::warp() * kRows;
  const auto store = [&](const auto& tile, const TensorView& x, bool wide) {
    Element* first = cuda::first_row<Element>(x, work.at.k, work.head_k);
    tile::store_rows(tile, begin, begin + kRows, wide, static_cast<int>(x.head_dim()), [&](int r) {
      return work.key0 + r < work.at.k.length ? first + (work.key0 + r) * x.seqlen_stride()
                                              : nullptr;
    });
  };
  store(smem.k, p.problem.dk, p.dk_wide);
  store(smem.v, p.problem.dv, p.dv_wide);
}

template <class C>
__device__ __forceinline__ void differentiate_keys(const BackwardParams& p, typename C::Smem& smem,
                                                   const BackwardWork& work) {
  using Element = typename C::Element;
  constexpr int kShare = C::tile.share;
  const ForwardProblem& f = p.problem.forward;
  const int key_row = tile::warp() / kShare * C::tile.keys;
  const int part = tile::warp() % kShare;
  const float ds_scale = ds_scale_of<C>(p);
  typename C::Keys acc_dk, acc_dv;
  acc_dk.clear();
  acc_dv.clear();

  const auto load_keys = [&](auto& tile, const ConstTensorView& x, bool wide) {
    const auto rows = cuda::key_rows<Element>(f, x, work.at, work.head_k);
    tile::load_rows<C::kThreads>(tile, wide, static_cast<int>(x.head_dim()), [&](int r) {
      const int key = work.key0 + r;
      return key < rows.length && key_valid(f.intervals, work.at, key)
                 ? rows.first + key * rows.stride
                 : nullptr;
    });
  };
  load_keys(smem.k, f.k, p.k_wide);
  load_keys(smem.v, f.v, p.v_wide);
  std::uint32_t present = 0;  // a bit for each of this lane's keys
  for (int slot = 0; slot < 2 * C::kM; ++slot) {
    const int key = work.key0 + key_row + tile::slot_row(slot);
    if (key < work.at.k.length && key_valid(f.intervals, work.at, key)) present |= 1u << slot;
  }
  const bool holes =
      f.intervals.bits != nullptr && __syncthreads_or(present != (1u << 2 * C::kM) - 1);

  find_steps<C>(p, smem, work);
  Step step = settle<C>(p, smem, work, {0, smem.first_tile});
  if (smem.last_tile < 0) step.head = p.group;
  if (step.head < p.group) load_step<C>(p, smem, work, step, 0);
  for (int stage = 0; step.head < p.group; stage = C::tile.stages == 2 ? stage ^ 1 : 0) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tiles are here; those of the step before have been used
    const Step next = settle<C>(p, smem, work, {step.head, step.m_tile + 1});
    if (C::tile.stages == 2 && next.head < p.group) load_step<C>(p, smem, work, next, stage ^ 1);

    const cuda::TileLimits limits = limits_of(p, work, step.m_tile);
    const bool boundary = !C::Score::kLocal || holes || limits.all_first > work.key0 ||
                          limits.all_end < work.key0 + C::tile.tile_n;
    const typename C::Score score(p.problem, work.at, p.scale);
    const cuda::Place first{step.m_tile * C::tile.tile_m, work.head_k * p.group + step.head};
    const int first_col = part * C::kScoreCols;
    typename C::Scores acc_s, acc_dp;
    acc_s.clear();
    acc_dp.clear();
    tile::matmul_nt(acc_s, smem.k, key_row, smem.q[stage], first_col);      // S^T = K Q^T
    tile::matmul_nt(acc_dp, smem.v, key_row, smem.dout[stage], first_col);  // dP^T = V dO^T
    differentiate<C>(p, smem, work, score, boundary, first, work.key0 + key_row, present, first_col,
                     stage, acc_s, acc_dp);
    if constexpr (C::kBounded) tile::scale(acc_dp, ds_scale);
    tile::store(smem.p, key_row, acc_s, first_col);
    tile::store(smem.ds, key_row, acc_dp, first_col);
    __syncthreads();  // P and dS are complete
    tile::matmul_nn(acc_dv, smem.p, key_row, smem.dout[stage],
                    part * C::kChannels);                                           // dV += P^T dO
    tile::matmul_nn(acc_dk, smem.ds, key_row, smem.q[stage], part * C::kChannels);  // dK += dS^T Q
    typename C::Queries acc_dq;
    acc_dq.clear();
    tile::matmul_tn(acc_dq, smem.ds, tile::warp() / C::kQueryParts * 16, smem.k,
                    tile::warp() % C::kQueryParts * C::kQueryChannels);  // dQ = dS K
    add_queries<C>(p, work, step, limits, acc_dq);
    if (C::tile.stages == 1 && next.head < p.group) {
      __syncthreads();  // Q and dO have been used
      load_step<C>(p, smem, work, next, 0);
    }
    step = next;
  }
  ptx::cp_async_wait<0>();
  store_keys<C>(p, smem, work, acc_dk, acc_dv);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    backward(const __grid_constant__ BackwardParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(shared);
  const int heads_k = static_cast<int>(p.problem.forward.k.heads());
  const int item = static_cast<int>(blockIdx.x / p.n_tiles);
  BackwardWork work{};
  work.at = slice_of(p.problem.forward, item / heads_k);
  work.head_k = item % heads_k;
  work.n_tile = static_cast<int>(blockIdx.x % p.n_tiles);
  work.key0 = work.n_tile * C::tile.tile_n;
  if (work.key0 >= work.at.k.length) return;
  differentiate_keys<C>(p, smem, work);
}

}  // namespace heed::sm80
