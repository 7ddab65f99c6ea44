// Causal attention of dense tensors, forward and backward.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "heed/heed.hpp"

namespace {

constexpr std::int64_t kBatch = 2, kSeqlen = 256, kHeadsQ = 8, kHeadsK = 2, kHeadDim = 64;

std::vector<float> random_values(std::int64_t heads) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(kBatch * kSeqlen * heads * kHeadDim));
  for (float& x : values) x = normal(generator);
  return values;
}

heed::TensorView view(std::vector<float>& values, std::int64_t heads) {
  return heed::contiguous(values.data(), heed::DType::f32, {kBatch, kSeqlen, heads, kHeadDim});
}

double sum(const std::vector<float>& values) {
  double total = 0;
  for (const float x : values) total += double{x};
  return total;
}

int fail(const heed::Status& status) {
  std::fprintf(stderr, "%s\n", status.message().c_str());
  return 1;
}

}  // namespace

int main() {
  std::vector<float> q = random_values(kHeadsQ), k = random_values(kHeadsK),
                     v = random_values(kHeadsK), dout = random_values(kHeadsQ);
  std::vector<float> out(q.size()), dq(q.size()), dk(k.size()), dv(v.size());
  std::vector<float> lse(static_cast<std::size_t>(kBatch * kHeadsQ * kSeqlen));

  const heed::ForwardProblem forward{.q = view(q, kHeadsQ),
                                     .k = view(k, kHeadsK),
                                     .v = view(v, kHeadsK),
                                     .out = view(out, kHeadsQ),
                                     .lse = lse.data(),
                                     .band = heed::kCausal};
  const heed::BackwardProblem backward{.forward = forward,
                                       .dout = view(dout, kHeadsQ),
                                       .dq = view(dq, kHeadsQ),
                                       .dk = view(dk, kHeadsK),
                                       .dv = view(dv, kHeadsK)};

  // A plan says which kernel runs and how much scratch memory it needs; it can be kept and reused.
  const auto device = heed::Device::cpu();
  if (!device.ok()) return fail(device.status());
  const auto plan_forward = heed::plan(forward, *device);
  const auto plan_backward = heed::plan(backward, *device);
  if (!plan_forward.ok()) return fail(plan_forward.status());
  if (!plan_backward.ok()) return fail(plan_backward.status());
  std::printf("forward   %s\n", heed::describe(*plan_forward).c_str());
  std::printf("backward  %s\n", heed::describe(*plan_backward).c_str());

  const std::size_t bytes = std::max(plan_forward->workspace_bytes, plan_backward->workspace_bytes);
  const std::unique_ptr<void, void (*)(void*)> scratch(
      std::aligned_alloc(heed::kWorkspaceAlignment, bytes), std::free);
  const heed::Workspace workspace{scratch.get(), bytes};

  if (heed::Status s = heed::forward(forward, workspace); !s.ok()) return fail(s);
  if (heed::Status s = heed::backward(backward, workspace); !s.ok()) return fail(s);

  // The first row sees only the first key; the weights of a row sum to 1, so dv sums to what dout
  // does.
  const float first_row = std::fabs(out[0] - v[0]);
  const double gradient = std::fabs(sum(dv) - sum(dout));
  std::printf("out[0] = %.6f, v[0] = %.6f\n", double{out[0]}, double{v[0]});
  std::printf("sum(dv) = %.4f, sum(dout) = %.4f\n", sum(dv), sum(dout));
  return first_row < 1e-5f && gradient < 1e-2 ? 0 : 1;
}
