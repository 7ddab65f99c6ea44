// Runs one kernel of the table on a test problem, in an exact and guarded workspace. A GPU kernel
// gets a copy of the problem between guards in device memory: in the host's strides, most of them
// odd, where the poison is NaN and the row takes them, else in strides that allow copies of 16 bytes.
#pragma once

#include <string>
#include <vector>

#include "registry.hpp"
#include "support/problem.hpp"

namespace heed::test {

// Threads of its own for every run; `workers` may exceed the machine's.
class ThreadExecutor : public Executor {
 public:
  explicit ThreadExecutor(int workers) : workers_(workers) {}
  int concurrency() const override { return workers_; }
  void run(int workers, void (*body)(void* context, int worker), void* context) override;

 private:
  int workers_;
};

struct RunOptions {
  int workers = 1;
  int splits = 0;
  bool deterministic = true;
  int multiprocessors = 0;  // that a GPU's kernels may use; 0: all
};

// Status of plan() or run(); damage outside the outputs is reported as Code::device.
Status run_forward(const KernelRow& row, Problem& problem, const RunOptions& options = {});
// Runs a forward kernel of the same family first, for out and lse.
Status run_backward(const KernelRow& row, Problem& problem, const RunOptions& options = {});
Status run_row(const KernelRow& row, Problem& problem, const RunOptions& options = {});

// Whether this machine has the instructions; says once on the test's output if not.
bool machine_runs(const KernelRow& row);
inline constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};
// The rows this machine can run, of every dtype or of one. HEED_TEST_ROWS=sm takes those whose
// names begin with it.
std::vector<const KernelRow*> runnable_rows();
std::vector<const KernelRow*> runnable_rows(DType dtype);
// Without the GPU kernels that differ from the ones for head_dim 64 or 192 in nothing but their
// tile.
std::vector<const KernelRow*> distinct_rows(DType dtype);
// Whether the row takes such problems at all (plan() says no with Code::unsupported otherwise).
bool serves(const KernelRow& row, const Problem& problem);

// Everything that a pass writes, bit by bit, in logical order.
std::vector<double> outputs_of(const KernelRow& row, const Problem& problem);
// Empty when two outputs have the same bits (a NaN equals itself), else the first difference.
std::string difference(const std::vector<double>& a, const std::vector<double>& b);

}  // namespace heed::test
