// The oracle's sums in fp64, each with the variance that a kernel's fp32 additions give it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "core/half.hpp"

namespace heed::sums {

inline double wide(double x) { return x; }
inline double wide(float x) { return double{x}; }
inline double wide(bf16 x) { return double{to_float(x)}; }
inline double wide(f16 x) { return double{to_float(x)}; }

inline double square(double x) { return x * x; }

// Relative variance of rounding to nearest with unit roundoff u: the error is uniform in half a
// spacing and the number log-uniform in its binade.
inline double rho(double u) { return 0.18 * u * u; }

// A sum, with what its terms' own errors and fp32 additions do to it. The additions round partial
// sums, which on average reach a third of the square of the whole and of the terms.
struct Sum {
  double value = 0;
  double squares = 0;
  double variance = 0;
  double terms = 0;

  void add(double term, double term_variance) {
    value += term;
    squares += square(term);
    variance += term_variance;
    terms += 1;
  }
  double total_variance(double w) const {
    return variance + w * w * terms / 3 * (value * value + squares);
  }
};

struct Dot {
  double value = 0;
  double squares = 0;
  double size = 0;  // sum |a b|

  // Variance when added up one product at a time.
  double variance(double w, int terms) const {
    return w * w * terms / 3 * (value * value + squares);
  }
};

template <class A, class B>
Dot dot(const A* a, const B* b, std::int64_t count) {
  constexpr std::size_t kParts = 4;  // independent sums, because a compiler must not reorder one
  std::array<Dot, kParts> parts;
  const auto add = [&](std::size_t part, std::int64_t c) {
    const double x = wide(a[c]) * wide(b[c]);
    parts[part].value += x;
    parts[part].squares += x * x;
    parts[part].size += std::abs(x);
  };
  std::int64_t c = 0;
  for (; c + std::int64_t{kParts} <= count; c += kParts)
    for (std::size_t part = 0; part < kParts; ++part) add(part, c + static_cast<int>(part));
  for (; c < count; ++c) add(0, c);
  const auto total = [&](double Dot::*field) {
    return (parts[0].*field + parts[1].*field) + (parts[2].*field + parts[3].*field);
  };
  return {total(&Dot::value), total(&Dot::squares), total(&Dot::size)};
}

// `Sum` for every channel of a row.
struct ChannelSums {
  double* value;
  double* squares;
  double* variance;
  std::int64_t channels;
  double terms;

  void clear() {
    terms = 0;
    for (double* x : {value, squares, variance}) std::fill_n(x, channels, 0.);
  }
  // Adds factor * x[c], where the factor is known up to a variance.
  template <class T>
  void add(double factor, double factor_variance, const T* x) {
    terms += 1;
    for (std::int64_t c = 0; c < channels; ++c) {
      const double channel = wide(x[c]);
      const double term = factor * channel;
      value[c] += term;
      squares[c] += term * term;
      variance[c] += factor_variance * channel * channel;
    }
  }
  double total_variance(std::int64_t c, double w) const {
    return variance[c] + w * w * terms / 3 * (square(value[c]) + squares[c]);
  }
};

}  // namespace heed::sums
