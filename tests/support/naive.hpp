// What a user would write: whole matrices, every intermediate rounded to the tensors' dtype.
#pragma once

#include <vector>

#include "heed/heed.hpp"

namespace heed::test {

// Row-major over the tensors' logical shapes, zero outside the sequences.
struct Naive {
  std::vector<double> out, dq, dk, dv;
};
Naive naive(const BackwardProblem& problem, bool gradients);

}  // namespace heed::test
