// What the warpgroups of the Hopper backward have in common, however they divide the work.
//
// Scores are computed transposed, keys by query rows:
//
//   S^T = K Q^T    dP^T = V dO^T    P = exp2(S - lse)    dS = P (dP - delta)
//   dV += P^T dO   dK += dS^T Q     dQ += dS K
#pragma once

#include <climits>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/layout.hpp"
#include "cuda/common/backward_steps.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/score.cuh"
#include "cuda/host/tensor_map.hpp"
#include "cuda/sm90/tiles.hpp"
#include "cuda/tile/warpgroup.cuh"

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
  // Consumers divide the keys, 64 for each; or, where dK and dV of 64 keys take the registers of
  // both, the query rows of the scores and the channels of everything else.
  static constexpr bool kByKeys = tile.tile_n == 64 * kConsumers;
  static constexpr int kScoreRows = kByKeys ? tile.tile_m : tile.tile_m / kConsumers;
  static constexpr int kKeyChannels = kByKeys ? tile.head_dim : 128;
  // dQ: of a warp 16 query rows, of a consumer a part of the channels, maybe more than there are.
  static constexpr int kWarps = 4 * kConsumers;
  static constexpr int kQueryM = 1;
  static constexpr int kQueryParts = kConsumers;
  static constexpr int kQueryChannels = kByKeys ? (tile.head_dim <= 64 ? 32 : 64) : 128;
  static constexpr int kLastChannels = tile.head_dim - (kQueryParts - 1) * kQueryChannels;
  static constexpr int kQueryFloats = tile.tile_m * kQueryParts * kQueryChannels;
  static constexpr int kWriters = kConsumers;  // to a tile of dq, of a CTA

  using KeyTile = tile::PanelTile<Element, tile.tile_n, tile.head_dim>;
  using QueryTile = tile::PanelTile<Element, tile.tile_m, tile.head_dim>;
  using ScoreTile = tile::PanelTile<Element, tile.tile_n, tile.tile_m>;
  using Scores = tile::Accumulator<1, kScoreRows / 8>;
  using Weights = tile::Operand<1, kScoreRows / 16>;
  struct Nothing {};
  using HeldKeys = std::conditional_t<tile.spare, tile::Operand<1, tile.head_dim / 16>, Nothing>;
  using Keys = tile::Accumulator<1, kKeyChannels / 8>;
  using Queries = tile::Accumulator<1, kQueryChannels / 8>;
  using RoundedQueries = tile::PanelTile<Element, tile.tile_m, kQueryParts * kQueryChannels>;

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
  struct SharedWeights {
    ScoreTile at[tile.stages];
  };
  struct Smem {
    KeyTile k, v;
    QueryTile q[tile.stages], dout[tile.stages];
    [[no_unique_address]] std::conditional_t<kByKeys, Nothing, SharedWeights> weights;
    ScoreTile ds[tile.stages];
    alignas(16) Rows rows[tile.stages];
    Visit visits[tile.stages];
    BackwardWork work;
    ptx::Barrier keys_full;
    ptx::Barrier q_full[tile.stages], q_empty[tile.stages];  // of Q, its rows and the step
    ptx::Barrier dout_full[tile.stages], dout_empty[tile.stages];
    int first_tile, last_tile;
    float ds_scale;  // what dS is multiplied by before it is rounded
  };
  static_assert(tile.tile_m == 64 && (kByKeys || tile.tile_n == 64));
  static_assert(Score::kScaled);
  static_assert(sizeof(Smem) <= 227 * 1024, "the tile does not fit in shared memory");
};

struct BackwardParams {
  CUtensorMap q, dout, k, v;
  cuda::BackwardParams base;
  float scale_log2e;
};

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
  int phase = 0;      // of the stages' barriers
  typename C::Scores acc_s;
  typename C::Keys acc_dk, acc_dv;

  __device__ __forceinline__ BackwardConsumer(const BackwardParams& params, Smem& shared,
                                              int consumer, bool keys_missing)
      : p(params),
        smem(shared),
        index(consumer),
        first_thread(threadIdx.x % 128 == 0),
        holes(keys_missing) {
    acc_dk.clear();
    acc_dv.clear();
  }

  // First key of the warp, and first query row of its scores, within the tiles.
  __device__ __forceinline__ int warp_key() const {
    return (C::kByKeys ? 64 * index : 0) + static_cast<int>(threadIdx.x) % 128 / 32 * 16;
  }
  __device__ __forceinline__ int first_row() const {
    return C::kByKeys ? 0 : C::kScoreRows * index;
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
    const int thread = 128 * index + static_cast<int>(threadIdx.x) % 128;
    const int row = thread % C::tile.tile_n;
    const int at_key = work.key0 + row;
    if (at_key >= work.at.k.length || !key_valid(f.intervals, work.at, at_key)) {
      if (thread / C::tile.tile_n == 0) clear_row(smem.k, row);
      if (thread / C::tile.tile_n == 1) clear_row(smem.v, row);
    }
    ptx::fence_async_proxy();
    sync_consumers();
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

  struct RowPairs {
    float2 at[C::kScoreRows / 8];  // of a lane's columns
  };
  __device__ __forceinline__ RowPairs load_pairs(const float* rows) const {
    RowPairs pairs;
#pragma unroll
    for (int n = 0; n < C::kScoreRows / 8; ++n)
      pairs.at[n] = *reinterpret_cast<const float2*>(rows + first_row() + tile::pair_col(n));
    return pairs;
  }

  // S^T becomes P^T.
  __device__ __forceinline__ void exponentiate(bool inside, const typename C::Rows& rows,
                                               const RowPairs& lse) {
#pragma unroll
    for (int n = 0; n < C::kScoreRows / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = acc_s.at[0][n][i];
        x = ptx::exp2(fmaf(x, p.scale_log2e, -(i % 2 == 0 ? lse.at[n].x : lse.at[n].y)));
      }
    if (inside && !holes) return;
    int key[2];
    for (int slot = 0; slot < 2; ++slot) {
      key[slot] = smem.work.key0 + warp_key() + tile::slot_row(slot);
      if (holes && !key_valid(p.base.problem.forward.intervals, smem.work.at, key[slot]))
        key[slot] = INT_MAX;
    }
#pragma unroll
    for (int n = 0; n < C::kScoreRows / 8; ++n) {
      const int4 limits =
          *reinterpret_cast<const int4*>(&rows.limits[first_row() + tile::pair_col(n)]);
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
                                                typename C::Scores& acc_dp) const {
#pragma unroll
    for (int n = 0; n < C::kScoreRows / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = acc_dp.at[0][n][i];
        x = acc_s.at[0][n][i] * (x - (i % 2 == 0 ? delta.at[n].x : delta.at[n].y));
      }
    if constexpr (C::kBounded) tile::scale(acc_dp, smem.ds_scale);
  }

  // Without channels that are not there: reductions are what dQ costs.
  __device__ __forceinline__ void add_channels(float* base, const typename C::Queries& acc) const {
    if constexpr (C::kLastChannels < C::kQueryChannels)
      if (index == C::kQueryParts - 1) return tile::add_to_global<C::kLastChannels / 8>(base, acc);
    tile::add_to_global(base, acc);
  }
  __device__ __forceinline__ void add_queries(int sums, int turn, const typename C::Queries& acc) {
    const int warp = static_cast<int>(threadIdx.x) % 128 / 32 * C::kQueryParts + index;
    float* base =
        p.base.dq + std::int64_t{sums} * C::kQueryFloats + warp * (16 * C::kQueryChannels);
    if (p.base.turns == nullptr) return add_channels(base, acc);
    int* counter = p.base.turns + std::int64_t{sums} * C::kWriters + index;
    if (first_thread) cuda::wait_for_turn(counter, turn);
    sync_consumer(index);
    add_channels(base, acc);
    sync_consumer(index);
    if (first_thread) cuda::pass_turn(counter);
  }

  // All steps, by Consumer's visit<kStage>(), which returns false where there is none.
  template <class Consumer>
  static __device__ __forceinline__ void visit_all(Consumer& consumer) {
    [&]<int... kStage>(std::integer_sequence<int, kStage...>) {
#pragma unroll 1
      while ((consumer.template visit<kStage>() && ...)) consumer.phase ^= 1;
    }
    (std::make_integer_sequence<int, C::tile.stages>());
  }

  // dk and dv of the consumer's keys and channels.
  __device__ __forceinline__ void store_keys() {
    store(p.base.problem.dk, p.base.dk_wide, acc_dk, p.base.scale / smem.ds_scale);
    store(p.base.problem.dv, p.base.dv_wide, acc_dv, 1.f);
  }
  __device__ __forceinline__ void store(const TensorView& x, bool wide, typename C::Keys& acc,
                                        float scale) const {
    const BackwardWork& work = smem.work;
    const int channel = C::kByKeys ? 0 : C::kKeyChannels * index;
    tile::scale(acc, scale);
    Element* first = cuda::first_row<Element>(x, work.at.k, work.head_k) + channel;
    tile::store_global<Element>(acc, wide, static_cast<int>(x.head_dim()) - channel, [&](int slot) {
      const int row = work.key0 + warp_key() + tile::slot_row(slot);
      return row < work.at.k.length ? first + row * x.seqlen_stride() : nullptr;
    });
  }
};

}  // namespace heed::sm90
