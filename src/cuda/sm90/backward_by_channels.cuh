// The Hopper backward where dK and dV of 64 keys fill the registers of two warpgroups: each has all
// keys of the item and half of the channels.
//
// Of the scores a warpgroup has half of the query rows. P and dS pass through shared memory, from
// where every product reads both operands. A step of a warpgroup, and what runs under what; S of
// the next step follows dK:
//
//   tensor cores   (S) dP -----------------  dV -----------------          dQ ----- dK ---- S ----
//   the others         | P --- | barrier 1 |     | dS --- | barrier 2 |            | add dQ ------
#pragma once

#include "cuda/sm90/backward_consumer.cuh"

namespace heed::sm90 {

template <class C>
struct ByChannels : BackwardConsumer<C> {
  using Base = BackwardConsumer<C>;
  using Base::acc_dk, Base::acc_dv, Base::acc_s, Base::index, Base::phase, Base::smem;
  using Base::kQueryTileBytes, Base::kScoreTileBytes;
  using typename Base::Element, typename Base::RowPairs;

  // Of the warpgroup's query rows, its channels, and of stage 0. P and dS have one
  // panel of columns, so that theirs serve products of rows and of columns.
  tile::Descriptor k_rows, v_rows, k_channels, q_rows, q_channels, dout_rows, dout_channels;
  tile::Descriptor weights, ds;

  __device__ __forceinline__ ByChannels(const BackwardParams& params, typename C::Smem& shared,
                                        int consumer)
      : Base(params, shared, consumer),
        k_rows(shared.k.by_rows()),
        v_rows(shared.v.by_rows()),
        k_channels(tile::columns_from<typename C::KeyTile>(shared.k.by_columns(),
                                                           consumer * C::kKeyChannels)),
        q_rows(shared.q[0].by_rows(C::kScoreRows * consumer)),
        q_channels(tile::columns_from<typename C::QueryTile>(shared.q[0].by_columns(),
                                                             consumer * C::kKeyChannels)),
        dout_rows(shared.dout[0].by_rows(C::kScoreRows * consumer)),
        dout_channels(tile::columns_from<typename C::QueryTile>(shared.dout[0].by_columns(),
                                                                consumer * C::kKeyChannels)),
        weights(shared.steps.weights.at[0].by_rows()),
        ds(shared.steps.ds[0].by_rows()) {}

  // Keeps the compiler from computing the descriptors of every product once and spilling them.
  static __device__ __forceinline__ tile::Descriptor opaque(tile::Descriptor x) {
    asm volatile("" : "+r"(x.low));
    return x;
  }

  // Of anything, where the stage has no step.
  template <int kStage>
  __device__ __forceinline__ void begin_scores(bool there, int of_phase) {
    if (there) smem.q_full[kStage].wait(of_phase);
    tile::begin_matmul_nt<typename C::KeyTile, typename C::QueryTile>(
        acc_s, opaque(k_rows), opaque(q_rows) + kStage * kQueryTileBytes);
    this->template clear_missing_queries<kStage>(there ? smem.visits[kStage].rows : INT_MAX,
                                                 of_phase);
  }
  // A warp's scores to where all warps of both warpgroups read them.
  __device__ __forceinline__ void share(typename C::ScoreTile& tile,
                                        const typename C::Scores& acc) {
    tile::store_matrices(tile, this->warp_key(), tile::to_operand<Element>(acc),
                         this->first_row() / 8);
    ptx::fence_async_proxy();
    sync_consumers();
  }

  // The step of a stage, whose S is complete; whether another one of the item follows.
  template <int kStage>
  __device__ __forceinline__ bool visit() {
    constexpr int kNext = (kStage + 1) % C::tile.stages;
    const typename C::Visit visit = smem.visits[kStage];
    const typename C::Rows& rows = smem.rows[kStage];
    typename C::Scores acc_dp;
    typename C::Queries acc_dq;
    smem.dout_full[kStage].wait(phase);
    tile::begin_matmul_nt<typename C::KeyTile, typename C::QueryTile>(
        acc_dp, v_rows, dout_rows + kStage * kQueryTileBytes);
    this->exponentiate(acc_s, this->load_pairs(rows.lse_log2));
    if (!visit.inside) this->hide(acc_s, rows);
    share(smem.steps.weights.at[kStage], acc_s);
    tile::begin_matmul_nn<typename C::ScoreTile, typename C::QueryTile>(
        acc_dv, weights + kStage * kScoreTileBytes, dout_channels + kStage * kQueryTileBytes);
    const RowPairs delta = this->load_pairs(rows.delta);
    tile::wait_matmul<1>(acc_dp);
    this->differentiate(acc_s, delta, acc_dp);
    share(smem.steps.ds[kStage], acc_dp);
    tile::begin_matmul_tn<typename C::ScoreTile, typename C::KeyTile>(
        acc_dq, ds + kStage * kScoreTileBytes, k_channels);
    tile::begin_matmul_nn<typename C::ScoreTile, typename C::QueryTile>(
        acc_dk, ds + kStage * kScoreTileBytes, q_channels + kStage * kQueryTileBytes);
    begin_scores<kNext>(!visit.last, kNext == 0 ? phase ^ 1 : phase);
    tile::wait_matmul<2>(acc_dq);
    this->release(smem.dout_empty[kStage]);
    this->add_queries(visit, acc_dq);
    tile::wait_matmul<0>(acc_s);
    this->release(smem.q_empty[kStage]);
    return !visit.last;
  }

  template <int kStage>
  __device__ __forceinline__ void begin_ahead() {
    begin_scores<kStage>(true, phase);
    tile::wait_matmul<0>(acc_s);
  }
  __device__ __forceinline__ void begin(int stage) {
    stage == 0 ? begin_ahead<0>() : begin_ahead<1>();
  }
};

}  // namespace heed::sm90
