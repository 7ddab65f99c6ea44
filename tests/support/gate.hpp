// The acceptance rule of docs/numerics.md: every element within the error its rounding model
// allows.
#pragma once

#include <string>
#include <vector>

#include "cpu/reference.hpp"
#include "heed/heed.hpp"

namespace heed::test {

// Limits in standard deviations of the model.
inline constexpr double kElementLimit = 7;  // any element
inline constexpr double kRowLimit = 5;      // rms over a row of at least 8 elements
inline constexpr double kTensorLimit = 3;   // rms over a tensor, any inputs
inline constexpr double kGaussianLimit =
    1.4;                                 // rms over a tensor of at least 128 rows, Gaussian inputs
inline constexpr double kBiasLimit = 6;  // |mean| * sqrt(independent rows), any inputs
inline constexpr double kGaussianBiasLimit = 2;  // out and dq of at least 128 rows of 64 elements
inline constexpr double kLseLimit = 8;
inline constexpr double kLseRelative =
    2e-6;  // of max(1, |lse|, the row's largest scale * sum |q k|)

// One result of the oracle, row-major over the tensor's logical shape.
struct Oracle {
  std::vector<double> value, variance;
  void resize(std::size_t count) {
    value.assign(count, 0);
    variance.assign(count, 0);
  }
  Expected sink() { return {value.data(), variance.data()}; }
};

struct ForwardOracle {
  Oracle out, lse;
  std::vector<double> score_size;
};
struct BackwardOracle {
  Oracle dq, dk, dv, dbias, dsink;
};
ForwardOracle oracle(const ForwardProblem& problem, const Rounding& rounding);
BackwardOracle oracle(const BackwardProblem& problem, const Rounding& rounding);

// What a tensor's comparison found, in standard deviations where not said otherwise.
struct Verdict {
  std::string failure;  // empty: passed
  double worst = 0;
  double worst_row = 0;
  double rms = 0;
  double bias = 0;
  double rms_error = 0;  // absolute
  double max_error = 0;  // absolute
  std::size_t rows = 0;  // with an element that is not exact
};

// What the statistics of a whole tensor may assume.
struct Statistics {
  bool gaussian = false;  // Gaussian inputs
  // Rows whose errors have nothing in common; 0: all that differ. Keys share the errors of the
  // queries' lse and delta, which differ per channel only, so dk and dv have as many as channels,
  // per head and entry.
  std::size_t independent = 0;
};

// `got` in logical order; `view` gives coordinates and dtype. Statistics over rows of the last
// axis.
Verdict compare(const std::string& name, const TensorView& view, const Oracle& expected,
                const std::vector<double>& got, const Statistics& statistics);
Verdict compare_lse(const ForwardProblem& problem, const ForwardOracle& expected);
Verdict compare_dsink(const BackwardProblem& problem, const BackwardOracle& expected);

// Elements of a tensor in logical order.
std::vector<double> values(const TensorView& view);

// max |got - value| / (2 max |naive - value| + 2 max |(value + 0.3 - 0.3) - value|), the last one
// in `dtype`: FlashAttention's rule fails above 1.
double naive_ratio(DType dtype, const std::vector<double>& value, const std::vector<double>& got,
                   const std::vector<double>& naive);

}  // namespace heed::test
