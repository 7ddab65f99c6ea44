// One new token per sequence against a paged KV cache, with the keys split over the threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "heed/heed.hpp"

namespace {

constexpr std::int64_t kBatch = 2, kHeadsQ = 8, kHeadsK = 2, kHeadDim = 64;
constexpr std::int64_t kPageSize = 16, kMaxPages = 256, kPages = kBatch * kMaxPages;

bool run(const heed::ForwardProblem& problem, int splits) {
  const auto device = heed::Device::cpu();
  const auto plan = device.ok() ? heed::plan(problem, *device, {.splits = splits})
                                : heed::Result<heed::Plan>(device.status());
  if (!plan.ok()) {
    std::fprintf(stderr, "%s\n", plan.status().message().c_str());
    return false;
  }
  std::printf("%s\n", heed::describe(*plan).c_str());
  const std::unique_ptr<void, void (*)(void*)> scratch(
      std::aligned_alloc(heed::kWorkspaceAlignment, plan->workspace_bytes), std::free);
  const heed::Status s = heed::run(*plan, problem, {scratch.get(), plan->workspace_bytes});
  if (!s.ok()) std::fprintf(stderr, "%s\n", s.message().c_str());
  return s.ok();
}

std::vector<float> random_values(std::int64_t count) {
  static std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& x : values) x = normal(generator);
  return values;
}

}  // namespace

int main() {
  std::vector<float> q = random_values(kBatch * kHeadsQ * kHeadDim);
  std::vector<float> k = random_values(kPages * kPageSize * kHeadsK * kHeadDim);
  std::vector<float> v = random_values(kPages * kPageSize * kHeadsK * kHeadDim);
  std::vector<float> whole(q.size()), split(q.size());

  // Pages lie in the pool in any order; the second sequence has not filled its last one.
  std::vector<std::int32_t> page_table(static_cast<std::size_t>(kPages));
  std::iota(page_table.begin(), page_table.end(), 0);
  std::shuffle(page_table.begin(), page_table.end(), std::mt19937(2));
  const std::vector<std::int32_t> seqused{4096, 2999};

  const auto pool = [](std::vector<float>& values) {
    return heed::contiguous(values.data(), heed::DType::f32,
                            {kPages, kPageSize, kHeadsK, kHeadDim});
  };
  const auto rows = [](std::vector<float>& values) {
    return heed::contiguous(values.data(), heed::DType::f32, {kBatch, 1, kHeadsQ, kHeadDim});
  };
  heed::ForwardProblem problem{.q = rows(q),
                               .k = pool(k),
                               .v = pool(v),
                               .out = rows(whole),
                               .band = heed::kCausal,
                               .sequences = {.seqused_k = seqused.data()},
                               .paged = {page_table.data(), kMaxPages}};
  if (!run(problem, 1)) return 1;
  problem.out = rows(split);
  if (!run(problem, 4)) return 1;

  float worst = 0.f;
  for (std::size_t i = 0; i < whole.size(); ++i)
    worst = std::max(worst, std::fabs(whole[i] - split[i]));
  std::printf("largest difference between 1 and 4 splits: %g\n", double{worst});
  return worst < 1e-5f ? 0 : 1;
}
