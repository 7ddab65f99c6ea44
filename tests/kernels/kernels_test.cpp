// Every kernel of the table on the chosen shapes against the oracle.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>

#include "support/check.hpp"
#include "support/shapes.hpp"

namespace heed::test {
namespace {

class Curated : public testing::TestWithParam<Shape> {};
class Decode : public testing::TestWithParam<Shape> {};

std::string test_name(const testing::TestParamInfo<Shape>& info) { return info.param.name; }

// On a GPU that seems to have two multiprocessors a block computes many items, one after another.
void check_few_blocks(const Shape& shape) {
  if (!Device::cuda().ok()) return;
  CheckOptions few;
  few.dtypes = {DType::bf16};
  few.compare_naive = false;
  few.gpu_only = true;
  few.run.multiprocessors = 2;
  check_shape(shape, 2, few);
}

TEST_P(Curated, EveryKernelMatchesTheOracle) {
  const Shape& shape = GetParam();
  const int ran = check_shape(shape, 1);
  check_few_blocks(shape);
  const bool wide = std::max(shape.head_dim, shape.dim_v()) > 256;  // CPU kernels only
  if (!wide || std::getenv("HEED_TEST_ROWS") == nullptr) {
    EXPECT_GT(ran, 0);
  }
}
INSTANTIATE_TEST_SUITE_P(Shapes, Curated, testing::ValuesIn(curated_shapes()), test_name);

TEST_P(Decode, EveryKernelMatchesTheOracle) {
  EXPECT_GT(check_shape(GetParam(), 1), 0);
  for (const int splits : {2, 3}) {  // a GPU joins two parts otherwise than more
    CheckOptions split;
    split.run = {.workers = 2, .splits = splits};
    split.compare_naive = false;
    check_shape(GetParam(), 2, split);
  }
}
INSTANTIATE_TEST_SUITE_P(Shapes, Decode, testing::ValuesIn(decode_shapes()), test_name);

class Larger : public testing::TestWithParam<Shape> {};
TEST_P(Larger, EveryGpuKernelMatchesTheOracle) {
  if (!Device::cuda().ok()) GTEST_SKIP() << Device::cuda().status().message();
  CheckOptions options;
  options.dtypes = {DType::bf16, DType::f16};
  options.compare_naive = false;
  options.gpu_only = true;
  EXPECT_GT(check_shape(GetParam(), 1, options), 0);
  check_few_blocks(GetParam());
}
INSTANTIATE_TEST_SUITE_P(Shapes, Larger, testing::ValuesIn(larger_shapes()), test_name);

// Every pair of lengths around the vector, panel and tile sizes.
TEST(Sweep, LengthsAroundEveryTileSize) {
  CheckOptions options;
  options.dtypes = {DType::f32, DType::bf16};
  options.compare_naive = false;
  const int lengths[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 95, 96, 97, 191, 193};
  for (const int queries : lengths)
    for (const int keys : lengths) {
      Shape shape;
      shape.name = "sweep";
      shape.seqlens_q = {queries};
      shape.seqlens_k = {keys};
      shape.head_dim = 8;
      shape.band = (queries + keys) % 2 == 0 ? kCausal : kFull;
      shape.inputs = queries % 3 == 0 ? Inputs::planted_max : Inputs::gaussian;
      options.max_head_dim = 64;  // of a GPU's kernels: they differ in nothing that lengths reach
      check_shape(shape, 1, options);
      if (HasFailure()) return;
    }
}

// A kernel that no shape reaches would pass everything.
TEST(Coverage, EveryRowServesManyShapes) {
  std::map<const KernelRow*, int> served;
  const bool gpu = std::ranges::any_of(
      runnable_rows(), [](const KernelRow* row) { return row->arch >= Arch::sm80; });
  for (const auto* shapes : {&curated_shapes(), &decode_shapes(), &larger_shapes()}) {
    if (shapes == &larger_shapes() && !gpu) continue;
    for (const Shape& shape : *shapes)
      for (const DType dtype : kDTypes) {
        const Problem problem(shape, dtype, 1);
        for (const KernelRow* row : runnable_rows(dtype))
          served[row] += serves(*row, problem) ? 1 : 0;
      }
  }
  // Few shapes are softcapped; a GPU has kernels of its own for them.
  for (const KernelRow* row : runnable_rows())
    EXPECT_GE(served[row], row->score == ScoreKind::softcap ? 2 : 20) << name_of(*row);
}

TEST(Coverage, NamesAreUnique) {
  std::set<std::string> names;
  for (const KernelRow& row : registry())
    EXPECT_TRUE(names.insert(name_of(row)).second) << name_of(row);
}

// The problems would prove little if most results were exactly 0.
TEST(Coverage, MostResultsAreNotZero) {
  int mistrusted = 0;
  for (const Shape& shape : curated_shapes()) {
    const Problem problem(shape, DType::f32, 1);
    const ForwardOracle o = oracle(problem.forward, rounding_of(*runnable_rows().front()));
    std::size_t zeros = 0;
    const std::vector<double> live = o.out.value;
    for (const double x : live) zeros += x == 0 ? 1 : 0;
    if (!live.empty() && zeros * 10 > live.size() * 7) ++mistrusted;
  }
  EXPECT_LE(mistrusted * 10, static_cast<int>(curated_shapes().size()));
}

}  // namespace
}  // namespace heed::test
