#include "support/gate.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <sstream>
#include <unordered_set>

#include "support/problem.hpp"

namespace heed::test {
namespace {

std::size_t rows_of(const ForwardProblem& p) {
  return static_cast<std::size_t>(p.q.batch() * p.q.heads() * p.q.seqlen());
}

// Where rounding to nearest gives infinity.
double overflow_of(DType dtype) {
  switch (dtype) {
    case DType::f32: return 0x1.ffffffp127;
    case DType::bf16: return 0x1.ffp127;
    case DType::f16: return 65520;
    default: return std::numeric_limits<double>::infinity();
  }
}

std::string coordinates(const TensorView& view, std::size_t index) {
  std::string text = "]";
  auto rest = static_cast<std::int64_t>(index);
  for (int d = view.rank - 1; d >= 0; --d) {
    const std::int64_t extent = view.shape[static_cast<std::size_t>(d)];
    text = std::to_string(rest % extent) + (text == "]" ? "" : ", ") + text;
    rest /= extent;
  }
  return "[" + text;
}

std::string fail(const std::string& name, const std::string& where, double expected, double got,
                 double sigma, const std::string& why) {
  std::ostringstream text;
  text.precision(9);
  text << name << where << ": expected " << expected << " (sigma " << sigma << "), got " << got
       << ", " << why;
  return text.str();
}

// z of one element; infinite where the result can only be wrong.
double z_of(double expected, double variance, double got, double overflow) {
  if (std::isnan(expected)) return std::isnan(got) ? 0 : INFINITY;
  if (got == expected) return 0;
  if (std::isinf(got)) return std::abs(expected) >= overflow * (1 - 0x1p-8) ? 0 : INFINITY;
  if (!std::isfinite(got) || !std::isfinite(expected) || variance == 0) return INFINITY;
  return (got - expected) / std::sqrt(variance);
}

}  // namespace

ForwardOracle oracle(const ForwardProblem& p, const Rounding& rounding) {
  ForwardOracle o;
  o.out.resize(static_cast<std::size_t>(p.out.numel()));
  o.lse.resize(rows_of(p));
  o.score_size.assign(rows_of(p), 0);
  std::vector<double> memory(reference_bytes(p) / sizeof(double) + 1);
  reference(p, rounding, {o.out.sink(), o.lse.sink(), o.score_size.data()},
            {memory.data(), memory.size() * sizeof(double)});
  return o;
}

BackwardOracle oracle(const BackwardProblem& p, const Rounding& rounding) {
  BackwardOracle o;
  o.dq.resize(static_cast<std::size_t>(p.dq.numel()));
  o.dk.resize(static_cast<std::size_t>(p.dk.numel()));
  o.dv.resize(static_cast<std::size_t>(p.dv.numel()));
  if (p.dbias) o.dbias.resize(static_cast<std::size_t>(p.dbias.numel()));
  if (p.dsink != nullptr) o.dsink.resize(static_cast<std::size_t>(p.forward.q.heads()));
  std::vector<double> memory(reference_bytes(p) / sizeof(double) + 1);
  reference(p, rounding,
            {o.dq.sink(), o.dk.sink(), o.dv.sink(), p.dbias ? o.dbias.sink() : Expected{},
             p.dsink != nullptr ? o.dsink.sink() : Expected{}},
            {memory.data(), memory.size() * sizeof(double)});
  return o;
}

std::vector<double> values(const TensorView& view) {
  std::vector<double> all;
  all.reserve(static_cast<std::size_t>(view.numel()));
  for_each_element(view, [&](std::int64_t i) { all.push_back(load(view.dtype, view.data, i)); });
  return all;
}

Verdict compare(const std::string& name, const TensorView& view, const Oracle& expected,
                const std::vector<double>& got, const Statistics& statistics) {
  Verdict v;
  const bool shared = statistics.independent != 0;
  const double overflow = overflow_of(view.dtype);
  const auto width = static_cast<std::size_t>(view.head_dim());
  if (width == 0) return v;  // a bias over no keys
  double sum_squares = 0, sum = 0, error_squares = 0;
  std::size_t counted = 0, worst_at = 0, worst_row_at = 0;
  std::unordered_set<std::uint64_t> distinct;  // rows that are alike share their rounding errors
  for (std::size_t row = 0; row + width <= got.size(); row += width) {
    double row_squares = 0;
    bool exact = true;
    std::uint64_t hash = 0;
    for (std::size_t i = row; i < row + width; ++i) {
      const double z = z_of(expected.value[i], expected.variance[i], got[i], overflow);
      exact = exact && expected.variance[i] == 0;
      hash = mix(hash ^ std::bit_cast<std::uint64_t>(got[i]));
      // A row that sees nothing is +0, not -0.
      const bool wrong_zero =
          expected.variance[i] == 0 && expected.value[i] == 0 && std::signbit(got[i]);
      if (wrong_zero && v.failure.empty())
        v.failure = fail(name, coordinates(view, i), 0, got[i], 0, "which must be +0");
      if (std::abs(z) > v.worst) {
        v.worst = std::abs(z);
        worst_at = i;
      }
      const double error = std::isfinite(z) ? got[i] - expected.value[i] : 0;
      row_squares += z * z;
      sum += z;
      if (std::isfinite(error)) {
        error_squares += error * error;
        v.max_error = std::max(v.max_error, std::abs(error));
      }
    }
    if (exact) continue;
    ++v.rows;
    distinct.insert(hash);
    counted += width;
    sum_squares += row_squares;
    const double row_z = std::sqrt(row_squares / static_cast<double>(width));
    if (width >= 8 && row_z > v.worst_row) {
      v.worst_row = row_z;
      worst_row_at = row;
    }
  }
  if (v.failure.empty() && v.worst > kElementLimit)
    v.failure =
        fail(name, coordinates(view, worst_at), expected.value[worst_at], got[worst_at],
             std::sqrt(expected.variance[worst_at]),
             "z = " + std::to_string(v.worst) + " (limit " + std::to_string(kElementLimit) + ")");
  if (counted == 0) return v;
  const double n = static_cast<double>(counted);
  v.rms = std::sqrt(sum_squares / n);
  const std::size_t independent =
      shared ? std::min(distinct.size(), statistics.independent) : distinct.size();
  v.bias = std::abs(sum / n) * std::sqrt(static_cast<double>(independent));
  v.rms_error = std::sqrt(error_squares / n);
  const auto refuse = [&](double value, double limit, const char* what) {
    if (!v.failure.empty() || value <= limit) return;
    v.failure = name + ": " + what + " = " + std::to_string(value) + " (limit " +
                std::to_string(limit) + ")";
  };
  refuse(v.worst_row, kRowLimit, ("row " + coordinates(view, worst_row_at) + " rms z").c_str());
  if (v.rows < 32) return v;
  const bool strict = statistics.gaussian && v.rows >= 128;
  refuse(v.rms, strict ? kGaussianLimit : kTensorLimit, "tensor rms z");
  refuse(v.bias, strict && !shared && width >= 64 ? kGaussianBiasLimit : kBiasLimit,
         "bias |mean z| sqrt(independent rows)");
  return v;
}

Verdict compare_lse(const ForwardProblem& p, const ForwardOracle& expected) {
  Verdict v;
  if (p.lse == nullptr) return v;
  const TensorView view = contiguous(
      p.lse, DType::f32, std::array<std::int64_t, 4>{p.q.batch(), p.q.heads(), p.q.seqlen(), 1});
  double squares = 0;
  for (std::size_t i = 0; i < rows_of(p); ++i) {
    const double want = expected.lse.value[i], got = double{p.lse[i]};
    const double z = z_of(want, expected.lse.variance[i], got, INFINITY);
    v.worst = std::max(v.worst, std::abs(z));
    if (expected.lse.variance[i] > 0) {
      ++v.rows;
      squares += z * z;
    }
    const double error = std::isfinite(z) ? std::abs(got - want) : std::abs(z);
    const double size = std::max({1., std::abs(want), expected.score_size[i]});
    const double relative = error / size;
    v.max_error = std::max(v.max_error, std::isnan(relative) ? 0 : relative);
    if (!v.failure.empty()) continue;
    const std::string where = coordinates(view, i);
    const double sigma = std::sqrt(expected.lse.variance[i]);
    if (std::abs(z) > kLseLimit)
      v.failure =
          fail("lse", where, want, got, sigma,
               "z = " + std::to_string(std::abs(z)) + " (limit " + std::to_string(kLseLimit) + ")");
    else if (relative > kLseRelative)
      v.failure = fail("lse", where, want, got, sigma,
                       "relative error " + std::to_string(relative * 1e6) + "e-6 (limit 2e-6)");
  }
  if (v.rows > 0) v.rms = std::sqrt(squares / static_cast<double>(v.rows));
  return v;
}

Verdict compare_dsink(const BackwardProblem& p, const BackwardOracle& expected) {
  if (p.dsink == nullptr) return {};
  const TensorView view =
      contiguous(p.dsink, DType::f32, std::array<std::int64_t, 3>{p.forward.q.heads(), 1, 1});
  return compare("dsink", view, expected.dsink, values(view), {});
}

double naive_ratio(DType dtype, const std::vector<double>& value, const std::vector<double>& got,
                   const std::vector<double>& naive) {
  double ours = 0, theirs = 0, rounding = 0;
  const auto in_dtype = [&](double x) {
    std::uint64_t memory = 0;
    store(dtype, &memory, 0, x);
    return load(dtype, &memory, 0);
  };
  for (std::size_t i = 0; i < value.size(); ++i) {
    ours = std::max(ours, std::abs(got[i] - value[i]));
    theirs = std::max(theirs, std::abs(naive[i] - value[i]));
    const double x = in_dtype(value[i]);
    rounding = std::max(rounding, std::abs(in_dtype(in_dtype(x + 0.3) - 0.3) - x));
  }
  return ours == 0 ? 0 : ours / (2 * theirs + 2 * rounding);
}

}  // namespace heed::test
