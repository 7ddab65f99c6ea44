// The gradient of a bias: clearing it, and adding up its broadcast axes in one order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/sequence.hpp"
#include "heed/problem.hpp"
#include "heed/status.hpp"

namespace heed::cuda {

// Elements of [batch, heads_q, seqlen_q, seqlen_k], the gradient before axes are added up.
constexpr std::array<std::int64_t, 4> full_dbias_shape(const ForwardProblem& f) {
  return {batch_entries(f), f.q.heads(), f.bias.shape[2] == 1 ? max_seqlen_q(f) : f.bias.shape[2],
          f.bias.shape[3] == 1 ? max_seqlen_k(f) : f.bias.shape[3]};
}

// x = 0; nothing without it.
Status clear_dbias(const TensorView& x, cudaStream_t stream);
// `target`, of which axes may have extent 1, = the sums of `full` over these axes.
Status sum_dbias(const TensorView& full, const TensorView& target, cudaStream_t stream);

}  // namespace heed::cuda
