// GoogleTest's main, with the summary of what the acceptance rule measured.
#include <gtest/gtest.h>

#include "support/check.hpp"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const int failed = RUN_ALL_TESTS();
  heed::test::print_summary();
  return failed;
}
