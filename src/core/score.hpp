// How a product q k becomes a logit, in log2 units: the value and, beside it, its slope.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/softmax_state.hpp"

namespace heed {

enum class ScoreKind : std::uint8_t { plain, softcap, general };
constexpr const char* name_of(ScoreKind kind) {
  return kind == ScoreKind::plain ? "plain" : kind == ScoreKind::softcap ? "softcap" : "general";
}

// cap tanh(scale qk / cap), in log2 units.
struct Softcap {
  float scale_over_cap;
  float cap_log2e;

  constexpr float value(float qk) const { return cap_log2e * tanhf(qk * scale_over_cap); }
  // d value / d (scale_log2e qk), from the value itself: 1 - tanh^2.
  constexpr float slope(float value) const {
    const float t = value / cap_log2e;
    return 1.f - t * t;
  }
};

constexpr Softcap softcap_of(float scale, float cap) {
  return {scale / cap, cap * static_cast<float>(kLog2e)};
}

// f16 ends at 65504. Where |dS| could reach that, by the Cauchy-Schwarz bound of dP, a GPU rounds
// dS times this power of two; else it is 1. `dout`, `v`: largest norms of rows, `delta`: largest
// magnitude, `kept`: 1 / (1 - dropout). None of them is NaN; an infinite bound is one of 2^127.
constexpr float f16_ds_scale(float dout, float v, float delta, float kept) {
  const float most = dout * v * kept + delta;
  return most < 32768.f ? 1.f : exp2f(14.f - (most < 0x1p127f ? ceilf(log2f(most)) : 127.f));
}

}  // namespace heed
