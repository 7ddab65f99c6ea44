// Joins the parts of attention over split keys: out, lse and the sink.
#pragma once

#include <cuda_runtime.h>

#include "core/softmax_state.hpp"
#include "heed/problem.hpp"
#include "heed/status.hpp"

namespace heed::cuda {

// partial_out: [splits, batch, heads_q, seqlen_q, width] fp32 (packed: without the batch), sums
// relative to the maximum of the part's state; states: the same without the width. An empty state's
// sums are not read. At most 1024 splits.
Status combine(const ForwardProblem& problem, int splits, const float* partial_out, int width,
               const SoftmaxState* states, cudaStream_t stream);

}  // namespace heed::cuda
