// Where a producer or consumer stands in a ring of stages.
#pragma once

namespace heed::tile {

template <int kStages>
struct PipelineState {
  int stage = 0;
  int phase = 0;  // of the barriers that say "full"; "empty" has the other one

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace heed::tile
