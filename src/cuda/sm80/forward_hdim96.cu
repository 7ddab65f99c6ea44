// Forward kernels for head_dim up to 96.
#include <span>

#include "cuda/sm80/forward.cuh"

namespace heed {

std::span<const KernelRow> sm80_forward_hdim96() {
  static constexpr sm80::ForwardTile kTile{
      .head_dim = 96, .tile_m = 128, .tile_n = 64, .warps = 4, .ctas = 2};
  static constexpr auto kRows = sm80::forward_rows<kTile>();
  return kRows;
}

}  // namespace heed
