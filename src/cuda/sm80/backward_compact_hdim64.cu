// Backward kernels for head_dim up to 64 in 99 KB of shared memory (sm_86, sm_89, sm_120).
#include <span>

#include "cuda/sm80/backward_launch.cuh"

namespace heed {

std::span<const KernelRow> sm80_backward_compact_hdim64() {
  static constexpr sm80::BackwardTile kTile{
      .head_dim = 64, .tile_m = 64, .tile_n = 128, .keys = 32, .share = 2, .stages = 1};
  static_assert(sizeof(sm80::BackwardConfig<f16, kTile, cuda::PlainScore>::Smem) <= 99 * 1024);
  static constexpr auto kRows = sm80::backward_rows<kTile>();
  return kRows;
}

}  // namespace heed
