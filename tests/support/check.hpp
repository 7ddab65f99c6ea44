// Every kernel of the table on one shape: poison, guards, same bits twice, and the acceptance rule.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "support/gate.hpp"
#include "support/run.hpp"

namespace heed::test {

struct CheckOptions {
  std::vector<DType> dtypes{DType::f32, DType::bf16, DType::f16, DType::f64};
  bool compare_naive = true;
  bool gpu_only = false;
  int max_head_dim = 256;  // GPU kernels made for more are left out
  RunOptions run;
};

// Adds a test failure for everything a kernel gets wrong. Returns how many kernels ran.
int check_shape(const Shape& shape, std::uint64_t seed, const CheckOptions& options = {});

// Runs a kernel; a failure of run() fails the test. False: the kernel does not take such problems.
bool run_checked(const KernelRow& row, Problem& problem, const RunOptions& options = {});

// What stands for a problem in a failure: enough to make it again.
std::string label(const KernelRow& row, const Shape& shape, std::uint64_t seed);

// Per kernel and tensor: worst z, error against the naive composition, FlashAttention's rule.
void print_summary();

}  // namespace heed::test
