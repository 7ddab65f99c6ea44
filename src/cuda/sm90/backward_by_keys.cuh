// The Hopper backward where each of two warpgroups has 64 of the CTA's 128 keys.
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
  using Base::acc_dk, Base::acc_dv, Base::acc_s, Base::index, Base::phase, Base::smem;
  using Base::kQueryTileBytes, Base::kScoreTileBytes;
  using typename Base::Element, typename Base::RowPairs;

  // Of the warpgroup's keys, its channels, and of stage 0.
  tile::Descriptor k_rows, v_rows, k_channels, q_rows, q_columns, dout_rows, dout_columns, ds;
  [[no_unique_address]] typename C::HeldKeys k_held, v_held;  // of the warpgroup's keys

  __device__ __forceinline__ ByKeys(const BackwardParams& params, typename C::Smem& shared,
                                    int consumer, bool keys_missing)
      : Base(params, shared, consumer, keys_missing),
        k_rows(shared.k.by_rows(64 * consumer)),
        v_rows(shared.v.by_rows(64 * consumer)),
        k_channels(tile::columns_from<typename C::KeyTile>(shared.k.by_columns(),
                                                           consumer * C::kQueryChannels)),
        q_rows(shared.q[0].by_rows()),
        q_columns(shared.q[0].by_columns()),
        dout_rows(shared.dout[0].by_rows()),
        dout_columns(shared.dout[0].by_columns()),
        ds(shared.ds[0].by_columns()) {}

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
    this->template clear_missing_queries<kStage>(rows, of_phase);
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
    tile::store_matrices(smem.ds[kStage], this->warp_key(), slopes);
    ptx::fence_async_proxy();
    sync_consumers();  // both have written dS
    tile::wait_matmul<0>(acc_dv);
    this->release(smem.dout_empty[kStage]);
    begin_queries(acc_dq, kStage);
    tile::begin_matmul_nn<typename C::QueryTile>(acc_dk, slopes,
                                                 q_columns + kStage * kQueryTileBytes);
    if constexpr (kAhead) {  // of anything, where there is no next step
      const int next_phase = kNext == 0 ? phase ^ 1 : phase;
      smem.q_full[kNext].wait(next_phase);
      begin_scores<kNext>(smem.visits[kNext].rows, next_phase);
    }
    tile::wait_matmul<kAhead ? 2 : 1>(acc_dq);
    this->add_queries(visit.sums, visit.turn, acc_dq);
    tile::wait_matmul<0>(acc_dk);
    if constexpr (kAhead) tile::wait_matmul<0>(acc_s);
    this->release(smem.q_empty[kStage]);
    return true;
  }

  __device__ __forceinline__ void run() {
    smem.keys_full.wait(0);
    this->clear_missing_keys();
    if constexpr (C::tile.spare) {
      k_held = tile::load_matrices(smem.k, this->warp_key());
      v_held = tile::load_matrices(smem.v, this->warp_key());
      smem.q_full[0].wait(0);
      begin_scores<0>(smem.visits[0].rows, 0);
      tile::wait_matmul<0>(acc_s);
    }
    Base::visit_all(*this);
    this->store_keys();
  }
};

}  // namespace heed::sm90
