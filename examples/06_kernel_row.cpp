// A kernel row of one's own: the smallest forward that the tests accept. docs/kernel_row.md walks
// through it.
#include <array>
#include <span>

#include "core/workspace.hpp"
#include "cpu/executor.hpp"
#include "cpu/task.hpp"
#include "registry.hpp"

namespace heed {
namespace {

using cpu::row_of;

// The logit of one key, in natural log units; -inf: the row does not see it.
float logit_of(const ForwardProblem& p, const SequenceSlice& at, std::int64_t head, int row,
               int key, const float* k) {
  const float* q = row_of<float>(p.q, at.q, head, row);
  float qk = 0.f;
  for (std::int64_t c = 0; c < p.q.head_dim(); ++c) qk += q[c] * k[c];
  float s = cpu::scale_of(p) * qk;
  if (p.score.softcap > 0.f) s = p.score.softcap * std::tanh(s / p.score.softcap);
  if (p.bias) {
    float bias = 0.f;
    cpu::load_bias(p.bias, cpu::bias_row(p.bias, at, head, row), key, 1, &bias);
    s += bias;
  }
  return s;
}

// 1, or with dropout 0 or 1 / (1 - probability).
float kept(const ForwardProblem& p, const SequenceSlice& at, std::int64_t head, int row, int key) {
  if (p.dropout.probability == 0.f) return 1.f;
  std::array<float, 4> mask{};
  cpu::dropout_mask(p.dropout, at.entry, head, row, key / 4 * 4, 4, mask.data());
  return mask[static_cast<std::size_t>(key % 4)] * cpu::dropout_scale(p);
}

// One query row. `sum_v` has head_dim_v floats of scratch.
void attend(const ForwardProblem& p, const SequenceSlice& at, std::int64_t head, int row,
            float* sum_v) {
  const std::int64_t head_k = head / cpu::group_of(p);
  const std::int64_t channels = p.v.head_dim();
  const RowLimits limits = row_limits(p.band, at, p.intervals, row);
  constexpr auto kLog2eF = static_cast<float>(kLog2e);
  SoftmaxState state;
  if (p.sink != nullptr) state = {p.sink[head] * kLog2eF, p.sink[head] == -kInfinity ? 0.f : 1.f};
  std::fill_n(sum_v, channels, 0.f);

  for (int key = limits.first; key < limits.end; ++key) {
    const float* k = cpu::key_row<float>(p, p.k, at, head_k, key);
    if (k == nullptr) continue;  // a hole, or an unmapped page
    const float s = logit_of(p, at, head, row, key, k);
    if (s == -kInfinity) continue;
    const SoftmaxState next = merge(state, {s * kLog2eF, 1.f});
    const float shrink = rescale(state.max, next.max);
    const float weight = exp2f(s * kLog2eF - next.max) * kept(p, at, head, row, key);
    const float* v = cpu::key_row<float>(p, p.v, at, head_k, key);
    for (std::int64_t c = 0; c < channels; ++c) {
      sum_v[c] *= shrink;
      if (weight != 0.f) sum_v[c] += weight * v[c];
    }
    state = next;
  }

  float* out = row_of<float>(p.out, at.q, head, row);
  for (std::int64_t c = 0; c < channels; ++c)
    out[c] = state.sum == 0.f ? 0.f : sum_v[c] / state.sum;
  if (p.lse != nullptr) p.lse[lse_index(p, at, static_cast<int>(head), row)] = natural_lse(state);
}

std::size_t scratch_bytes(const Plan& plan, const ForwardProblem& p) {
  WorkspaceLayout layout;
  layout.add<float>(plan.workers * p.v.head_dim());
  return layout.bytes();
}

Status run(const Plan& plan, const ForwardProblem& p, Workspace memory, Queue queue) {
  WorkspaceLayout layout(memory);
  float* scratch = layout.add<float>(plan.workers * p.v.head_dim());
  Executor& executor = cpu::executor_of(queue);
  const std::int64_t heads = p.q.heads();
  if (cpu::has_gaps(p)) {  // tokens of no entry get 0, their lse is -inf
    for (std::int64_t t = 0; t < p.out.batch() * p.out.seqlen(); ++t)
      cpu::zero_token<float>(p.out, t);
    if (p.lse != nullptr) std::fill_n(p.lse, p.q.batch() * heads * p.q.seqlen(), -kInfinity);
  }
  cpu::parallel_for(executor, plan.workers, batch_entries(p) * heads,
                    [&](std::int64_t task, int worker) {
                      const SequenceSlice at = slice_of(p, static_cast<int>(task / heads));
                      float* sum_v = scratch + worker * p.v.head_dim();
                      for (int row = 0; row < at.q.length; ++row)
                        attend(p, at, task % heads, row, sum_v);
                    });
  return {};
}

constexpr std::array kRows{KernelRow{.arch = Arch::scalar,
                                     .pass = Pass::forward,
                                     .dtype = DType::f32,
                                     .operand = DType::f32,
                                     .tile_m = 1,
                                     .tile_n = 1,
                                     .max_head_dim = 512,
                                     .max_query_rows = 0,
                                     .forward_bytes = scratch_bytes,
                                     .forward = run,
                                     .backward_bytes = nullptr,
                                     .backward = nullptr}};

}  // namespace

std::span<const KernelRow> example_rows() { return kRows; }

}  // namespace heed
