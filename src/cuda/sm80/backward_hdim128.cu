// Backward kernels for head_dim up to 128.
#include <span>

#include "cuda/sm80/backward_launch.cuh"

namespace heed {

std::span<const KernelRow> sm80_backward_hdim128() {
  static constexpr sm80::BackwardTile kTile{
      .head_dim = 128, .tile_m = 64, .tile_n = 128, .keys = 32, .share = 2, .stages = 2};
  static constexpr auto kRows = sm80::backward_rows<kTile>();
  return kRows;
}

}  // namespace heed
