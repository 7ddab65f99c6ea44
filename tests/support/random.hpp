// Numbers that depend on a seed and a place only, so every layout of a problem holds the same ones.
#pragma once

#include <cmath>
#include <cstdint>

namespace heed::test {

// The finaliser of splitmix64: a bijection that passes BigCrush on counters.
constexpr std::uint64_t mix(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

class Random {
 public:
  explicit constexpr Random(std::uint64_t seed) : state_(mix(seed)) {}

  constexpr std::uint64_t next() { return mix(state_++); }
  // In [low, high].
  constexpr int between(int low, int high) {
    return low + static_cast<int>(next() % static_cast<std::uint64_t>(high - low + 1));
  }
  constexpr double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  constexpr bool chance(double probability) { return uniform() < probability; }
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(6.283185307179586 * uniform());
  }
  // Small values about as often as large ones.
  int log_between(int low, int high) {
    const double x = std::exp(uniform() * std::log((high + 1.) / low)) * low;
    return x >= high ? high : static_cast<int>(x);
  }
  template <class... Choices>
  constexpr auto pick(Choices... choices) {
    const std::common_type_t<Choices...> all[] = {choices...};
    return all[next() % sizeof...(choices)];
  }

 private:
  std::uint64_t state_;
};

}  // namespace heed::test
