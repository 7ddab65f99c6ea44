// Joins the parts of attention over split keys: out, lse and the sink.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/softmax_state.hpp"
#include "core/workspace.hpp"
#include "cuda/tile/rowwise.cuh"
#include "heed/problem.hpp"
#include "heed/status.hpp"

namespace heed::cuda {

// What kernels leave of every part of the keys, by the row's index in lse.
struct Parts {
  float* out = nullptr;            // [splits, rows of lse, width]
  SoftmaxState* states = nullptr;  // [splits, rows of lse]; an empty one has no out
};

// Leaves the sums and statistics of a warp's rows. `index(slot)`: the row's in `to`, whose width is
// the accumulator's; negative: there is no such row.
template <int kM, int kN, class Index>
__device__ __forceinline__ void store_part(const Parts& to, const tile::Accumulator<kM, kN>& acc,
                                           const tile::RowSoftmax<kM>& softmax,
                                           const Index& index) {
  float* target[2 * kM];
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    const SoftmaxState state = softmax.state(slot);
    const std::int64_t i = index(slot);
    const bool empty = state.max == -kInfinity && state.sum == 0.f;
    target[slot] = i >= 0 && !empty ? to.out + i * (8 * kN) : nullptr;
    if (i >= 0 && tile::lane() % 4 == 0) to.states[i] = state;
  }
  tile::for_each_pair(acc, [&](int slot, int col, float x, float y) {
    if (target[slot] != nullptr) *reinterpret_cast<float2*>(target[slot] + col) = {x, y};
  });
}

// What kernels leave for combine, of a width that is at least v.head_dim; nothing for one part.
inline Parts carve_parts(WorkspaceLayout& layout, const ForwardProblem& problem, int splits,
                         int width) {
  if (splits <= 1) return {};
  const std::int64_t rows = splits * problem.q.batch() * problem.q.heads() * problem.q.seqlen();
  return {layout.add<float>(rows * width), layout.add<SoftmaxState>(rows)};
}

// partial_out: [splits, batch, heads_q, seqlen_q, width] fp32 (packed: without the batch), sums
// relative to the maximum of the part's state; states: the same without the width. An empty state's
// sums may be anything.
Status combine(const ForwardProblem& problem, int splits, const float* partial_out, int width,
               const SoftmaxState* states, cudaStream_t stream);

}  // namespace heed::cuda
