// The oracle: fp64 results of a problem, and the rounding variance a kernel may add to each of
// them.
#pragma once

#include <cstddef>

#include "heed/problem.hpp"
#include "registry.hpp"

namespace heed {

// How a kernel rounds: the numbers that the variance model of docs/numerics.md depends on.
// A unit roundoff is half the distance from 1 to the next larger number; 0 stands for exact.
struct Rounding {
  double tensor = 0;      // unit roundoff of out, dq, dk and dv
  double operand = 0;     // of P and dS before they are multiplied again
  double delta = 0;       // of the out that delta = rowsum(dout * out) is taken from
  double accumulate = 0;  // of sums, scores and statistics
  double exp_ulp = 0;     // error of an exponential, in units of `accumulate`
  double tanh_ulp = 0;    // of a hyperbolic tangent
  double flush = 0;       // P, dS and results below this may become 0
  double smallest = 0;    // spacing of the tensors' smallest numbers
};
double unit_roundoff(DType dtype);
Rounding rounding_of(const KernelRow& row);

// Results in fp64, row-major over a tensor's logical shape whatever its strides. Null: not wanted.
struct Expected {
  double* value = nullptr;
  double* variance = nullptr;  // 0 only where a result is exact
};

struct ForwardExpected {
  Expected out;
  Expected lse;
  double* score_size = nullptr;  // as lse: the largest scale * sum_c |q_c k_c| of a row
};

struct BackwardExpected {
  Expected dq, dk, dv, dbias, dsink;
};

// The tensors that the problem would write are not touched; backward does not read out and lse.
// `scratch` has reference_bytes(problem) bytes.
void reference(const ForwardProblem& problem, const Rounding& rounding,
               const ForwardExpected& expected, Workspace scratch);
void reference(const BackwardProblem& problem, const Rounding& rounding,
               const BackwardExpected& expected, Workspace scratch);
std::size_t reference_bytes(const ForwardProblem& problem);
std::size_t reference_bytes(const BackwardProblem& problem);

}  // namespace heed
