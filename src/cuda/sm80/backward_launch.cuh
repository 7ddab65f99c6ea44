// The rows of the table that hold the portable backward.
#pragma once

#include <array>
#include <cstdint>

#include "cuda/common/backward_launch.cuh"
#include "cuda/host/row.hpp"
#include "cuda/sm80/backward.cuh"
#include "registry.hpp"

namespace heed::sm80 {

template <class C>
Status launch_backward(const Plan& plan, const BackwardProblem& b, Workspace workspace,
                       Queue queue) {
  return cuda::launch_backward<C>(
      plan, b, workspace, queue,
      [](const BackwardParams& params, std::int64_t blocks, cudaStream_t stream) {
        return cuda::launch<backward<C>>({.blocks = blocks,
                                          .threads = C::kThreads,
                                          .smem_bytes = sizeof(typename C::Smem),
                                          .overlap = true},
                                         stream, params);
      });
}

template <class C>
constexpr KernelRow backward_row(DType dtype) {
  KernelRow row = cuda::row_of<C>(Arch::sm80, Pass::backward, dtype, C::tile.tile_m);
  row.backward_bytes = cuda::backward_bytes<C>;
  row.backward = launch_backward<C>;
  return row;
}

// The kernels of one head_dim and score policy.
template <BackwardTile kTile, class Score>
constexpr std::array<KernelRow, 2> rows_of_tile() {
  return {backward_row<BackwardConfig<bf16, kTile, Score>>(DType::bf16),
          backward_row<BackwardConfig<f16, kTile, Score>>(DType::f16)};
}

template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> backward_rows() {
  return rows_of_tile<tile_of(kBackwardTiles, kHeadDim), Score>();
}

template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> backward_compact_rows() {
  constexpr BackwardTile kTile = tile_of(kCompactBackwardTiles, kHeadDim);
  static_assert(sizeof(typename BackwardConfig<f16, kTile, Score>::Smem) <= kCompactSmemBytes);
  return rows_of_tile<kTile, Score>();
}

}  // namespace heed::sm80
