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

// Hides the columns (keys col0 + col) outside their row's limits. `limits`: of the warp's first
// row.
template <int kM, int kN>
__device__ __forceinline__ void mask_rows(Accumulator<kM, kN>& acc, const RowLimits* limits,
                                          int col0) {
  RowLimits row[2 * kM];
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) row[slot] = limits[slot_row(slot)];
  for_each(acc, [&](int slot, int col, float& x) {
    if (col0 + col < row[slot].first || col0 + col >= row[slot].end) x = -kInfinity;
  });
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

  // scores * scale (scale > 0) are logits in log2 units; they become exp2(logit - max).
  template <int kN, int kOut>
  __device__ __forceinline__ void update(Accumulator<kM, kN>& scores, float scale,
                                         Accumulator<kM, kOut>& out) {
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
    if (__any_sync(~0u, grew)) {
      float factor[kSlots];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const float larger = fmaxf(max[slot], tile_max[slot]);
        factor[slot] = larger == -kInfinity ? 1.f : ptx::exp2(max[slot] - larger);
        max[slot] = larger;
        sum[slot] *= factor[slot];
      }
      scale_rows(out, factor);
    }
    float shift[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      shift[slot] = max[slot] == -kInfinity ? 0.f : -max[slot];
    for_each(scores, [&](int slot, int, float& x) {
      x = ptx::exp2(fmaf(x, scale, shift[slot]));
      sum[slot] += x;
    });
  }

  // The whole row's statistics, in every lane of its quad.
  __device__ __forceinline__ SoftmaxState state(int slot) const {
    return {max[slot], reduce_quad(sum[slot], [](float a, float b) { return a + b; })};
  }
};

}  // namespace heed::tile
