// The row of examples/06_kernel_row.cpp is held to what every row is held to.
#include <gtest/gtest.h>

#include "support/check.hpp"
#include "support/shapes.hpp"

namespace heed::test {
namespace {

TEST(KernelRow, IsTheOnlyOne) {
  ASSERT_EQ(registry().size(), 1u);
  EXPECT_EQ(name_of(registry().front()), "scalar/forward/f32");
}

TEST(KernelRow, MatchesTheOracle) {
  CheckOptions options;
  options.dtypes = {DType::f32};
  options.compare_naive = false;
  int ran = 0;
  for (const auto* shapes : {&curated_shapes(), &decode_shapes()})
    for (const Shape& shape : *shapes) {
      ran += check_shape(shape, 1, options);
      if (HasFailure()) return;
    }
  EXPECT_GE(ran, 100);
}

}  // namespace
}  // namespace heed::test
