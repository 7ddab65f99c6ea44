#include "support/check.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>

#include "core/mask.hpp"
#include "core/score.hpp"
#include "core/sequence.hpp"
#include "support/naive.hpp"

namespace heed::test {
namespace {

// ---- what a run of tests found ----

struct Tally {
  int problems = 0;
  int naive_rule_failures = 0;
  double worst = 0, worst_row = 0, rms = 0, bias = 0;
  std::vector<double> ratios;  // rms error over the naive composition's
};

std::map<std::string, std::map<std::string, Tally>>& tallies() {
  static std::map<std::string, std::map<std::string, Tally>> all;
  return all;
}

void record(const KernelRow& row, const std::string& tensor, const Verdict& v) {
  if (v.rows == 0) return;
  Tally& t = tallies()[name_of(row)][tensor];
  ++t.problems;
  t.worst = std::max(t.worst, v.worst);
  t.worst_row = std::max(t.worst_row, v.worst_row);
  if (v.rows >= 32) t.rms = std::max(t.rms, v.rms);
  if (v.rows >= 32) t.bias = std::max(t.bias, v.bias);
}

// ---- one dtype of a shape ----

// By how much a GPU scales dS down in f16; the forward has run.
double ds_scale(const Problem& p) {
  const BackwardProblem& b = p.backward;
  const ForwardProblem& f = b.forward;
  double most_dout = 0, most_v = 0, most_delta = 0;
  const auto row_of = [](const auto& t, const SideSlice& at, std::int64_t token,
                         std::int64_t head) {
    return at.batch * t.batch_stride() + (at.token + token) * t.seqlen_stride() +
           head * t.head_stride();
  };
  for (int entry = 0; entry < batch_entries(f); ++entry) {
    const SequenceSlice at = slice_of(f, entry);
    for (std::int64_t head = 0; head < f.q.heads(); ++head)
      for (int row = 0; row < at.q.length; ++row) {
        double squares = 0, delta = 0;
        for (std::int64_t c = 0; c < f.out.head_dim(); ++c) {
          const double d = load(b.dout.dtype, b.dout.data, row_of(b.dout, at.q, row, head) + c);
          squares += d * d;
          delta += d * load(f.out.dtype, f.out.data, row_of(f.out, at.q, row, head) + c);
        }
        if (b.dlse != nullptr)
          delta -= static_cast<double>(b.dlse[lse_index(f, at, static_cast<int>(head), row)]);
        most_dout = std::max(most_dout, std::sqrt(squares));
        most_delta = std::max(most_delta, std::abs(delta));
      }
    for (std::int64_t head = 0; head < f.k.heads(); ++head)
      for (int key = 0; key < at.k.length; ++key) {
        if (!key_valid(f.intervals, at, key)) continue;
        double squares = 0;
        for (std::int64_t c = 0; c < f.v.head_dim(); ++c) {
          const double x = load(f.v.dtype, f.v.data, row_of(f.v, at.k, key, head) + c);
          squares += x * x;
        }
        most_v = std::max(most_v, std::sqrt(squares));
      }
  }
  return double{f16_ds_scale(static_cast<float>(most_dout), static_cast<float>(most_v),
                             static_cast<float>(most_delta), 1.f / (1.f - f.dropout.probability))};
}

bool same(const Rounding& a, const Rounding& b) {
  return a.tensor == b.tensor && a.operand == b.operand && a.delta == b.delta &&
         a.accumulate == b.accumulate && a.flush == b.flush;
}

// Computes each oracle once, however many kernels ask.
class Checker {
 public:
  Checker(const Shape& shape, DType dtype, std::uint64_t seed, const CheckOptions& options)
      : options_(options),
        shape_(shape),
        seed_(seed),
        first_(shape, dtype, seed, Poison::nan),
        second_(shape, dtype, seed, seed % 2 == 0 ? Poison::infinity : Poison::huge) {}

  bool run(const KernelRow& row) {
    if (!serves(row, first_)) return false;
    SCOPED_TRACE(label(row, shape_, seed_));
    set_crash_context(label(row, shape_, seed_).c_str());
    for (Problem* problem : {&first_, &second_}) {
      problem->reset_outputs();
      if (const Status s = run_row(row, *problem, options_.run); !s.ok()) {
        ADD_FAILURE() << s.message();
        return true;
      }
    }
    const std::string changed = difference(outputs_of(row, first_), outputs_of(row, second_));
    EXPECT_EQ(changed, "")
        << "what must not be read, or the prefill of outputs and workspace, matters";
    if (row.arch == Arch::reference) {
      check_exact(row);
    } else if (row.pass == Pass::backward) {
      check_backward(row);
      if (row.arch >= Arch::sm80) check_any_order(row);
    } else {
      check_forward(row);
    }
    return true;
  }

 private:
  bool gaussian() const { return shape_.inputs == Inputs::gaussian; }
  // HEED_TEST_NAIVE=0 leaves out the comparison that gates nothing.
  bool compare_naive() const {
    static const char* const wanted = std::getenv("HEED_TEST_NAIVE");
    return options_.compare_naive && (wanted == nullptr || std::strcmp(wanted, "0") != 0);
  }

  const ForwardOracle& forward_oracle(const KernelRow& row) {
    for (auto& [rounding, o] : forward_)
      if (same(rounding, rounding_of(row))) return *o;
    forward_.emplace_back(rounding_of(row), std::make_unique<ForwardOracle>(
                                                oracle(first_.forward, rounding_of(row))));
    return *forward_.back().second;
  }
  const BackwardOracle& backward_oracle(const KernelRow& row) {
    Rounding wanted = rounding_of(row);
    if (row.arch >= Arch::sm80 && row.operand == DType::f16) wanted.flush /= ds_scale(first_);
    for (auto& [rounding, o] : backward_)
      if (same(rounding, wanted)) return *o;
    backward_.emplace_back(wanted,
                           std::make_unique<BackwardOracle>(oracle(first_.backward, wanted)));
    return *backward_.back().second;
  }
  const Naive& naive_results() {
    if (naive_ == nullptr)
      naive_ = std::make_unique<Naive>(naive(first_.backward, !shape_.paged()));
    return *naive_;
  }

  void judge(const KernelRow& row, const std::string& name, const TensorView& view,
             const Oracle& expected, const std::vector<double>* naive) {
    const std::vector<double> got = values(view);
    const bool of_keys = name == "dk" || name == "dv";
    const auto sequences = static_cast<std::size_t>(shape_.heads_k) * shape_.seqlens_k.size();
    // A row of dbias has one lse and one delta, whose errors all its keys share.
    const std::size_t independent = of_keys ? static_cast<std::size_t>(view.head_dim()) * sequences
                                    : name == "dbias" && view.head_dim() > 0
                                        ? static_cast<std::size_t>(view.numel() / view.head_dim())
                                        : 0;
    const Verdict v = compare(name, view, expected, got, {gaussian(), independent});
    EXPECT_EQ(v.failure, "");
    record(row, name, v);
    if (naive == nullptr || v.rows == 0) return;
    Tally& tally = tallies()[name_of(row)][name];
    if (naive_ratio(view.dtype, expected.value, got, *naive) > 1) ++tally.naive_rule_failures;
    if (!gaussian() || v.rows < 32) return;
    double squares = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double error = (*naive)[i] - expected.value[i];
      squares += error * error;
    }
    const double width = static_cast<double>(view.head_dim());
    const double theirs = std::sqrt(squares / (width * static_cast<double>(v.rows)));
    if (theirs > 0) tally.ratios.push_back(v.rms_error / theirs);
  }

  void check_forward(const KernelRow& row) {
    const ForwardOracle& expected = forward_oracle(row);
    judge(row, "out", first_.forward.out, expected.out,
          compare_naive() ? &naive_results().out : nullptr);
    const Verdict lse = compare_lse(first_.forward, expected);
    EXPECT_EQ(lse.failure, "");
    record(row, "lse", lse);
  }

  void check_backward(const KernelRow& row) {
    const BackwardOracle& expected = backward_oracle(row);
    const BackwardProblem& b = first_.backward;
    judge(row, "dq", b.dq, expected.dq, compare_naive() ? &naive_results().dq : nullptr);
    judge(row, "dk", b.dk, expected.dk, compare_naive() ? &naive_results().dk : nullptr);
    judge(row, "dv", b.dv, expected.dv, compare_naive() ? &naive_results().dv : nullptr);
    if (b.dbias) judge(row, "dbias", b.dbias, expected.dbias, nullptr);
    const Verdict dsink = compare_dsink(b, expected);
    EXPECT_EQ(dsink.failure, "");
    record(row, "dsink", dsink);
  }

  // A GPU adds up dq in any order unless asked for one.
  void check_any_order(const KernelRow& row) {
    RunOptions options = options_.run;
    options.deterministic = false;
    first_.reset_outputs();
    const Status s = run_row(row, first_, options);
    EXPECT_TRUE(s.ok()) << s.message();
    check_backward(row);
  }

  // The reference row is the oracle's own text: nothing but the last rounding may differ.
  void check_exact(const KernelRow& row) {
    const auto rounded = [](DType type, std::vector<double> exact) {
      for (double& x : exact) {
        std::uint64_t memory = 0;
        store(type, &memory, 0, x);
        x = load(type, &memory, 0);
      }
      return exact;
    };
    std::vector<double> want;
    const auto append = [&](DType type, const Oracle& part) {
      const std::vector<double> values = rounded(type, part.value);
      want.insert(want.end(), values.begin(), values.end());
    };
    if (row.pass == Pass::backward) {
      const BackwardOracle& o = backward_oracle(row);
      for (const Oracle* part : {&o.dq, &o.dk, &o.dv}) append(row.dtype, *part);
      append(DType::f32, o.dbias);
      append(DType::f32, o.dsink);
    } else {
      const ForwardOracle& o = forward_oracle(row);
      append(row.dtype, o.out);
      if (shape_.lse) append(DType::f32, o.lse);
    }
    EXPECT_EQ(difference(want, outputs_of(row, first_)), "") << "expected the oracle's own values";
  }

  const CheckOptions& options_;
  const Shape& shape_;
  const std::uint64_t seed_;
  Problem first_, second_;
  std::vector<std::pair<Rounding, std::unique_ptr<ForwardOracle>>> forward_;
  std::vector<std::pair<Rounding, std::unique_ptr<BackwardOracle>>> backward_;
  std::unique_ptr<Naive> naive_;
};

}  // namespace

std::string label(const KernelRow& row, const Shape& shape, std::uint64_t seed) {
  return name_of(row) + " on " + describe(shape) + ", seed " + std::to_string(seed);
}

bool run_checked(const KernelRow& row, Problem& problem, const RunOptions& options) {
  if (!serves(row, problem)) return false;
  set_crash_context(label(row, problem.shape, problem.seed).c_str());
  problem.reset_outputs();
  const Status status = run_row(row, problem, options);
  EXPECT_TRUE(status.ok()) << label(row, problem.shape, problem.seed) << ": " << status.message();
  return true;
}

int check_shape(const Shape& shape, std::uint64_t seed, const CheckOptions& options) {
  int ran = 0;
  for (const DType dtype : options.dtypes) {
    std::unique_ptr<Checker> checker;
    for (const KernelRow* row : runnable_rows(dtype)) {
      const bool on_gpu = row->arch >= Arch::sm80;
      if (on_gpu ? row->max_head_dim > options.max_head_dim : options.gpu_only) continue;
      if (checker == nullptr) checker = std::make_unique<Checker>(shape, dtype, seed, options);
      if (checker->run(*row)) ++ran;
    }
  }
  return ran;
}

void print_summary() {
  if (tallies().empty()) return;
  std::printf(
      "\nWorst error in standard deviations of the rounding model, and beside it the common rule\n"
      "\"at most twice the error of the naive composition\" (which gates nothing here).\n"
      "%-28s %-6s %9s %7s %7s %7s %7s  %-14s %s\n",
      "kernel", "tensor", "problems", "max z", "row z", "rms z", "bias", "ours / naive",
      "naive rule broken");
  for (auto& [kernel, tensors] : tallies())
    for (auto& [tensor, t] : tensors) {
      std::printf("%-28s %-6s %9d %7.2f %7.2f %7.2f %7.2f  ", kernel.c_str(), tensor.c_str(),
                  t.problems, t.worst, t.worst_row, t.rms, t.bias);
      if (t.ratios.empty()) {
        std::printf("%-14s ", "-");
      } else {
        const auto middle = t.ratios.begin() + static_cast<std::ptrdiff_t>(t.ratios.size() / 2);
        std::nth_element(t.ratios.begin(), middle, t.ratios.end());
        std::printf("%-14.2f ", *middle);
      }
      std::printf("%d\n", t.naive_rule_failures);
    }
}

}  // namespace heed::test
