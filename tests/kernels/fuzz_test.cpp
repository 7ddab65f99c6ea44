// Random problems: HEED_FUZZ says how many, HEED_FUZZ_SEED where to begin.
#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "support/check.hpp"
#include "support/shapes.hpp"

namespace heed::test {
namespace {

std::uint64_t number_from(const char* variable, std::uint64_t standard) {
  const char* text = std::getenv(variable);
  return text == nullptr ? standard : std::strtoull(text, nullptr, 10);
}

// Of the seeds, every kStep-th one from the parameter on.
constexpr std::uint64_t kStep = 8;
class Fuzz : public testing::TestWithParam<std::uint64_t> {};

TEST_P(Fuzz, EveryKernelMatchesTheOracle) {
  const std::uint64_t count = number_from("HEED_FUZZ", 150);
  const std::uint64_t first = number_from("HEED_FUZZ_SEED", 1);
  for (std::uint64_t seed = first + GetParam(); seed < first + count; seed += kStep) {
    CheckOptions options;
    options.run.workers = 1 + static_cast<int>(seed % 3);
    options.run.splits = static_cast<int>(seed % 4);
    check_shape(random_shape(seed), seed, options);
    if (HasFailure() && number_from("HEED_FUZZ_CONTINUE", 0) == 0) {
      GTEST_FAIL() << "reproduce with HEED_FUZZ=1 HEED_FUZZ_SEED=" << seed;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Seeds, Fuzz, testing::Range(std::uint64_t{0}, kStep));

}  // namespace
}  // namespace heed::test
