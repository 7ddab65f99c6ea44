// heed check: every kernel that this machine runs, against the oracle, on a few problems.
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "support/gate.hpp"
#include "support/run.hpp"
#include "verbs.hpp"

namespace heed::tool {
namespace {

using test::Shape;
using test::Verdict;

// Ragged sizes, every layout, every feature once, and an input class that plain numbers do not
// catch.
std::vector<Shape> shapes() {
  using test::Layout;
  return {
      {.name = "causal",
       .seqlens_q = {130},
       .seqlens_k = {130},
       .heads_q = 2,
       .heads_k = 1,
       .head_dim = 64,
       .band = kCausal},
      {.name = "window, planted maxima",
       .seqlens_q = {67},
       .seqlens_k = {200},
       .heads_q = 3,
       .heads_k = 3,
       .head_dim = 40,
       .band = sliding_window(33),
       .inputs = test::Inputs::planted_max},
      {.name = "packed, softcap, sink",
       .seqlens_q = {31, 0, 90},
       .seqlens_k = {31, 5, 90},
       .heads_q = 4,
       .heads_k = 2,
       .head_dim = 72,
       .layout_q = Layout::packed,
       .layout_k = Layout::packed,
       .band = kCausal,
       .softcap = 20,
       .sinks = test::Sinks::low},
      {.name = "padded, bias, dropout",
       .seqlens_q = {12, 70},
       .seqlens_k = {12, 70},
       .heads_q = 2,
       .heads_k = 2,
       .head_dim = 32,
       .layout_q = Layout::padded,
       .layout_k = Layout::padded,
       .bias = test::BiasKind::f32,
       .dropout = 0.2f},
      {.name = "intervals, holes",
       .seqlens_q = {50},
       .seqlens_k = {77},
       .heads_q = 2,
       .heads_k = 2,
       .head_dim = 128,
       .head_dim_v = 64,
       .intervals = true,
       .key_bits = true,
       .dlse = true},
      {.name = "decode, paged",
       .seqlens_q = {1, 1},
       .seqlens_k = {513, 40},
       .heads_q = 8,
       .heads_k = 2,
       .head_dim = 64,
       .layout_k = Layout::paged,
       .band = kCausal},
      {.name = "decode, dense",
       .seqlens_q = {1},
       .seqlens_k = {700},
       .heads_q = 4,
       .heads_k = 2,
       .head_dim = 64,
       .band = kCausal},
  };
}

// Statistics of whole tensors are for the tests' Gaussian problems; here every element counts.
Verdict compare(const char* name, const TensorView& view, const test::Oracle& oracle) {
  const std::size_t channels = static_cast<std::size_t>(view.head_dim() * view.heads());
  return test::compare(name, view, oracle, test::values(view), {.independent = channels});
}

std::vector<Verdict> forward_verdicts(const KernelRow& row, const ForwardProblem& p) {
  const test::ForwardOracle expected = test::oracle(p, rounding_of(row));
  return {compare("out", p.out, expected.out), test::compare_lse(p, expected)};
}

std::vector<Verdict> backward_verdicts(const KernelRow& row, const BackwardProblem& p) {
  const test::BackwardOracle expected = test::oracle(p, rounding_of(row));
  std::vector<Verdict> all{compare("dq", p.dq, expected.dq), compare("dk", p.dk, expected.dk),
                           compare("dv", p.dv, expected.dv)};
  if (p.dbias) all.push_back(compare("dbias", p.dbias, expected.dbias));
  if (p.dsink != nullptr) all.push_back(test::compare_dsink(p, expected));
  return all;
}

struct Outcome {
  int problems = 0;
  double worst = 0;  // standard deviations
  std::vector<std::string> failures;
};

void check_shape(const KernelRow& row, const Shape& shape, Outcome& outcome) {
  test::Problem problem(shape, row.dtype, /*seed=*/1);
  if (!test::serves(row, problem)) return;
  ++outcome.problems;
  const auto failed = [&](const std::string& why) {
    outcome.failures.push_back(fmt::format("{}: {}", shape.name, why));
  };
  if (const Status s = test::run_row(row, problem); !s.ok()) return failed(s.message());
  for (const Verdict& verdict : row.pass == Pass::backward
                                    ? backward_verdicts(row, problem.backward)
                                    : forward_verdicts(row, problem.forward)) {
    outcome.worst = std::max(outcome.worst, verdict.worst);
    if (!verdict.failure.empty()) failed(verdict.failure);
  }
}

void check(const std::string& only) {
  bool passed = true;
  fmt::print("{:<28}{:>10}{:>12}  (limit {} standard deviations of rounding)\n", "kernel",
             "problems", "worst", test::kElementLimit);
  for (const KernelRow* row : test::runnable_rows()) {
    if (name_of(*row).rfind(only, 0) != 0) continue;
    Outcome outcome;
    for (const Shape& shape : shapes()) check_shape(*row, shape, outcome);
    const bool ok = outcome.failures.empty() && outcome.problems > 0;
    fmt::print("{:<28}{:>10}{:>12.2f}  {}\n", name_of(*row), outcome.problems, outcome.worst,
               ok ? "ok" : "FAILED");
    for (const std::string& failure : outcome.failures) fmt::print("    {}\n", failure);
    passed = passed && ok;
  }
  if (!passed) fail("some kernels do not agree with the oracle");
}

}  // namespace

void add_check(CLI::App& app) {
  CLI::App* verb =
      app.add_subcommand("check", "every kernel this machine runs, against the oracle");
  const auto only = std::make_shared<std::string>();
  verb->add_option("kernel", *only, "only kernels whose names begin so");
  verb->callback([only] { check(*only); });
}

}  // namespace heed::tool
