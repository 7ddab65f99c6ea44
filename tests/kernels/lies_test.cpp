// Index arrays in device memory that contradict the tensors: GPU kernels read and write nothing
// outside the caller's buffers, whatever they say.
#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>

#include "core/sequence.hpp"
#include "support/check.hpp"
#include "support/random.hpp"
#include "support/shapes.hpp"

namespace heed::test {
namespace {

// Every index array says something else than the truth; kernels must stay within their buffers.
void lie(Problem& problem, std::uint64_t seed) {
  Random random(seed ^ 0x11E5);
  const auto any = [&] {
    return random.pick(random.between(-5, 300), random.between(-5, 40), -1, 0, 1 << 30, -(1 << 30),
                       std::numeric_limits<int>::max(), std::numeric_limits<int>::min());
  };
  const auto scramble = [&](const std::int32_t* values, std::int64_t count) {
    if (values == nullptr) return;
    for (std::int64_t i = 0; i < count; ++i)
      if (random.chance(0.7)) const_cast<std::int32_t*>(values)[i] = any();
  };
  ForwardProblem& f = problem.forward;
  const std::int64_t entries = batch_entries(f);
  for (const std::int32_t* cu : {f.sequences.cu_seqlens_q, f.sequences.cu_seqlens_k})
    scramble(cu, entries + 1);
  for (const std::int32_t* a :
       {f.sequences.start_q, f.sequences.start_k, f.sequences.seqused_q, f.sequences.seqused_k})
    scramble(a, entries);
  scramble(f.paged.page_table, entries * f.paged.max_pages);
  scramble(f.intervals.rows, 2 * f.q.seqlen() * f.q.batch());
}

void check_lies(const Shape& shape, std::uint64_t seed) {
  for (const DType dtype : {DType::bf16, DType::f16})
    for (const Poison poison : {Poison::nan, Poison::huge}) {
      Problem problem(shape, dtype, seed, poison);
      lie(problem, seed);
      for (const KernelRow* row : distinct_rows(dtype)) {
        if (row->arch < Arch::sm80) continue;  // a CPU refuses such arrays
        RunOptions options;
        options.splits = static_cast<int>(seed % 4);
        options.deterministic = seed % 2 == 0;
        run_checked(*row, problem, options);
      }
      if (testing::Test::HasFailure()) return;
    }
}

// Of the random shapes, every kStep-th one from the parameter on.
constexpr std::uint64_t kStep = 12;
class Lies : public testing::TestWithParam<std::uint64_t> {};

TEST_P(Lies, NothingOutsideTheBuffersIsTouched) {
  if (!Device::cuda().ok()) GTEST_SKIP() << Device::cuda().status().message();
  const char* text = std::getenv("HEED_FUZZ");
  const std::uint64_t count = text == nullptr ? 60 : std::strtoull(text, nullptr, 10);
  std::uint64_t i = 0;
  for (const auto* shapes : {&curated_shapes(), &decode_shapes()})
    for (const Shape& shape : *shapes)
      if (i++ % kStep == GetParam()) check_lies(shape, i);
  for (std::uint64_t seed = 1 + GetParam(); seed <= count && !HasFailure(); seed += kStep)
    check_lies(random_shape(1000 + seed), seed);
}
INSTANTIATE_TEST_SUITE_P(Shapes, Lies, testing::Range(std::uint64_t{0}, kStep));

}  // namespace
}  // namespace heed::test
