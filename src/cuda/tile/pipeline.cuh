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
  // By so many stages at once.
  template <int kCount>
  __device__ __forceinline__ void advance_by() {
    static_assert(kCount <= kStages);
    if constexpr (kCount < kStages) {
      stage += kCount;
      if (stage < kStages) return;
      stage -= kStages;
    }
    phase ^= 1;
  }
};

}  // namespace heed::tile
