// Decode kernels for head_dim up to 96.
#include <span>

#include "cuda/sm80/decode.cuh"

namespace heed {

std::span<const KernelRow> sm80_decode_hdim96() {
  static constexpr sm80::ForwardTile kTile{.head_dim = 96,
                                           .tile_m = 64,
                                           .tile_n = 64,
                                           .warps = 4,
                                           .ctas = 2,
                                           .packed = true,
                                           .stages = 3};
  static constexpr auto kRows = sm80::decode_rows<kTile>();
  return kRows;
}

}  // namespace heed
