// Decode kernels for head_dim up to 192.
#include <span>

#include "cuda/sm80/decode.cuh"

namespace heed {

std::span<const KernelRow> sm80_decode_hdim192() {
  static constexpr sm80::ForwardTile kTile{.head_dim = 192,
                                           .tile_m = 64,
                                           .tile_n = 32,
                                           .warps = 4,
                                           .ctas = 2,
                                           .packed = true,
                                           .stages = 3};
  static constexpr auto kRows = sm80::decode_rows<kTile>();
  return kRows;
}

}  // namespace heed
