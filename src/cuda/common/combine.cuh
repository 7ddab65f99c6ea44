// Joins the parts of attention over split keys: out, lse and the sink.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/softmax_state.hpp"
#include "core/workspace.hpp"
#include "heed/problem.hpp"
#include "heed/status.hpp"

namespace heed::cuda {

struct Parts {
  float* out = nullptr;
  SoftmaxState* states = nullptr;
};
// What kernels leave for combine, of a width that is at least v.head_dim; nothing for one part.
inline Parts carve_parts(WorkspaceLayout& layout, const ForwardProblem& problem, int splits,
                         int width) {
  if (splits <= 1) return {};
  const std::int64_t rows = splits * problem.q.batch() * problem.q.heads() * problem.q.seqlen();
  return {layout.add<float>(rows * width), layout.add<SoftmaxState>(rows)};
}

// partial_out: [splits, batch, heads_q, seqlen_q, width] fp32 (packed: without the batch), sums
// relative to the maximum of the part's state; states: the same without the width. An empty state's
// sums are not read. At most 1024 splits.
Status combine(const ForwardProblem& problem, int splits, const float* partial_out, int width,
               const SoftmaxState* states, cudaStream_t stream);

}  // namespace heed::cuda
