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
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/warpgroup.cuh"

namespace heed::sm90 {

using cuda::BackwardWork, cuda::Step;

// An item, in shared memory.
struct BackwardItem {
  BackwardWork work;
  bool holes;  // keys are missing
  bool last;   // there is no such item
};

template <class ElementType, BackwardTile kTile, class ScorePolicy>
struct BackwardConfig {
  using Element = ElementType;
  using Score = ScorePolicy;
  static constexpr BackwardTile tile = kTile;
  static constexpr bool kBounded = std::is_same_v<Element, f16>;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  // Registers of a thread: no more in all than the 168 that every thread starts with.
  static constexpr int kProducerRegisters = tile.head_dim > 128 ? 24 : 40;
  static constexpr int kConsumerRegisters = tile.head_dim > 128 ? 240 : 232;
  // Consumers divide the keys, 64 for each; or, where dK and dV of 64 keys take the registers of
  // both, the query rows of the scores and the channels of everything else.
  static constexpr bool kByKeys = tile.tile_n == 64 * kConsumers;
  static constexpr int kScoreRows = kByKeys ? tile.tile_m : tile.tile_m / kConsumers;
  static constexpr int kKeyChannels = kByKeys ? tile.head_dim : 128;
  // dQ: of a warp 16 query rows, of a consumer half of the rows or a part of the channels, maybe
  // more than there are.
  static constexpr int kWarps = 4 * kConsumers;
  static constexpr int kQueryM = 1;
  static constexpr int kQueryParts = tile.tile_m == 64 * kConsumers ? 1 : kConsumers;
  static constexpr int kQueryChannels = !kByKeys ? 128 : kQueryParts == 1 ? tile.head_dim : 64;
  static constexpr int kLastChannels = tile.head_dim - (kQueryParts - 1) * kQueryChannels;
  static constexpr int kQueryFloats = tile.tile_m * kQueryParts * kQueryChannels;
  static constexpr int kWriters = kConsumers;  // to a tile of dq, of an item
  static constexpr int kWarpFloats = 16 * kQueryM * kQueryChannels;
  // There is room for dQ in shared memory, from where the copy engine adds it up.
  static constexpr bool kBulkSums = kByKeys;
  static constexpr int kItems = 2;  // found and not finished
  static constexpr int kSoon = 4;   // steps of the last query head, before which the next is taken

  using KeyTile = tile::PanelTile<Element, tile.tile_n, tile.head_dim>;
  using QueryTile = tile::PanelTile<Element, tile.tile_m, tile.head_dim>;
  using ScoreTile = tile::PanelTile<Element, tile.tile_n, tile.tile_m>;
  // Of 64 query rows where there are more.
  using Scores = tile::Accumulator<1, (kScoreRows < 64 ? kScoreRows : 64) / 8>;
  using KeyGradients = tile::Accumulator<1, kKeyChannels / 8>;
  using Queries = tile::Accumulator<1, kQueryChannels / 8>;
  using RoundedQueries = tile::PanelTile<Element, tile.tile_m, kQueryParts * kQueryChannels>;

  struct Rows {
    float lse_log2[tile.tile_m];
    float delta[tile.tile_m];
    RowLimits limits[tile.tile_m];  // of a row that is not there: none
  };
  // What a consumer must know of a step.
  struct Visit {
    int sums;     // the tile of dq that dQ is added to
    int turn;     // as cuda::turn_of()
    int rows;     // from the tile's first one to the entry's end
    bool inside;  // every row sees all keys of the item, and none is missing
    bool last;    // of the item
  };
  // What is known of dQ on its way out.
  struct Leaving {
    int sums, turn;  // as in Visit; sums < 0: nothing is, and nothing comes
  };
  struct Nothing {};
  struct SharedWeights {
    ScoreTile at[tile.stages];
  };
  struct SharedSums {
    float of[kConsumers][4][kWarpFloats];  // of a warp
  };
  // What passes from consumer to consumer in a step.
  struct Steps {
    [[no_unique_address]] std::conditional_t<kByKeys, Nothing, SharedWeights> weights;
    ScoreTile ds[tile.stages];
  };
  // dk and dv on their way out, in its place: both together where there is room.
  static constexpr int kOutTiles = sizeof(Steps) >= 2 * sizeof(KeyTile) ? 2 : 1;
  struct Smem {
    KeyTile k, v;
    QueryTile q[tile.stages], dout[tile.stages];
    union {
      Steps steps;
      KeyTile out[kOutTiles];
    };
    [[no_unique_address]] std::conditional_t<kBulkSums, SharedSums, Nothing> sums;
    alignas(16) Rows rows[tile.stages];
    Visit visits[tile.stages];
    Leaving leaving[kConsumers];
    BackwardItem items[kItems];
    ptx::Barrier item_full[kItems], item_soon[kItems], item_empty[kItems];
    ptx::Barrier keys_full, keys_empty;
    ptx::Barrier q_full[tile.stages], q_empty[tile.stages];  // of Q, its rows and the step
    ptx::Barrier dout_full[tile.stages], dout_empty[tile.stages];
    ptx::Barrier sums_full[kConsumers], sums_empty[kConsumers];
    float ds_scale;  // what dS is multiplied by before it is rounded
    // Of an item, of a consumer, which writes it itself: the compiler knows of what is read here,
    // unlike of what loops carry, that it is the same in every lane.
    int first_stage[kConsumers];
  };
  static_assert(tile.stages == 2 && (kByKeys || tile.tile_n == 64));
  static_assert(Score::kScaled);
  static_assert(sizeof(Steps) >= sizeof(KeyTile));
  static_assert(sizeof(Smem) <= 227 * 1024, "the tile does not fit in shared memory");
};

struct BackwardParams {
  CUtensorMap q, dout, k, v, dk, dv;
  cuda::BackwardParams base;
  float scale_log2e;
  int items;
  bool bulk_gradients;  // the copy engine may write dk and dv
};

__device__ __forceinline__ ptx::BoxStart first_key(const BackwardWork& work) {
  return {0, static_cast<int>(work.at.k.token) + work.key0, work.head_k,
          static_cast<int>(work.at.k.batch)};
}

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

// A warpgroup, and what it keeps from step to step and from item to item.
template <class C>
struct BackwardConsumer {
  using Smem = typename C::Smem;
  using Element = typename C::Element;
  static constexpr int kQueryTileBytes = sizeof(typename C::QueryTile);
  static constexpr int kScoreTileBytes = sizeof(typename C::ScoreTile);

  const BackwardParams& p;
  Smem& smem;
  int index;                            // among the consumers
  bool first_thread;                    // of the warpgroup
  tile::PipelineState<C::kItems> item;  // at hand
  int key_phase = 0;                    // of its keys' barrier
  int phase = 0;                        // of the stages' barriers
  int sums_phase = 0;                   // of those of dQ on its way out
  int pair_at;                          // bytes before a lane's first column
  typename C::Scores acc_s;
  typename C::KeyGradients acc_dk, acc_dv;

  __device__ __forceinline__ BackwardConsumer(const BackwardParams& params, Smem& shared,
                                              int consumer)
      : p(params), smem(shared), index(consumer), first_thread(threadIdx.x % 128 == 0) {
    if (first_thread) smem.first_stage[index] = 0;
    pair_at = static_cast<int>(sizeof(float)) * (first_row() + tile::pair_col(0));
    asm volatile("" : "+r"(pair_at));  // or it is computed anew in every step
  }

  __device__ __forceinline__ const BackwardItem& at_hand() const { return smem.items[item.stage]; }
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
    const BackwardWork& work = at_hand().work;
    const ForwardProblem& f = p.base.problem.forward;
    if (!at_hand().holes && !has_rows_behind(work, f.k.seqlen())) [[likely]]
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
  // Whether the item's tile has rows of the tensor that are not the entry's.
  static __device__ __forceinline__ bool has_rows_behind(const BackwardWork& work,
                                                         std::int64_t seqlen) {
    return work.key0 + C::tile.tile_n > work.at.k.length &&
           work.at.k.token + work.at.k.length != seqlen;
  }

  // The same for query rows, which both consumers read: before dP, and behind the beginning of S,
  // whose columns of these rows nobody looks at.
  template <int kStage>
  __device__ __forceinline__ void clear_missing_queries(int rows, int of_phase) {
    const SideSlice& at = at_hand().work.at.q;
    if (rows >= C::tile.tile_m || at.token + at.length == p.base.problem.forward.q.seqlen())
        [[likely]]
      return;
    smem.dout_full[kStage].wait(of_phase);
    const int row = static_cast<int>(threadIdx.x) % 128;
    if (row >= rows && row < C::tile.tile_m) {
      if (index == 0)
        clear_row(smem.q[kStage], row);
      else
        clear_row(smem.dout[kStage], row);
    }
    ptx::fence_async_proxy();
    ptx::named_sync<2, 256>();
  }

  // Of 64 query rows, of a lane's columns.
  static constexpr int kFragments = C::kScoreRows < 64 ? C::kScoreRows / 8 : 8;
  struct RowPairs {
    float2 at[kFragments];
  };
  template <int kFirst = 0>
  __device__ __forceinline__ RowPairs load_pairs(const float* rows) const {
    RowPairs pairs;
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      pairs.at[n] = *reinterpret_cast<const float2*>(reinterpret_cast<const char*>(rows) + pair_at +
                                                     32 * (kFirst + n));
    return pairs;
  }

  // S^T becomes P^T.
  __device__ __forceinline__ void exponentiate(typename C::Scores& s, const RowPairs& lse) {
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s.at[0][n][i];
        x = ptx::exp2(fmaf(x, p.scale_log2e, -(i % 2 == 0 ? lse.at[n].x : lse.at[n].y)));
      }
  }
  // P is 0 where a row does not see the key.
  template <int kFirst = 0>
  __device__ __forceinline__ void hide(typename C::Scores& s, const typename C::Rows& rows) {
    const BackwardWork& work = at_hand().work;
    const bool holes = at_hand().holes;
    int key[2];
    for (int slot = 0; slot < 2; ++slot) {
      key[slot] = work.key0 + warp_key() + tile::slot_row(slot);
      if (holes && !key_valid(p.base.problem.forward.intervals, work.at, key[slot]))
        key[slot] = INT_MAX;
    }
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
      const int4 limits =
          *reinterpret_cast<const int4*>(&rows.limits[first_row() + tile::pair_col(kFirst + n)]);
      float(&x)[4] = s.at[0][n];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first = i % 2 == 0 ? limits.x : limits.z, end = i % 2 == 0 ? limits.y : limits.w;
        if (key[i / 2] < first || key[i / 2] >= end) x[i] = 0.f;
      }
    }
  }

  // dP^T becomes dS^T.
  __device__ __forceinline__ void differentiate(const typename C::Scores& s, const RowPairs& delta,
                                                typename C::Scores& acc_dp) const {
    const float scale = C::kBounded ? smem.ds_scale : 1.f;
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = acc_dp.at[0][n][i];
        x = s.at[0][n][i] * (x - (i % 2 == 0 ? delta.at[n].x : delta.at[n].y));
        if constexpr (C::kBounded) x *= scale;
      }
  }

  // Without channels that are not there: reductions are what dQ costs.
  __device__ __forceinline__ void add_channels(float* base, const typename C::Queries& acc) const {
    if constexpr (C::kLastChannels < C::kQueryChannels)
      if (index == C::kQueryParts - 1) return tile::add_to_global<C::kLastChannels / 8>(base, acc);
    tile::add_to_global(base, acc);
  }
  // Where a warp's dQ is among those of a tile.
  static __device__ __forceinline__ int warp_sums(int consumer, int warp) {
    return (C::kQueryParts == 1 ? 4 * consumer + warp : warp * C::kQueryParts + consumer) *
           C::kWarpFloats;
  }
  // By way of shared memory, without waiting for a reduction.
  __device__ __forceinline__ void put_queries(const typename C::Visit& visit,
                                              const typename C::Queries& acc) {
    smem.sums_empty[index].wait(sums_phase ^ 1);
    sums_phase ^= 1;
    tile::store_in_order(smem.sums.of[index][static_cast<int>(threadIdx.x) % 128 / 32], acc);
    if (first_thread) smem.leaving[index] = {visit.sums, visit.turn};
    __syncwarp();
    release(smem.sums_full[index]);
  }
  // From the registers.
  __device__ __forceinline__ void add_queries(const typename C::Visit& visit,
                                              const typename C::Queries& acc) {
    float* base = p.base.dq + std::int64_t{visit.sums} * C::kQueryFloats +
                  warp_sums(index, static_cast<int>(threadIdx.x) % 128 / 32);
    if (p.base.turns == nullptr) return add_channels(base, acc);
    int* counter = p.base.turns + std::int64_t{visit.sums} * C::kWriters + index;
    if (first_thread) cuda::wait_for_turn(counter, visit.turn);
    sync_consumer(index);
    add_channels(base, acc);
    sync_consumer(index);
    if (first_thread) cuda::pass_turn(counter);
  }

  // The steps of the item from `stage` on, by Consumer's visit<kStage>(), which says whether
  // another one follows. The stage of the next item's first step.
  template <class Consumer>
  static __device__ __forceinline__ int visit_all(Consumer& consumer, int stage) {
#pragma unroll 1
    for (;; stage = 0) {
      if (stage == 0 && !consumer.template visit<0>()) return 1;
      const bool more = consumer.template visit<1>();
      consumer.phase ^= 1;
      if (!more) return 0;
    }
  }

  // All items, by Consumer's visit() and, where a step begins with S complete, begin().
  template <class Consumer>
  static __device__ __forceinline__ void attend_all(Consumer& consumer) {
    Smem& smem = consumer.smem;
    int& first_stage = smem.first_stage[consumer.index];
    const bool leads = consumer.index == 0 && consumer.first_thread;
#pragma unroll 1
    for (;; consumer.item.advance(), consumer.key_phase ^= 1) {
      if (leads) ptx::wait_stores_read();
      sync_consumers();  // the item before has left
      smem.item_full[consumer.item.stage].wait(consumer.item.phase);
      const BackwardItem& item = consumer.at_hand();
      if (item.last) break;
      smem.keys_full.wait(consumer.key_phase);
      consumer.acc_dk.clear();
      consumer.acc_dv.clear();
      consumer.clear_missing_keys();
      if (item.work.range.first_tile <= item.work.range.last_tile) {
        const int stage = *static_cast<const volatile int*>(&first_stage);
        if constexpr (!C::kByKeys) consumer.begin(stage);
        const int next = visit_all(consumer, stage);
        if (consumer.first_thread) first_stage = next;
      }
      sync_consumers();  // both have read K, V and dS
      if (leads) smem.keys_empty.arrive();
      consumer.store_keys(leads);
      __syncwarp();
      consumer.release(smem.item_empty[consumer.item.stage]);
    }
    if constexpr (C::kBulkSums) {
      smem.sums_empty[consumer.index].wait(consumer.sums_phase ^ 1);
      if (consumer.first_thread) smem.leaving[consumer.index].sums = -1;
      __syncwarp();
      consumer.release(smem.sums_full[consumer.index]);
    }
  }

  // dk and dv of the consumer's keys and channels. A tile that is all there leaves by the copy
  // engine.
  __device__ __forceinline__ void store_keys(bool leads) {
    const BackwardWork& work = at_hand().work;
    tile::scale(acc_dk, p.base.scale / smem.ds_scale);
    if (!p.bulk_gradients || has_rows_behind(work, p.base.problem.dk.seqlen())) {
      store(p.base.problem.dv, p.base.dv_wide, acc_dv);
      store(p.base.problem.dk, p.base.dk_wide, acc_dk);
      return;
    }
    constexpr bool kTogether = C::kOutTiles == 2;
    put(smem.out[0], acc_dv);
    if constexpr (kTogether) put(smem.out[1], acc_dk);
    ptx::fence_async_proxy();
    sync_consumers();
    if (leads) {
      smem.out[0].store(0, p.dv, first_key(work));
      if constexpr (kTogether) smem.out[1].store(0, p.dk, first_key(work));
      ptx::store_commit();
    }
    if constexpr (kTogether) return;
    if (leads) ptx::wait_stores_read();
    sync_consumers();
    put(smem.out[0], acc_dk);
    ptx::fence_async_proxy();
    sync_consumers();
    if (!leads) return;
    smem.out[0].store(0, p.dk, first_key(work));
    ptx::store_commit();
  }
  __device__ __forceinline__ void put(typename C::KeyTile& out,
                                      const typename C::KeyGradients& acc) const {
    tile::store_matrices(out, warp_key(), acc, C::kByKeys ? 0 : C::kKeyChannels / 8 * index);
  }
  __device__ __forceinline__ void store(const TensorView& x, bool wide,
                                        const typename C::KeyGradients& acc) const {
    const BackwardWork& work = at_hand().work;
    const int channel = C::kByKeys ? 0 : C::kKeyChannels * index;
    Element* first = cuda::first_row<Element>(x, work.at.k, work.head_k) + channel;
    tile::store_global<Element>(acc, wide, static_cast<int>(x.head_dim()) - channel, [&](int slot) {
      const int row = work.key0 + warp_key() + tile::slot_row(slot);
      return row < work.at.k.length ? first + row * x.seqlen_stride() : nullptr;
    });
  }
};

}  // namespace heed::sm90
