// The Hopper backward where each of two warpgroups has 64 of the item's 128 keys.
//
// P and dS of its keys are left operands as they stand in the registers. dQ needs the dS of both,
// which passes through shared memory; each computes half of its rows or a part of its channels.
// A step of a warpgroup, and what runs under what, where it has 64 query rows:
//
//   tensor cores   S ------ dP ------        dV --------           dQ ------ dK ------
//   the others            | P ----- |       | dS --- | barrier             | dQ leaves
//
// Where it has 128, there are as many exponentials as products can hide, if they begin sooner. The
// rows' halves take turns:
//
//   tensor cores   S0 -- S1 -- dP0 --      dV0 -- dP1 --       dV1 --           dQ ------ dK ------
//   the others         | P0 -------- |    | dS0 | P1 ------- |     | dS1 | barrier      | dQ leaves
#pragma once

#include "cuda/sm90/backward_consumer.cuh"

namespace heed::sm90 {

template <class C>
struct ByKeys : BackwardConsumer<C> {
  using Base = BackwardConsumer<C>;
  using Base::acc_dk, Base::acc_dv, Base::acc_s, Base::phase, Base::smem;
  using Base::kFragments, Base::kQueryTileBytes, Base::kScoreTileBytes;
  using typename Base::Element, typename Base::RowPairs;
  using Slopes = tile::Operand<1, kFragments / 2>;
  static constexpr int kHalves = C::tile.tile_m / 64;

  // Of the warpgroup's keys, its rows or channels of dQ, and of stage 0.
  tile::Descriptor k_rows, v_rows, k_channels, q_rows, q_columns, dout_rows, dout_columns, ds;

  __device__ __forceinline__ ByKeys(const BackwardParams& params, typename C::Smem& shared,
                                    int consumer)
      : Base(params, shared, consumer),
        k_rows(shared.k.by_rows(64 * consumer)),
        v_rows(shared.v.by_rows(64 * consumer)),
        k_channels(tile::columns_from<typename C::KeyTile>(
            shared.k.by_columns(), C::kQueryParts == 1 ? 0 : consumer * C::kQueryChannels)),
        q_rows(shared.q[0].by_rows()),
        q_columns(shared.q[0].by_columns()),
        dout_rows(shared.dout[0].by_rows()),
        dout_columns(shared.dout[0].by_columns()),
        ds(tile::columns_from<typename C::ScoreTile>(shared.steps.ds[0].by_columns(),
                                                     C::kQueryParts == 1 ? 64 * consumer : 0)) {}

  // The step of a stage; whether another one of the item follows. Stages are numbered at compile
  // time: with a stage in a register every product would begin with a dozen instructions for its
  // descriptors.
  template <int kStage>
  __device__ __forceinline__ bool visit() {
    smem.q_full[kStage].wait(phase);
    smem.dout_full[kStage].wait(phase);
    // Words of shared memory that are asked for behind a product wait for it.
    const bool last = smem.visits[kStage].last;
    Slopes slopes[kHalves];
    if constexpr (kHalves == 2)
      differentiate_halves<kStage>(slopes);
    else
      differentiate_whole<kStage>(slopes[0]);
    ptx::fence_async_proxy();
    sync_consumers();  // both have written dS
    tile::wait_matmul<0>(acc_dv);
    typename C::Queries acc_dq;
    tile::begin_matmul_tn<typename C::ScoreTile, typename C::KeyTile>(
        acc_dq, ds + kStage * kScoreTileBytes, k_channels);
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      tile::begin_matmul_nn<typename C::QueryTile>(acc_dk, slopes[half],
                                                   rows_of(q_columns, kStage, half));
    this->release(smem.dout_empty[kStage]);
    tile::wait_matmul<kHalves>(acc_dq);
    this->put_queries(smem.visits[kStage], acc_dq);
    tile::wait_matmul<0>(acc_dk);
    this->release(smem.q_empty[kStage]);
    return !last;
  }

  // Of stage 0, to 64 rows of Q or dO of a stage.
  static __device__ __forceinline__ tile::Descriptor rows_of(tile::Descriptor first, int stage,
                                                             int half) {
    return first + (stage * kQueryTileBytes + C::QueryTile::after_rows(64 * half));
  }
  // K or V times 64 rows of Q or dO.
  __device__ __forceinline__ void begin_rows(typename C::Scores& acc, tile::Descriptor keys,
                                             tile::Descriptor rows) {
    tile::begin_matmul_nt<typename C::KeyTile, typename C::QueryTile>(acc, keys, rows);
  }
  // P^T dO of 64 rows.
  __device__ __forceinline__ void begin_values(const typename C::Scores& weights,
                                               tile::Descriptor dout) {
    tile::begin_matmul_nn<typename C::QueryTile>(acc_dv, tile::to_operand<Element>(weights), dout);
  }
  // dS of 64 rows of a stage, rounded, and to where both warpgroups read it.
  __device__ __forceinline__ Slopes share(typename C::ScoreTile& ds_of_all, int half,
                                          const typename C::Scores& acc_ds) {
    const Slopes slopes = tile::to_operand<Element>(acc_ds);
    tile::store_matrices(ds_of_all, this->warp_key(), slopes, half * kFragments);
    return slopes;
  }

  template <int kStage>
  __device__ __forceinline__ void differentiate_whole(Slopes& slopes) {
    const typename C::Rows& rows = smem.rows[kStage];
    const typename C::Visit visit = smem.visits[kStage];
    const RowPairs lse = this->load_pairs(rows.lse_log2);
    begin_rows(acc_s, k_rows, rows_of(q_rows, kStage, 0));
    this->template clear_missing_queries<kStage>(visit.rows, phase);
    typename C::Scores acc_dp;
    begin_rows(acc_dp, v_rows, rows_of(dout_rows, kStage, 0));
    tile::wait_matmul<1>(acc_s);
    this->exponentiate(acc_s, lse);
    if (!visit.inside) this->hide(acc_s, rows);
    const RowPairs delta = this->load_pairs(rows.delta);
    tile::wait_matmul<0>(acc_dp);
    begin_values(acc_s, rows_of(dout_columns, kStage, 0));
    this->differentiate(acc_s, delta, acc_dp);
    slopes = share(smem.steps.ds[kStage], 0, acc_dp);
  }

  template <int kStage>
  __device__ __forceinline__ void differentiate_halves(Slopes (&slopes)[kHalves]) {
    const typename C::Rows& rows = smem.rows[kStage];
    const typename C::Visit visit = smem.visits[kStage];
    const RowPairs lse = this->load_pairs(rows.lse_log2);
    const RowPairs lse1 = this->template load_pairs<kFragments>(rows.lse_log2);
    begin_rows(acc_s, k_rows, rows_of(q_rows, kStage, 0));
    typename C::Scores acc_s1;
    begin_rows(acc_s1, k_rows, rows_of(q_rows, kStage, 1));
    this->template clear_missing_queries<kStage>(visit.rows, phase);
    typename C::Scores acc_dp;
    begin_rows(acc_dp, v_rows, rows_of(dout_rows, kStage, 0));
    const RowPairs delta = this->load_pairs(rows.delta);
    tile::wait_matmul<2>(acc_s);
    this->exponentiate(acc_s, lse);
    if (!visit.inside) this->hide(acc_s, rows);
    begin_values(acc_s, rows_of(dout_columns, kStage, 0));
    tile::wait_matmul<1>(acc_dp);
    this->differentiate(acc_s, delta, acc_dp);
    slopes[0] = share(smem.steps.ds[kStage], 0, acc_dp);
    const RowPairs delta1 = this->template load_pairs<kFragments>(rows.delta);
    typename C::Scores acc_dp1;
    begin_rows(acc_dp1, v_rows, rows_of(dout_rows, kStage, 1));
    tile::wait_matmul<2>(acc_s1);
    this->exponentiate(acc_s1, lse1);
    if (!visit.inside) this->template hide<kFragments>(acc_s1, rows);
    begin_values(acc_s1, rows_of(dout_columns, kStage, 1));
    tile::wait_matmul<1>(acc_dp1);
    this->differentiate(acc_s1, delta1, acc_dp1);
    slopes[1] = share(smem.steps.ds[kStage], 1, acc_dp1);
  }
};

}  // namespace heed::sm90
