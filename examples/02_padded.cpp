// A left-padded batch, computed in place: no gather, no mask tensor, and the padding is never read.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "heed/heed.hpp"

namespace {

constexpr std::int64_t kBatch = 3, kSeqlen = 128, kHeads = 4, kHeadDim = 32;
constexpr std::int64_t kToken = kHeads * kHeadDim;
constexpr std::array<std::int32_t, 3> kLengths{128, 17, 60};

bool run(const heed::ForwardProblem& problem) {
  const auto device = heed::Device::cpu();
  const auto plan =
      device.ok() ? heed::plan(problem, *device) : heed::Result<heed::Plan>(device.status());
  if (!plan.ok()) {
    std::fprintf(stderr, "%s\n", plan.status().message().c_str());
    return false;
  }
  const std::unique_ptr<void, void (*)(void*)> scratch(
      std::aligned_alloc(heed::kWorkspaceAlignment, plan->workspace_bytes), std::free);
  const heed::Status s = heed::run(*plan, problem, {scratch.get(), plan->workspace_bytes});
  if (!s.ok()) std::fprintf(stderr, "%s\n", s.message().c_str());
  return s.ok();
}

}  // namespace

int main() {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  const auto size = static_cast<std::size_t>(kBatch * kSeqlen * kToken);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> q(size, nan), k(size, nan), v(size, nan), out(size), alone(size);
  std::array<std::int32_t, 3> start{};
  for (std::size_t b = 0; b < kLengths.size(); ++b) {
    start[b] = static_cast<std::int32_t>(kSeqlen) - kLengths[b];
    const auto first =
        static_cast<std::size_t>((static_cast<std::int64_t>(b) * kSeqlen + start[b]) * kToken);
    const auto end =
        static_cast<std::size_t>((static_cast<std::int64_t>(b) + 1) * kSeqlen * kToken);
    for (std::vector<float>* tensor : {&q, &k, &v})
      for (std::size_t i = first; i < end; ++i) (*tensor)[i] = normal(generator);
  }

  const auto view = [](std::vector<float>& values) {
    return heed::contiguous(values.data(), heed::DType::f32, {kBatch, kSeqlen, kHeads, kHeadDim});
  };
  if (!run({.q = view(q),
            .k = view(k),
            .v = view(v),
            .out = view(out),
            .band = heed::kCausal,
            .sequences = {.start_q = start.data(), .start_k = start.data()}}))
    return 1;

  // The same sequences one by one.
  for (std::size_t b = 0; b < kLengths.size(); ++b) {
    const std::int64_t at = (static_cast<std::int64_t>(b) * kSeqlen + start[b]) * kToken;
    const auto one = [&](std::vector<float>& values) {
      return heed::contiguous(values.data() + at, heed::DType::f32,
                              {1, kLengths[b], kHeads, kHeadDim});
    };
    if (!run({.q = one(q), .k = one(k), .v = one(v), .out = one(alone), .band = heed::kCausal}))
      return 1;
  }

  float worst = 0.f;
  for (std::size_t i = 0; i < size; ++i) {
    if (std::isnan(out[i])) worst = std::numeric_limits<float>::infinity();
    worst = std::max(worst, std::fabs(out[i] - alone[i]));
  }
  const std::int64_t tokens = kLengths[0] + kLengths[1] + kLengths[2];
  std::printf("%lld tokens in %lld slots, NaN in the padding\n", static_cast<long long>(tokens),
              static_cast<long long>(kBatch * kSeqlen));
  std::printf("largest difference from the sequences one by one: %g\n", double{worst});
  return worst < 1e-5f ? 0 : 1;
}
