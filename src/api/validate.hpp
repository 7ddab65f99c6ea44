// What is legal: every refusal that the host can justify is written here, once.
#pragma once

#include "heed/problem.hpp"
#include "heed/status.hpp"

namespace heed {

// Everything the host sees: shapes, strides, pointers, scalars. Reads no memory of the tensors and
// allocates nothing when the problem is legal.
Status validate(const ForwardProblem& problem);
Status validate(const BackwardProblem& problem);

// The contents of the index arrays, which must be readable here (CPU only): lengths, starts, pages.
// Requires a problem that validate() accepted.
Status validate_contents(const ForwardProblem& problem);
Status validate_contents(const BackwardProblem& problem);

}  // namespace heed
