// Results of tokens that belong to no entry: zeros, and -inf for lse.
#pragma once

#include <cuda_runtime.h>

#include "core/sequence.hpp"
#include "heed/problem.hpp"
#include "heed/status.hpp"

namespace heed::cuda {

// out and lse.
Status fill_gaps_of_forward(const ForwardProblem& problem, cudaStream_t stream);
// dq, dk and dv.
Status fill_gaps_of_backward(const BackwardProblem& problem, cudaStream_t stream);

}  // namespace heed::cuda
