// What happens to rows of scores between two products: masks and the running softmax.
#pragma once

#include <cstdint>

#include "core/mask.hpp"
#include "core/softmax_state.hpp"
#include "cuda/ptx/mma.cuh"
#include "cuda/tile/fragment.cuh"

namespace heed::tile {

template <class Op>
__device__ __forceinline__ float reduce_quad(float x, const Op& op) {
  x = op(x, __shfl_xor_sync(~0u, x, 1));
  return op(x, __shfl_xor_sync(~0u, x, 2));
}

// Hides the columns (keys col0 + col) outside their slot's limits. Few tiles have both ends of
// their rows' keys. (A bit per column and the instruction that makes predicates of bits are shorter
// here, but take all predicates, of which the loop around needs some.)
template <int kM, int kN>
__device__ __forceinline__ void mask_slots(Accumulator<kM, kN>& acc,
                                           const RowLimits (&limits)[2 * kM], int col0) {
  const int lane_col = pair_col(0);  // columns from there on are constants
  int first[2 * kM], end[2 * kM];
  bool begins = false, ends = false;
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    first[slot] = limits[slot].first - col0 - lane_col;
    end[slot] = limits[slot].end - col0 - lane_col;
    begins = begins || limits[slot].first > col0;
    ends = ends || limits[slot].end < col0 + 8 * kN;
  }
  if (__any_sync(~0u, ends))
    for_each(acc,
             [&](int slot, int col, float& x) { x = col - lane_col < end[slot] ? x : -kInfinity; });
  if (__any_sync(~0u, begins))
    for_each(acc, [&](int slot, int col, float& x) {
      x = col - lane_col >= first[slot] ? x : -kInfinity;
    });
}
// The same with `limits` in memory, from those of the warp's first row on.
template <int kM, int kN>
__device__ __forceinline__ void mask_rows(Accumulator<kM, kN>& acc, const RowLimits* limits,
                                          int col0) {
  RowLimits row[2 * kM];
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) row[slot] = limits[slot_row(slot)];
  mask_slots(acc, row, col0);
}

// Hides the columns whose bit is clear: column c has bit (col0 + c) % 32 of word (col0 + c) / 32.
template <int kM, int kN>
__device__ __forceinline__ void mask_columns(Accumulator<kM, kN>& acc, const std::uint32_t* words,
                                             int col0) {
  for_each(acc, [&](int, int col, float& x) {
    if ((words[(col0 + col) / 32] >> (col0 + col) % 32 & 1u) == 0) x = -kInfinity;
  });
}

// Statistics of this lane's rows in log2 units: `max` is the row's, `sum` that of the lane's
// columns.
template <int kM>
struct RowSoftmax {
  static constexpr int kSlots = 2 * kM;
  // A row's old sums are rescaled only when its maximum grew by more than this (in log2): P stays
  // below 2^8, and most tiles leave the output accumulators alone.
  static constexpr float kGrowth = 8.f;
  float max[kSlots];
  float sum[kSlots];

  __device__ void clear() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      max[slot] = -kInfinity;
      sum[slot] = 0.f;
    }
  }

  // scores * scale (scale > 0) are logits in log2 units. Whether the sums before are to be
  // multiplied by `factor`, which is written only then; the same answer in the whole warp.
  template <int kN>
  __device__ __forceinline__ bool raise(Accumulator<kM, kN>& scores, float scale,
                                        float (&factor)[kSlots]) {
    float tile_max[kSlots];
#pragma unroll
    for (float& x : tile_max) x = -kInfinity;
    for_each(scores, [&](int slot, int, float& x) { tile_max[slot] = fmaxf(tile_max[slot], x); });
    bool grew = false;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      tile_max[slot] =
          scale * reduce_quad(tile_max[slot], [](float a, float b) { return fmaxf(a, b); });
      grew = grew || tile_max[slot] > max[slot] + kGrowth;
    }
    if (!__any_sync(~0u, grew)) return false;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const float larger = fmaxf(max[slot], tile_max[slot]);
      factor[slot] = larger == -kInfinity ? 1.f : ptx::exp2(max[slot] - larger);
      max[slot] = larger;
      sum[slot] *= factor[slot];
    }
    return true;
  }

  // After raise: the scores become exp2(logit - max).
  template <int kN>
  __device__ __forceinline__ void exponentiate(Accumulator<kM, kN>& scores, float scale) {
    float shift[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      shift[slot] = max[slot] == -kInfinity ? 0.f : -max[slot];
    for_each(scores, [&](int slot, int, float& x) {
      x = ptx::exp2(fmaf(x, scale, shift[slot]));
      sum[slot] += x;
    });
  }

  template <int kN, int kOut>
  __device__ __forceinline__ void update(Accumulator<kM, kN>& scores, float scale,
                                         Accumulator<kM, kOut>& out) {
    float factor[kSlots];
    if (raise(scores, scale, factor)) scale_rows(out, factor);
    exponentiate(scores, scale);
  }

  // The whole row's statistics, in every lane of its quad.
  __device__ __forceinline__ SoftmaxState state(int slot) const {
    return {max[slot], reduce_quad(sum[slot], [](float a, float b) { return a + b; })};
  }
};

// What a row's sums are multiplied by, and its lse.
struct RowResult {
  float factor, lse;
};

// `sink` in log2 units; -inf: none.
__device__ __forceinline__ RowResult finish_row(SoftmaxState keys, float sink) {
  SoftmaxState all = keys;
  float weight = 1.f;
  if (sink != -kInfinity) {
    all = merge(all, {sink, 1.f});
    if (all.max != keys.max) weight = ptx::exp2(keys.max - all.max);
  }
  // A row without keys has the sum 0; the sum of a NaN row is NaN.
  return {keys.sum == 0.f ? 0.f : weight * ptx::reciprocal(all.sum),
          all.sum == 0.f ? -kInfinity : (all.max + ptx::log2(all.sum)) * static_cast<float>(kLn2)};
}

}  // namespace heed::tile
