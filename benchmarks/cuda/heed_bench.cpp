// A C door to the GPU kernels for the Python benchmark: dense [batch, seqlen, heads, head_dim]
// tensors only.
#include <cstdio>
#include <vector>

#include "registry.hpp"

namespace heed {
#define HEED_KERNELS(rows) std::span<const KernelRow> rows();
#include "cuda_kernel_list.inc"
#undef HEED_KERNELS
}  // namespace heed

namespace {

using namespace heed;

struct Call {
  void *q, *k, *v, *out, *lse, *dout, *dq, *dk, *dv, *workspace, *intervals;
  std::int64_t workspace_bytes;
  std::int32_t batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, f16, causal, left, splits,
      deterministic;
};

const KernelRow* find(Pass pass, const Call& c) {
  const KernelRow* best = nullptr;
  const auto look = [&](std::span<const KernelRow> rows) {
    for (const KernelRow& row : rows)
      if (row.pass == pass && row.dtype == (c.f16 ? DType::f16 : DType::bf16) &&
          row.score == ScoreKind::plain && row.max_head_dim >= c.head_dim &&
          (best == nullptr || row.max_head_dim < best->max_head_dim ||
           (row.max_head_dim == best->max_head_dim && row.smem_bytes > best->smem_bytes)))
        best = &row;
  };
#define HEED_KERNELS(group) look(heed::group());
#include "cuda_kernel_list.inc"
#undef HEED_KERNELS
  return best;
}

BackwardProblem problem_of(const Call& c) {
  const DType type = c.f16 ? DType::f16 : DType::bf16;
  using Shape = std::array<std::int64_t, 4>;
  const Shape sq{c.batch, c.seqlen_q, c.heads_q, c.head_dim},
      sk{c.batch, c.seqlen_k, c.heads_k, c.head_dim};
  BackwardProblem b;
  ForwardProblem& f = b.forward;
  f.q = contiguous(c.q, type, sq);
  f.k = contiguous(c.k, type, sk);
  f.v = contiguous(c.v, type, sk);
  f.out = contiguous(c.out, type, sq);
  f.lse = static_cast<float*>(c.lse);
  if (c.causal) f.band = kCausal;
  if (c.left >= 0) f.band.left = c.left;
  if (c.intervals != nullptr) {
    f.intervals.rows = static_cast<const std::int32_t*>(c.intervals);
    f.intervals.rows_batch_stride = 2 * c.seqlen_q;
  }
  b.dout = contiguous(c.dout, type, sq);
  b.dq = contiguous(c.dq, type, sq);
  b.dk = contiguous(c.dk, type, sk);
  b.dv = contiguous(c.dv, type, sk);
  return b;
}

template <class Problem, class Bytes, class Run>
int start(const KernelRow* row, const Call& c, const Problem& p, Bytes bytes, Run run,
          void* stream) {
  if (row == nullptr) return 1;
  Plan plan{.row = row, .workers = 132, .splits = c.splits > 0 ? c.splits : 1};
  plan.deterministic = c.deterministic != 0;
  plan.workspace_bytes = (row->*bytes)(plan, p);
  if (static_cast<std::int64_t>(plan.workspace_bytes) > c.workspace_bytes) {
    std::printf("workspace: %zu bytes needed\n", plan.workspace_bytes);
    return 2;
  }
  const Status s =
      (row->*run)(plan, p, {c.workspace, plan.workspace_bytes}, static_cast<CUstream_st*>(stream));
  if (!s.ok()) std::printf("%s\n", s.message().c_str());
  return s.ok() ? 0 : 3;
}

}  // namespace

extern "C" int heed_forward(const Call* c, void* stream) {
  return start(find(Pass::forward, *c), *c, problem_of(*c).forward, &KernelRow::forward_bytes,
               &KernelRow::forward, stream);
}
extern "C" int heed_decode(const Call* c, void* stream) {
  return start(find(Pass::decode, *c), *c, problem_of(*c).forward, &KernelRow::forward_bytes,
               &KernelRow::forward, stream);
}
extern "C" int heed_backward(const Call* c, void* stream) {
  return start(find(Pass::backward, *c), *c, problem_of(*c), &KernelRow::backward_bytes,
               &KernelRow::backward, stream);
}
