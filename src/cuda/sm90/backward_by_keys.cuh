// The Hopper backward where each of two warpgroups has 64 of the item's 128 keys.
//
// P and dS of its keys are left operands as they stand in the registers. dQ needs the dS of both,
// which passes through shared memory; each computes a part of its channels. A step of a warpgroup,
// and what runs under what:
//
//   tensor cores   S ------- dP -------          dV ------------      dQ ------ dK ------
//   the others             | P ------          | dS ------ | barrier         | add dQ ---
//
// Where registers are spare, K and V stay in them, and the next S follows dK.
#pragma once

#include "cuda/sm90/backward_consumer.cuh"

namespace heed::sm90 {

template <class C>
struct ByKeys : BackwardConsumer<C> {
  using Base = BackwardConsumer<C>;
  using Base::acc_dk, Base::acc_dv, Base::acc_s, Base::phase, Base::smem;
  using Base::kQueryTileBytes, Base::kScoreTileBytes;
  using typename Base::Element, typename Base::RowPairs;

  // Of the warpgroup's keys, its channels, and of stage 0.
  tile::Descriptor k_rows, v_rows, k_channels, q_rows, q_columns, dout_rows, dout_columns, ds;
  [[no_unique_address]] typename C::HeldKeys k_held, v_held;  // of the item

  __device__ __forceinline__ ByKeys(const BackwardParams& params, typename C::Smem& shared,
                                    int consumer)
      : Base(params, shared, consumer),
        k_rows(shared.k.by_rows(64 * consumer)),
        v_rows(shared.v.by_rows(64 * consumer)),
        k_channels(tile::columns_from<typename C::KeyTile>(shared.k.by_columns(),
                                                           consumer * C::kQueryChannels)),
        q_rows(shared.q[0].by_rows()),
        q_columns(shared.q[0].by_columns()),
        dout_rows(shared.dout[0].by_rows()),
        dout_columns(shared.dout[0].by_columns()),
        ds(shared.steps.ds[0].by_columns()) {}

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
    begin_products(acc_s, k_held, k_rows, q_rows + kStage * kQueryTileBytes);
    this->template clear_missing_queries<kStage>(rows, of_phase);
  }
  template <int kStage>
  __device__ __forceinline__ void begin_gradients(typename C::Scores& acc_dp) {
    smem.dout_full[kStage].wait(phase);
    begin_products(acc_dp, v_held, v_rows, dout_rows + kStage * kQueryTileBytes);
  }
  template <int kStage>
  __device__ __forceinline__ void begin_queries(typename C::Queries& acc_dq) {
    tile::begin_matmul_tn<typename C::ScoreTile, typename C::KeyTile>(
        acc_dq, ds + kStage * kScoreTileBytes, k_channels);
  }

  // The step of a stage; whether another one of the item follows.
  template <int kStage>
  __device__ __forceinline__ bool visit() {
    constexpr bool kAhead = C::tile.spare;
    constexpr int kNext = (kStage + 1) % C::tile.stages;
    if constexpr (!kAhead) smem.q_full[kStage].wait(phase);
    const typename C::Visit visit = smem.visits[kStage];
    const typename C::Rows& rows = smem.rows[kStage];
    if constexpr (!kAhead) begin_scores<kStage>(visit.rows, phase);
    typename C::Scores acc_dp;
    typename C::Queries acc_dq;
    const RowPairs lse = this->load_pairs(rows.lse_log2);
    begin_gradients<kStage>(acc_dp);
    if constexpr (!kAhead) tile::wait_matmul<1>(acc_s);
    this->exponentiate(visit.inside, rows, lse);
    const typename C::Weights weights = tile::to_operand<Element>(acc_s);
    const RowPairs delta = this->load_pairs(rows.delta);
    tile::wait_matmul<0>(acc_dp);
    tile::begin_matmul_nn<typename C::QueryTile>(acc_dv, weights,
                                                 dout_columns + kStage * kQueryTileBytes);
    this->differentiate(delta, acc_dp);
    const typename C::Weights slopes = tile::to_operand<Element>(acc_dp);
    tile::store_matrices(smem.steps.ds[kStage], this->warp_key(), slopes);
    ptx::fence_async_proxy();
    sync_consumers();  // both have written dS
    tile::wait_matmul<0>(acc_dv);
    begin_queries<kStage>(acc_dq);
    tile::begin_matmul_nn<typename C::QueryTile>(acc_dk, slopes,
                                                 q_columns + kStage * kQueryTileBytes);
    this->release(smem.dout_empty[kStage]);
    if constexpr (kAhead) {
      const int next_phase = kNext == 0 ? phase ^ 1 : phase;
      if (!visit.last) smem.q_full[kNext].wait(next_phase);
      // Of anything, where there is no next step.
      begin_scores<kNext>(visit.last ? INT_MAX : smem.visits[kNext].rows, next_phase);
    }
    tile::wait_matmul<kAhead ? 2 : 1>(acc_dq);
    this->add_queries(visit.sums, visit.turn, acc_dq);
    tile::wait_matmul<0>(acc_dk);
    if constexpr (kAhead) tile::wait_matmul<0>(acc_s);
    this->release(smem.q_empty[kStage]);
    return !visit.last;
  }

  // S of an item's first step, where a step begins with complete ones.
  template <int kStage>
  __device__ __forceinline__ void begin_ahead() {
    smem.q_full[kStage].wait(phase);
    begin_scores<kStage>(smem.visits[kStage].rows, phase);
    tile::wait_matmul<0>(acc_s);
  }
  __device__ __forceinline__ void begin(int stage) {
    if constexpr (C::tile.spare) {
      k_held = tile::load_matrices(smem.k, this->warp_key());
      v_held = tile::load_matrices(smem.v, this->warp_key());
      stage == 0 ? begin_ahead<0>() : begin_ahead<1>();
    }
  }
};

}  // namespace heed::sm90
