// The algebra of softmax statistics: what split keys, the blocked loop and a sink have in common.
#pragma once

#include <cmath>
#include <limits>

namespace heed {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr double kLog2e = 1.44269504088896340736;
inline constexpr double kLn2 = 0.69314718055994530942;

// Statistics of one row in log2 units: lse = ln 2 * (max + log2(sum)).
// merge is associative and commutative; the empty state is its identity.
struct SoftmaxState {
  float max = -kInfinity;
  float sum = 0.f;
};

// The factor that turns sums relative to `from` into sums relative to `to` (to >= from).
constexpr float rescale(float from, float to) {
  return from == to ? 1.f : from == -kInfinity ? 0.f : exp2f(from - to);
}

constexpr SoftmaxState merge(SoftmaxState a, SoftmaxState b) {
  const float m = a.max > b.max ? a.max : b.max;
  if (m == -kInfinity) return {-kInfinity, a.sum + b.sum};  // both empty; a NaN sum stays one
  return {m, a.sum * rescale(a.max, m) + b.sum * rescale(b.max, m)};
}

// Natural log of the row's sum of exponentials; -inf for the empty state.
inline float natural_lse(SoftmaxState s) {
  return static_cast<float>((double{s.max} + std::log2(double{s.sum})) * kLn2);
}

}  // namespace heed
