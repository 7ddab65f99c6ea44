// The gate catches planted bugs: a small tiled kernel of its own, right and wrong in seven ways.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <map>

#include "core/half.hpp"
#include "core/softmax_state.hpp"
#include "support/gate.hpp"
#include "support/naive.hpp"
#include "support/problem.hpp"

namespace heed::test {
namespace {

enum class Bug {
  none,
  last_key_dropped,
  diagonal_one_further,
  one_score_dropped,
  last_rescale_missing,
  pad_column_in_sum,
  delta_scaled,
  last_gradients_zero,
};
constexpr const char* kBugNames[] = {"none",
                                     "last key dropped",
                                     "causal diagonal + 1",
                                     "one (row, key) score dropped",
                                     "last tile's rescale missing",
                                     "zero pad column in the row sum",
                                     "delta scaled by 0.98",
                                     "dS zero for the last 3 keys"};

constexpr int kTile = 64, kDim = 64, kRows = 48, kKeys = 4097;
using Row = std::array<float, kDim>;

// Forward and backward of one head under a causal mask, as a tiled kernel does it: 64 keys a step,
// fp32 sums, P and dS rounded to the operand before they are multiplied again.
class TiledKernel {
 public:
  TiledKernel(const Problem& p, Bug bug) : bug_(bug), bf16_(p.dtype == DType::bf16) {
    q_ = rows_of(p.forward.q);
    k_ = rows_of(p.forward.k);
    v_ = rows_of(p.forward.v);
    dout_ = rows_of(p.backward.dout);
    out.resize(q_.size());
    dq.resize(q_.size());
    dk.resize(k_.size());
    dv.resize(k_.size());
    for (int row = 0; row < kRows; ++row) forward(row);
    for (int row = 0; row < kRows; ++row) backward(row);
  }

  std::vector<Row> out, dq, dk, dv;
  std::array<float, kRows> lse{};

  std::vector<double> rounded(const std::vector<Row>& rows) const {
    std::vector<double> all;
    for (const Row& row : rows)
      for (const float x : row) all.push_back(double{in_tensor(x)});
    return all;
  }

 private:
  static std::vector<Row> rows_of(const ConstTensorView& x) {
    std::vector<Row> rows(static_cast<std::size_t>(x.seqlen()));
    for (std::size_t r = 0; r < rows.size(); ++r)
      for (std::size_t c = 0; c < kDim; ++c)
        rows[r][c] = static_cast<float>(
            load(x.dtype, x.data,
                 static_cast<std::int64_t>(r) * x.stride[1] + static_cast<std::int64_t>(c)));
    return rows;
  }
  float in_tensor(float x) const { return bf16_ ? to_float(from_float<bf16>(x)) : x; }
  static float dot(const Row& a, const Row& b) {
    float sum = 0;
    for (std::size_t c = 0; c < kDim; ++c) sum = std::fma(a[c], b[c], sum);
    return sum;
  }

  int keys() const { return bug_ == Bug::last_key_dropped ? kKeys - 1 : kKeys; }
  bool visible(int row, int key) const {
    if (bug_ == Bug::one_score_dropped && row == 7 && key == 11) return false;
    return key <= row + kKeys - kRows + (bug_ == Bug::diagonal_one_further ? 1 : 0);
  }
  float score(int row, int key) const {
    return dot(q_[static_cast<std::size_t>(row)], k_[static_cast<std::size_t>(key)]);
  }
  static constexpr float kFactor = static_cast<float>(0.125 * kLog2e);  // 1 / sqrt(64)

  void forward(int row) {
    SoftmaxState state;
    Row acc{};
    for (int begin = 0; begin < keys(); begin += kTile) {
      const int end = std::min(begin + kTile, keys());
      std::array<float, kTile> s{};
      float max = state.max;
      for (int key = begin; key < end; ++key) {
        float& x = s[static_cast<std::size_t>(key - begin)];
        x = visible(row, key) ? score(row, key) : -kInfinity;
        max = std::max(max, x * kFactor);
      }
      const bool last = end == keys();
      const float scale = bug_ == Bug::last_rescale_missing && last ? 1.f : rescale(state.max, max);
      state = {max, state.sum * scale};
      for (float& x : acc) x *= scale;
      for (int key = begin; key < end; ++key) {
        const float weight =
            std::exp2(std::fma(s[static_cast<std::size_t>(key - begin)], kFactor, -max));
        state.sum += weight;
        for (std::size_t c = 0; c < kDim; ++c)
          acc[c] = std::fma(in_tensor(weight), v_[static_cast<std::size_t>(key)][c], acc[c]);
      }
    }
    if (bug_ == Bug::pad_column_in_sum) state.sum += std::exp2(-state.max);
    const auto r = static_cast<std::size_t>(row);
    lse[r] = natural_lse(state);
    for (std::size_t c = 0; c < kDim; ++c) out[r][c] = in_tensor(acc[c] / state.sum);
  }

  void backward(int row) {
    const auto r = static_cast<std::size_t>(row);
    float delta = dot(out[r], dout_[r]);
    if (bug_ == Bug::delta_scaled) delta *= 0.98f;
    const auto lse_log2e = static_cast<float>(double{lse[r]} * kLog2e);
    for (int key = 0; key < keys(); ++key) {
      if (!visible(row, key)) continue;
      const auto j = static_cast<std::size_t>(key);
      const float weight = std::exp2(std::fma(score(row, key), kFactor, -lse_log2e));
      float ds = weight * (dot(dout_[r], v_[j]) - delta);
      if (bug_ == Bug::last_gradients_zero && key >= kKeys - 3) ds = 0;
      ds = in_tensor(ds);
      for (std::size_t c = 0; c < kDim; ++c) {
        dq[r][c] = std::fma(0.125f * ds, k_[j][c], dq[r][c]);
        dk[j][c] = std::fma(0.125f * ds, q_[r][c], dk[j][c]);
        dv[j][c] = std::fma(in_tensor(weight), dout_[r][c], dv[j][c]);
      }
    }
  }

  const Bug bug_;
  const bool bf16_;
  std::vector<Row> q_, k_, v_, dout_;
};

// What each rule says of one bug on one kind of input.
struct Findings {
  double naive_rule = 0;  // fails above 1
  double worst = 0;       // z
  double lse = 0;         // relative
  bool caught = false;
};

class Judge {
 public:
  Judge(Inputs inputs, DType dtype)
      : problem_(shape_of(inputs), dtype, 11),
        forward_(oracle(problem_.forward, rounding_of(dtype))),
        backward_(oracle(problem_.backward, rounding_of(dtype))),
        naive_(naive(problem_.backward, true)) {}

  Findings judge(Bug bug) {
    const TiledKernel kernel(problem_, bug);
    Findings found;
    const bool gaussian = problem_.shape.inputs == Inputs::gaussian;
    const auto add = [&](const char* name, const TensorView& view, const Oracle& expected,
                         const std::vector<Row>& rows, const std::vector<double>& naive_rows) {
      const std::vector<double> got = kernel.rounded(rows);
      const bool of_keys = name[1] == 'k' || name[1] == 'v';
      const Verdict v =
          compare(name, view, expected, got, {gaussian, of_keys ? std::size_t{kDim} : 0});
      found.worst = std::max(found.worst, v.worst);
      found.caught = found.caught || !v.failure.empty();
      found.naive_rule =
          std::max(found.naive_rule, naive_ratio(view.dtype, expected.value, got, naive_rows));
    };
    const BackwardProblem& b = problem_.backward;
    add("out", problem_.forward.out, forward_.out, kernel.out, naive_.out);
    add("dq", b.dq, backward_.dq, kernel.dq, naive_.dq);
    add("dk", b.dk, backward_.dk, kernel.dk, naive_.dk);
    add("dv", b.dv, backward_.dv, kernel.dv, naive_.dv);
    for (int row = 0; row < kRows; ++row) {
      const auto r = static_cast<std::size_t>(row);
      problem_.forward.lse[row] = kernel.lse[r];
      const double size = std::max({1., std::abs(forward_.lse.value[r]), forward_.score_size[r]});
      found.lse =
          std::max(found.lse, std::abs(double{kernel.lse[r]} - forward_.lse.value[r]) / size);
    }
    found.caught = found.caught || !compare_lse(problem_.forward, forward_).failure.empty();
    return found;
  }

 private:
  static Shape shape_of(Inputs inputs) {
    Shape s;
    s.name = "mutants";
    s.seqlens_q = {kRows};
    s.seqlens_k = {kKeys};
    s.band = kCausal;
    s.inputs = inputs;
    return s;
  }
  static Rounding rounding_of(DType dtype) {
    const double u = unit_roundoff(dtype);
    return {.tensor = u,
            .operand = u,
            .delta = u,
            .accumulate = 0x1p-24,
            .exp_ulp = 2,
            .tanh_ulp = 4,
            .flush = 0x1p-125,
            .smallest = dtype == DType::bf16 ? 0x1p-133 : 0x1p-149};
  }

  Problem problem_;
  ForwardOracle forward_;
  BackwardOracle backward_;
  Naive naive_;
};

class Mutants : public testing::TestWithParam<DType> {};

TEST_P(Mutants, TheGatePassesTheRightKernelAndCatchesEveryBug) {
  const Inputs kinds[] = {Inputs::gaussian, Inputs::planted_max};
  std::map<Bug, std::array<Findings, 2>> table;
  for (std::size_t i = 0; i < 2; ++i) {
    Judge judge(kinds[i], GetParam());
    for (int bug = 0; bug < 8; ++bug)
      table[static_cast<Bug>(bug)][i] = judge.judge(static_cast<Bug>(bug));
  }
  std::printf("%s, %d keys, %d causal queries, head_dim %d\n", heed::name_of(GetParam()), kKeys,
              kRows, kDim);
  std::printf("%-32s | %-31s | %-31s | caught\n%-32s | %9s %9s %11s | %9s %9s %11s |\n", "",
              "Gaussian", "maxima planted in every tile", "bug", "2x naive", "max z", "LSE",
              "2x naive", "max z", "LSE");
  for (const auto& [bug, found] : table) {
    std::printf("%-32s |", kBugNames[static_cast<int>(bug)]);
    for (const Findings& f : found)
      std::printf(" %9.2f %9.1f %11.1e |", f.naive_rule, f.worst, f.lse);
    const bool caught = found[0].caught || found[1].caught;
    std::printf(" %s\n", caught ? "yes" : "no");
    EXPECT_EQ(caught, bug != Bug::none) << kBugNames[static_cast<int>(bug)];
  }
}
INSTANTIATE_TEST_SUITE_P(DTypes, Mutants, testing::Values(DType::bf16, DType::f32),
                         [](const auto& dtype) { return std::string(heed::name_of(dtype.param)); });

}  // namespace
}  // namespace heed::test
