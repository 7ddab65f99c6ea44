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
// Reading shared memory is dear, so warps own 32 keys, and several share them: each computes a part
// of their scores, hands it over through shared memory and owns a part of the channels of dK and
// dV. dQ is added up in fp32 in global memory, in the order of the registers: by reductions in any
// order, or in the order of the key tiles where the plan is deterministic.
//
// A CTA has a multiprocessor to itself, so what hides the waits of a warp are its other warps, and
// these must not run in step: no barrier of the CTA stands in the loop. Warps say what they have
// done (Barrier) and wait only for what they need, at the latest place.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/mask.hpp"
#include "core/schedule.hpp"
#include "core/score.hpp"
#include "cuda/common/backward_steps.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/score.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/sm80/tiles.hpp"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/gemm.cuh"

namespace heed::sm80 {

using cuda::BackwardParams, cuda::BackwardWork, cuda::Step;

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
  // dQ: warps are 16 kQueryM rows each by a part of the channels.
  static constexpr int kQueryM = tile.head_dim % (16 * kWarps * 32 / tile.tile_m) == 0 ? 2 : 1;
  static constexpr int kQueryParts = kWarps * 16 * kQueryM / tile.tile_m;
  static constexpr int kQueryChannels = tile.head_dim / kQueryParts;
  static constexpr int kQueryFloats = tile.tile_m * tile.head_dim;
  static constexpr int kWriters = 1;  // to a tile of dq, of a CTA
  using Scores = tile::Accumulator<kM, kScoreCols / 8>;
  using Keys = tile::Accumulator<kM, kChannels / 8>;
  using Queries = tile::Accumulator<kQueryM, kQueryChannels / 8>;
  using KeyTile = tile::SharedTile<Element, tile.tile_n, tile.head_dim>;
  using QueryTile = tile::SharedTile<Element, tile.tile_m, tile.head_dim>;
  using RoundedQueries = QueryTile;
  using ScoreTile = tile::SharedTile<Element, tile.tile_n, tile.tile_m>;

  struct Smem {
    KeyTile k, v;  // later dK and dV
    QueryTile q[tile.stages], dout[tile.stages];
    ScoreTile p, ds;
    cuda::BackwardRow rows[tile.stages][tile.tile_m];
    ptx::Barrier arrived[tile.stages];  // Q, dO and the rows of a step are here
    ptx::Barrier complete;              // all of its dS is
    ptx::Barrier used;                  // all of its tiles have been read
    int first_tile, last_tile;
  };
  static_assert(tile.tile_m <= kThreads);
  static_assert(kWarps * 16 * kQueryM % tile.tile_m == 0 &&
                tile.head_dim % (16 * kQueryParts) == 0);
  static_assert(sizeof(Smem) <= 227 * 1024, "the tile does not fit in shared memory");
};

// Row 0 of a query head.
template <class C>
struct QueryHead {
  const typename C::Element *q, *dout;
  const cuda::BackwardRow* rows;

  __device__ __forceinline__ QueryHead(const BackwardParams& p, const BackwardWork& work,
                                       int head_of_group) {
    const int head = work.head_k * p.group + head_of_group;
    q = cuda::first_row<const typename C::Element>(p.problem.forward.q, work.at.q, head);
    dout = cuda::first_row<const typename C::Element>(p.problem.dout, work.at.q, head);
    rows = p.rows + lse_index(p.problem.forward, work.at, head, 0);
  }
};

template <class C>
__device__ __forceinline__ void load_step(const BackwardParams& p, typename C::Smem& smem,
                                          const BackwardWork& work, const QueryHead<C>& head,
                                          int m_tile, int stage) {
  using Element = typename C::Element;
  const int row0 = m_tile * C::tile.tile_m;
  const int count = work.at.q.length - row0;
  const auto load = [&](auto& tile, const Element* first, const ConstTensorView& x, bool wide) {
    const int channels = static_cast<int>(x.head_dim());
    first += row0 * x.seqlen_stride();
    if (wide) return tile::load_block<C::kThreads>(tile, first, x.seqlen_stride(), count, channels);
    tile::load_rows<C::kThreads>(tile, wide, channels, [&](int r) {
      return r < count ? first + r * x.seqlen_stride() : nullptr;
    });
  };
  load(smem.q[stage], head.q, p.problem.forward.q, p.q_wide);
  load(smem.dout[stage], head.dout, p.problem.dout, p.dout_wide);
  if (const int r = static_cast<int>(threadIdx.x); r < C::tile.tile_m)
    ptx::cp_async(ptx::shared_address(&smem.rows[stage][r]), head.rows + (r < count ? row0 + r : 0),
                  r < count);
  // Only asynchronous copies arrive by themselves.
  if (p.q_wide && p.dout_wide) {
    smem.arrived[stage].arrive_after_copies();
  } else {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    smem.arrived[stage].arrive();
  }
}

// Waits for the warps that share this one's keys.
template <class C>
__device__ __forceinline__ void sync_share() {
  constexpr int kThreads = 32 * C::tile.share;
  const int barrier = 1 + static_cast<int>(threadIdx.x) / kThreads;
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
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
                                            const Step& step, const typename C::Queries& acc) {
  const std::int64_t index = cuda::sums_index(p, work, step);
  float* base =
      p.dq + index * C::kQueryFloats + tile::warp() * (16 * C::kQueryM * C::kQueryChannels);
  if (p.turns == nullptr) {
    tile::add_to_global(base, acc);
    return;
  }
  if (threadIdx.x == 0) cuda::wait_for_turn(p.turns + index, cuda::turn_of<C>(work, step));
  __syncthreads();
  tile::add_to_global(base, acc);
  __syncthreads();
  if (threadIdx.x == 0) cuda::pass_turn(p.turns + index);
}

template <class C>
__device__ __forceinline__ void store_keys(const BackwardParams& p, typename C::Smem& smem,
                                           const BackwardWork& work, typename C::Keys& acc_dk,
                                           typename C::Keys& acc_dv) {
  using Element = typename C::Element;
  const int row = tile::warp() / C::tile.share * C::tile.keys;
  const int col = tile::warp() % C::tile.share * C::kChannels;
  __syncthreads();  // the last dQ = dS K has read K
  tile::scale(acc_dk, p.scale / cuda::ds_scale_of<C>(p));
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
                                                   BackwardWork& work) {
  using Element = typename C::Element;
  constexpr int kShare = C::tile.share;
  const ForwardProblem& f = p.problem.forward;
  const int key_row = tile::warp() / kShare * C::tile.keys;
  const int part = tile::warp() % kShare;
  typename C::Keys acc_dk, acc_dv;
  acc_dk.clear();
  acc_dv.clear();

  const auto load_keys = [&](auto& tile, const ConstTensorView& x, bool wide) {
    const auto rows = cuda::key_rows<Element>(f, x, work.at, work.head_k);
    if (wide && !cuda::may_have_holes(f))
      return tile::load_block<C::kThreads>(tile, rows.first + work.key0 * rows.stride, rows.stride,
                                           work.at.k.length - work.key0,
                                           static_cast<int>(x.head_dim()));
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

  if (threadIdx.x == 0) {
    for (ptx::Barrier& b : smem.arrived) b.init(C::kThreads);
    smem.complete.init(C::kWarps);
    smem.used.init(C::kWarps);
  }
  const auto arrive = [](ptx::Barrier& b) {
    __syncwarp();
    if (tile::lane() == 0) b.arrive();
  };
  ptx::wait_for_kernel_before();  // only inputs of the problem were read until here
  const float ds_scale = cuda::ds_scale_of<C>(p);
  if (threadIdx.x == 0) {
    smem.first_tile = INT_MAX;
    smem.last_tile = -1;
  }
  __syncthreads();  // and the barriers are ready
  work.range = cuda::find_steps<C>(p, work, static_cast<int>(threadIdx.x), C::kThreads,
                                   [&](int& first, int& last) {
                                     if (last >= 0) {
                                       atomicMin(&smem.first_tile, first);
                                       atomicMax(&smem.last_tile, last);
                                     }
                                     __syncthreads();
                                     first = smem.first_tile;
                                     last = smem.last_tile;
                                   });
  Step step = cuda::settle<C>(p.group, work, {0, work.range.first_tile, false});
  QueryHead<C> head(p, work, 0);
  const auto load = [&](const Step& from, const Step& to, int stage) {
    if (to.head != from.head) head = QueryHead<C>(p, work, to.head);
    load_step<C>(p, smem, work, head, to.m_tile, stage);
  };
  if (step.head < p.group) load({0, 0, false}, step, 0);
  for (int i = 0; step.head < p.group; ++i) {
    constexpr bool kAhead = C::tile.stages == 2;
    const int stage = kAhead ? i & 1 : 0;
    const Step next = cuda::settle<C>(p.group, work, {step.head, step.m_tile + 1, false});
    smem.arrived[stage].wait(kAhead ? i >> 1 & 1 : i & 1);

    const bool boundary = !C::Score::kLocal || holes || !step.inside;
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
    if (i > 0) smem.used.wait((i - 1) & 1);
    // The tiles of the step before are free: for the next step's Q and dO, and for P and dS.
    if (kAhead && next.head < p.group) load(step, next, stage ^ 1);
    tile::store_matrices(smem.p, key_row, acc_s, first_col);
    tile::store_matrices(smem.ds, key_row, acc_dp, first_col);
    arrive(smem.complete);
    sync_share<C>();  // P and dS of these keys are complete
    tile::matmul_nn(acc_dv, smem.p, key_row, smem.dout[stage],
                    part * C::kChannels);                                           // dV += P^T dO
    tile::matmul_nn(acc_dk, smem.ds, key_row, smem.q[stage], part * C::kChannels);  // dK += dS^T Q
    smem.complete.wait(i & 1);  // dS of the other keys is
    typename C::Queries acc_dq;
    acc_dq.clear();
    tile::matmul_tn(acc_dq, smem.ds, tile::warp() / C::kQueryParts * (16 * C::kQueryM), smem.k,
                    tile::warp() % C::kQueryParts * C::kQueryChannels);  // dQ = dS K
    arrive(smem.used);
    add_queries<C>(p, work, step, acc_dq);
    if (!kAhead && next.head < p.group) {
      smem.used.wait(i & 1);
      load(step, next, 0);
    }
    step = next;
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();  // K and V, where there was no step
  store_keys<C>(p, smem, work, acc_dk, acc_dv);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    backward(const __grid_constant__ BackwardParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(shared);
  BackwardWork work = cuda::work_at<C>(p, static_cast<int>(blockIdx.x));
  ptx::launch_dependents();
  if (work.key0 >= work.at.k.length) return ptx::wait_for_kernel_before();
  differentiate_keys<C>(p, smem, work);
}

}  // namespace heed::sm80
