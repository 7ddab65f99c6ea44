// Backward attention on Hopper: dq, dk, dv of softmax(scale q k^T) v.
//
// One CTA owns tile_n keys of one key head and walks the tiles of query rows that see them, for
// every query head of the group: dk and dv have one writer. Two warpgroups consume, 64 keys each;
// a warp of the first warpgroup brings Q, dO and what is known of their rows. Scores are computed
// transposed, so that P and dS are left operands as they stand in the registers:
//
//   S^T = K Q^T    dP^T = V dO^T    P = exp2(S - lse)    dS = P (dP - delta)
//   dV += P^T dO   dK += dS^T Q     dQ += dS K
//
// dQ needs the dS of both consumers, which passes through shared memory; each computes a part of
// its channels and adds it up in fp32 in global memory, in the order of the registers. A step of a
// consumer, and what runs under what:
//
//   tensor cores   S ------- dP -------          dV ------------      dQ ------ dK ------
//   the others             | P ------          | dS ------ | barrier         | add dQ ---
//
// Where registers are spare, K and V stay in them, and the next S follows dK.
#pragma once

#include <array>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/layout.hpp"
#include "cuda/common/backward_launch.cuh"
#include "cuda/common/backward_steps.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/score.cuh"
#include "cuda/host/launch.hpp"
#include "cuda/host/row.hpp"
#include "cuda/host/tensor_map.hpp"
#include "cuda/sm90/tiles.hpp"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/warpgroup.cuh"
#include "registry.hpp"

namespace heed::sm90 {

using cuda::BackwardWork, cuda::Step;

template <class ElementType, BackwardTile kTile, class ScorePolicy>
struct BackwardConfig {
  using Element = ElementType;
  using Score = ScorePolicy;
  static constexpr BackwardTile tile = kTile;
  static constexpr bool kBounded = std::is_same_v<Element, f16>;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Registers of a thread: no more in all than the 168 that every thread starts with.
  static constexpr int kProducerRegisters = tile.head_dim > 96 ? 24 : 40;
  static constexpr int kConsumerRegisters = tile.head_dim > 96 ? 240 : 232;
  // dQ: of a warp 16 query rows, of a consumer a part of the channels, maybe more than there are.
  static constexpr int kWarps = 4 * kConsumers;
  static constexpr int kQueryM = 1;
  static constexpr int kQueryParts = kConsumers;
  static constexpr int kQueryChannels = tile.head_dim <= 64 ? 32 : 64;
  static constexpr int kQueryFloats = tile.tile_m * kQueryParts * kQueryChannels;
  static constexpr int kWriters = kConsumers;  // to a tile of dq, of a CTA

  using KeyTile = tile::PanelTile<Element, tile.tile_n, tile.head_dim>;
  using QueryTile = tile::PanelTile<Element, tile.tile_m, tile.head_dim>;
  using ScoreTile = tile::PanelTile<Element, tile.tile_n, tile.tile_m>;
  using Scores = tile::Accumulator<1, tile.tile_m / 8>;
  using Weights = tile::Operand<1, tile.tile_m / 16>;
  struct Nothing {};
  using HeldKeys = std::conditional_t<tile.spare, tile::Operand<1, tile.head_dim / 16>, Nothing>;
  using Keys = tile::Accumulator<1, tile.head_dim / 8>;
  using Queries = tile::Accumulator<1, kQueryChannels / 8>;

  struct Rows {
    float lse_log2[tile.tile_m];
    float delta[tile.tile_m];
    RowLimits limits[tile.tile_m];  // of a row that is not there: none
  };
  // What a consumer must know of a step.
  struct Visit {
    int sums;     // where dq is added up; -1: no step is left
    int rows;     // from the tile's first one to the entry's end
    bool inside;  // every row sees all keys of the CTA
    int turn;     // as cuda::turn_of()
  };
  struct Smem {
    KeyTile k, v;
    QueryTile q[tile.stages], dout[tile.stages];
    ScoreTile ds[tile.stages];
    alignas(16) Rows rows[tile.stages];
    Visit visits[tile.stages];
    BackwardWork work;
    ptx::Barrier keys_full;
    ptx::Barrier q_full[tile.stages], q_empty[tile.stages];  // of Q, its rows and the step
    ptx::Barrier dout_full[tile.stages], dout_empty[tile.stages];
    int first_tile, last_tile;
  };
  static_assert(tile.tile_m == 64 && tile.tile_n == 64 * kConsumers);
  static_assert(Score::kScaled);
  static_assert(sizeof(Smem) <= 227 * 1024, "the tile does not fit in shared memory");
};

struct BackwardParams {
  CUtensorMap q, dout, k, v;
  cuda::BackwardParams base;
  float scale_log2e;
};

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

// ---- consumer ----

// Named barriers: 1 and 2 join both consumers, 3 and 4 the warps of one.
__device__ __forceinline__ void sync_consumers() { ptx::named_sync<1, 256>(); }
__device__ __forceinline__ void sync_consumer(int index) {
  if (index == 0) return ptx::named_sync<3, 128>();
  ptx::named_sync<4, 128>();
}

template <class Tile>
__device__ __forceinline__ void clear_row(Tile& tile, int row) {
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk)
    *reinterpret_cast<uint4*>(tile.chunk(row, chunk)) = uint4{0, 0, 0, 0};
}

// A warpgroup, and what it keeps from step to step.
template <class C>
struct BackwardConsumer {
  using Smem = typename C::Smem;
  using Element = typename C::Element;
  static constexpr int kQueryTileBytes = sizeof(typename C::QueryTile);
  static constexpr int kScoreTileBytes = sizeof(typename C::ScoreTile);

  const BackwardParams& p;
  Smem& smem;
  int index;          // among the consumers
  bool first_thread;  // of the warpgroup
  bool holes;         // keys of the CTA are missing
  // Of the consumer's keys, the consumer's channels, and of stage 0.
  tile::Descriptor k_rows, v_rows, k_channels, q_rows, q_columns, dout_rows, dout_columns, ds;
  int phase = 0;                                              // of the stages' barriers
  [[no_unique_address]] typename C::HeldKeys k_held, v_held;  // of the consumer's keys
  typename C::Scores acc_s;
  typename C::Keys acc_dk, acc_dv;

  __device__ __forceinline__ BackwardConsumer(const BackwardParams& params, Smem& shared,
                                              int consumer, bool keys_missing)
      : p(params),
        smem(shared),
        index(consumer),
        first_thread(threadIdx.x % 128 == 0),
        holes(keys_missing),
        k_rows(shared.k.by_rows(64 * consumer)),
        v_rows(shared.v.by_rows(64 * consumer)),
        k_channels(tile::columns_from<typename C::KeyTile>(shared.k.by_columns(),
                                                           consumer * C::kQueryChannels)),
        q_rows(shared.q[0].by_rows()),
        q_columns(shared.q[0].by_columns()),
        dout_rows(shared.dout[0].by_rows()),
        dout_columns(shared.dout[0].by_columns()),
        ds(shared.ds[0].by_columns()) {
    acc_dk.clear();
    acc_dv.clear();
  }

  // First key of the warp within the tile.
  __device__ __forceinline__ int warp_row() const {
    return 64 * index + static_cast<int>(threadIdx.x) % 128 / 32 * 16;
  }
  __device__ __forceinline__ void release(ptx::Barrier& empty) {
    if (tile::lane() == 0) empty.arrive();
  }

  // 0 times whatever stands in K and V for a key that is not there must be 0. Behind the tensor's
  // last row the copy engine writes zeros.
  __device__ __forceinline__ void clear_missing_keys() {
    const BackwardWork& work = smem.work;
    const ForwardProblem& f = p.base.problem.forward;
    const bool beyond = work.key0 + C::tile.tile_n > work.at.k.length &&
                        work.at.k.token + work.at.k.length != f.k.seqlen();
    if (!holes && !beyond) [[likely]]
      return;
    const int row = 64 * index + static_cast<int>(threadIdx.x) % 64;
    const int at_key = work.key0 + row;
    if (at_key >= work.at.k.length || !key_valid(f.intervals, work.at, at_key)) {
      if (threadIdx.x % 128 < 64)
        clear_row(smem.k, row);
      else
        clear_row(smem.v, row);
    }
    ptx::fence_async_proxy();
    sync_consumer(index);
  }

  // The same for query rows, which both consumers read.
  template <int kStage>
  __device__ __forceinline__ void clear_missing_queries(int rows, int of_phase) {
    const SideSlice& at = smem.work.at.q;
    if (rows >= C::tile.tile_m || at.token + at.length == p.base.problem.forward.q.seqlen())
        [[likely]]
      return;
    smem.dout_full[kStage].wait(of_phase);
    const int row = static_cast<int>(threadIdx.x) % 64;
    if (row >= rows && threadIdx.x % 128 < 64) {
      if (index == 0)
        clear_row(smem.q[kStage], row);
      else
        clear_row(smem.dout[kStage], row);
    }
    ptx::fence_async_proxy();
    ptx::named_sync<2, 256>();
  }

  // Rows of K or V, held or in shared memory, times rows of Q or dO.
  static __device__ __forceinline__ void begin_products(typename C::Scores& acc,
                                                        const typename C::HeldKeys& held,
                                                        tile::Descriptor keys,
                                                        tile::Descriptor queries) {
    if constexpr (C::tile.spare)
      tile::begin_matmul_nt<typename C::QueryTile>(acc, held, queries);
    else
      tile::begin_matmul_nt<typename C::KeyTile, typename C::QueryTile>(acc, keys, queries);
  }

  // Stages are numbered at compile time: with a stage in a register every product would begin with
  // a dozen instructions for its descriptors. `rows`: as Visit::rows.
  template <int kStage>
  __device__ __forceinline__ void begin_scores(int rows, int of_phase) {
    clear_missing_queries<kStage>(rows, of_phase);
    begin_products(acc_s, k_held, k_rows, q_rows + kStage * kQueryTileBytes);
  }
  template <int kStage>
  __device__ __forceinline__ void begin_gradients(typename C::Scores& acc_dp) {
    smem.dout_full[kStage].wait(phase);
    begin_products(acc_dp, v_held, v_rows, dout_rows + kStage * kQueryTileBytes);
  }
  __device__ __forceinline__ void begin_queries(typename C::Queries& acc_dq, int stage) {
    tile::begin_matmul_tn<typename C::ScoreTile, typename C::KeyTile>(
        acc_dq, ds + stage * kScoreTileBytes, k_channels);
  }

  struct RowPairs {
    float2 at[C::tile.tile_m / 8];  // of a lane's columns
  };
  static __device__ __forceinline__ RowPairs load_pairs(const float* rows) {
    RowPairs pairs;
#pragma unroll
    for (int n = 0; n < C::tile.tile_m / 8; ++n)
      pairs.at[n] = *reinterpret_cast<const float2*>(rows + tile::pair_col(n));
    return pairs;
  }

  // S^T becomes P^T.
  __device__ __forceinline__ void exponentiate(bool inside, const typename C::Rows& rows,
                                               const RowPairs& lse,
                                               typename C::Scores& acc_s) const {
#pragma unroll
    for (int n = 0; n < C::tile.tile_m / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = acc_s.at[0][n][i];
        x = ptx::exp2(fmaf(x, p.scale_log2e, -(i % 2 == 0 ? lse.at[n].x : lse.at[n].y)));
      }
    if (inside && !holes) return;
    int key[2];
    for (int slot = 0; slot < 2; ++slot) {
      key[slot] = smem.work.key0 + warp_row() + tile::slot_row(slot);
      if (holes && !key_valid(p.base.problem.forward.intervals, smem.work.at, key[slot]))
        key[slot] = INT_MAX;
    }
#pragma unroll
    for (int n = 0; n < C::tile.tile_m / 8; ++n) {
      const int4 limits = *reinterpret_cast<const int4*>(&rows.limits[tile::pair_col(n)]);
      float(&x)[4] = acc_s.at[0][n];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first = i % 2 == 0 ? limits.x : limits.z, end = i % 2 == 0 ? limits.y : limits.w;
        if (key[i / 2] < first || key[i / 2] >= end) x[i] = 0.f;
      }
    }
  }

  // dP^T becomes dS^T.
  __device__ __forceinline__ void differentiate(const RowPairs& delta,
                                                const typename C::Scores& weights,
                                                typename C::Scores& acc_dp) const {
#pragma unroll
    for (int n = 0; n < C::tile.tile_m / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = acc_dp.at[0][n][i];
        x = weights.at[0][n][i] * (x - (i % 2 == 0 ? delta.at[n].x : delta.at[n].y));
      }
    if constexpr (C::kBounded) tile::scale(acc_dp, cuda::ds_scale_of<C>(p.base));
  }

  __device__ __forceinline__ void add_queries(int sums, int turn, const typename C::Queries& acc) {
    const int warp = static_cast<int>(threadIdx.x) % 128 / 32 * C::kQueryParts + index;
    float* base =
        p.base.dq + std::int64_t{sums} * C::kQueryFloats + warp * (16 * C::kQueryChannels);
    if (p.base.turns == nullptr) {
      tile::add_to_global(base, acc);
      return;
    }
    int* counter = p.base.turns + std::int64_t{sums} * C::kWriters + index;
    if (first_thread) cuda::wait_for_turn(counter, turn);
    sync_consumer(index);
    tile::add_to_global(base, acc);
    sync_consumer(index);
    if (first_thread) cuda::pass_turn(counter);
  }

  __device__ __forceinline__ void store(const TensorView& x, bool wide, typename C::Keys& acc,
                                        float scale) const {
    const BackwardWork& work = smem.work;
    tile::scale(acc, scale);
    Element* first = cuda::first_row<Element>(x, work.at.k, work.head_k);
    tile::store_global<Element>(acc, wide, static_cast<int>(x.head_dim()), [&](int slot) {
      const int row = work.key0 + warp_row() + tile::slot_row(slot);
      return row < work.at.k.length ? first + row * x.seqlen_stride() : nullptr;
    });
  }

  // The step of a stage; false: there is none.
  template <int kStage>
  __device__ __forceinline__ bool visit() {
    constexpr bool kAhead = C::tile.spare;
    constexpr int kNext = (kStage + 1) % C::tile.stages;
    if constexpr (!kAhead) smem.q_full[kStage].wait(phase);
    const typename C::Visit visit = smem.visits[kStage];
    if (visit.sums < 0) return false;
    const typename C::Rows& rows = smem.rows[kStage];
    if constexpr (!kAhead) begin_scores<kStage>(visit.rows, phase);
    typename C::Scores acc_dp;
    typename C::Queries acc_dq;
    const RowPairs lse = load_pairs(rows.lse_log2);
    begin_gradients<kStage>(acc_dp);
    if constexpr (!kAhead) tile::wait_matmul<1>(acc_s);
    exponentiate(visit.inside, rows, lse, acc_s);
    const typename C::Weights weights = tile::to_operand<Element>(acc_s);
    const RowPairs delta = load_pairs(rows.delta);
    tile::wait_matmul<0>(acc_dp);
    tile::begin_matmul_nn<typename C::QueryTile>(acc_dv, weights,
                                                 dout_columns + kStage * kQueryTileBytes);
    differentiate(delta, acc_s, acc_dp);
    const typename C::Weights slopes = tile::to_operand<Element>(acc_dp);
    tile::store_matrices(smem.ds[kStage], warp_row(), slopes);
    ptx::fence_async_proxy();
    sync_consumers();  // both have written dS
    tile::wait_matmul<0>(acc_dv);
    release(smem.dout_empty[kStage]);
    begin_queries(acc_dq, kStage);
    tile::begin_matmul_nn<typename C::QueryTile>(acc_dk, slopes,
                                                 q_columns + kStage * kQueryTileBytes);
    if constexpr (kAhead) {  // of anything, where there is no next step
      const int next_phase = kNext == 0 ? phase ^ 1 : phase;
      smem.q_full[kNext].wait(next_phase);
      begin_scores<kNext>(smem.visits[kNext].rows, next_phase);
    }
    tile::wait_matmul<kAhead ? 2 : 1>(acc_dq);
    add_queries(visit.sums, visit.turn, acc_dq);
    tile::wait_matmul<0>(acc_dk);
    if constexpr (kAhead) tile::wait_matmul<0>(acc_s);
    release(smem.q_empty[kStage]);
    return true;
  }
  template <int... kStage>
  __device__ __forceinline__ void visit_all(std::integer_sequence<int, kStage...>) {
#pragma unroll 1
    while ((visit<kStage>() && ...)) phase ^= 1;
  }

  __device__ __forceinline__ void run() {
    smem.keys_full.wait(0);
    clear_missing_keys();
    if constexpr (C::tile.spare) {
      k_held = tile::load_matrices(smem.k, warp_row());
      v_held = tile::load_matrices(smem.v, warp_row());
      smem.q_full[0].wait(0);
      begin_scores<0>(smem.visits[0].rows, 0);
      tile::wait_matmul<0>(acc_s);
    }
    visit_all(std::make_integer_sequence<int, C::tile.stages>());
    store(p.base.problem.dk, p.base.dk_wide, acc_dk, p.base.scale / cuda::ds_scale_of<C>(p.base));
    store(p.base.problem.dv, p.base.dv_wide, acc_dv, 1.f);
  }
};

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
  if (threadIdx.x == 0) smem.work = work;
  __syncthreads();  // and the barriers are ready
  const int warpgroup = tile::warpgroup();
  if (warpgroup == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    if (__shfl_sync(~0u, tile::warp(), 0) == 0) load_steps<C>(p, smem);
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    BackwardConsumer<C>(p, smem, warpgroup - 1, holes).run();
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
