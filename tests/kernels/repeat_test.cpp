// Runs that must agree: again, with other threads, with split keys, in parts.
#include <gtest/gtest.h>

#include <cmath>

#include "support/check.hpp"
#include "support/shapes.hpp"

namespace heed::test {
namespace {

TEST(Repeat, ThreadsDoNotChangeABit) {
  std::vector<Shape> shapes;
  for (const auto& all : {curated_shapes(), decode_shapes()})
    for (std::size_t i = 0; i < all.size(); i += 9) shapes.push_back(all[i]);
  for (const Shape& shape : shapes)
    for (const DType dtype : kDTypes) {
      Problem p(shape, dtype, 4);
      for (const KernelRow* row : runnable_rows(dtype)) {
        if (row->arch == Arch::reference) continue;  // one thread always
        if (!run_checked(*row, p, {.workers = 1, .splits = 2})) continue;
        const std::vector<double> one = outputs_of(*row, p);
        for (const int workers : {1, 2, 5}) {
          run_checked(*row, p, {.workers = workers, .splits = 2});
          EXPECT_EQ(difference(one, outputs_of(*row, p)), "")
              << label(*row, shape, 4) << ", " << workers << " workers";
        }
      }
    }
}

TEST(Repeat, SplitKeysMergeWithinTheRule) {
  Shape shape;
  shape.name = "split";
  shape.seqlens_q = {1};
  shape.heads_q = 4;
  shape.head_dim = 32;
  for (const int keys : {2048, 2050, 3001})
    for (const Inputs inputs : {Inputs::gaussian, Inputs::planted_max, Inputs::descending}) {
      shape.seqlens_k = {keys};
      shape.inputs = inputs;
      shape.sinks = keys == 2050 ? Sinks::mixed : Sinks::none;
      for (const KernelRow* row : runnable_rows()) {
        if (row->pass != Pass::decode) continue;
        const std::string name = name_of(*row);
        Problem p(shape, row->dtype, 6);
        if (!serves(*row, p)) continue;
        const ForwardOracle expected = oracle(p.forward, rounding_of(*row));
        for (const int splits : {1, 2, 3, 4}) {
          const Result<Plan> made =
              plan(p.forward, {.arch = row->arch, .units = 2, .smem_bytes = row->smem_bytes},
                   {.splits = splits, .force = name.c_str()});
          ASSERT_TRUE(made.ok()) << made.status().message();
          EXPECT_EQ(made->splits, splits) << name;  // else the test proves nothing
          run_checked(*row, p, {.workers = 2, .splits = splits});
          EXPECT_EQ(compare("out", p.forward.out, expected.out, values(p.forward.out), {}).failure,
                    "")
              << label(*row, shape, 6) << ", " << splits << " splits";
          EXPECT_EQ(compare_lse(p.forward, expected).failure, "")
              << label(*row, shape, 6) << ", " << splits << " splits";
        }
      }
    }
}

// Two halves of the keys, each with its own softmax, weighted by their lse, are the whole.
TEST(Repeat, HalvesOfTheKeysCombineByTheirLse) {
  Shape shape;
  shape.name = "halves";
  shape.seqlens_q = {60};
  shape.seqlens_k = {200};
  shape.head_dim = 32;
  for (const KernelRow* row : runnable_rows()) {
    // The reference row stores rounded halves too, which its own model of one rounding does not
    // cover.
    if (row->pass != Pass::forward || row->dtype != DType::f32 || row->arch == Arch::reference)
      continue;
    Problem whole(shape, row->dtype, 8), part(shape, row->dtype, 8);
    const ForwardOracle expected = oracle(whole.forward, rounding_of(*row));
    for (const int at : {1, 96, 130, 199}) {
      std::vector<double> lse[2], out[2];
      for (const int half : {0, 1}) {
        std::vector<std::int32_t> rows;
        for (int r = 0; r < 60; ++r) {
          rows.push_back(half == 0 ? 0 : at);
          rows.push_back(half == 0 ? at : 200);
        }
        part.forward.intervals.rows = rows.data();
        run_checked(*row, part);
        lse[half] = part.lse_values();
        out[half] = values(part.forward.out);
      }
      std::vector<double> combined(out[0].size());
      for (std::size_t i = 0; i < combined.size(); ++i) {
        const std::size_t r = i / 32;
        const double a = lse[0][r], b = lse[1][r], max = std::max(a, b);
        const double total = max + std::log(std::exp(a - max) + std::exp(b - max));
        combined[i] = std::exp(a - total) * out[0][i] + std::exp(b - total) * out[1][i];
        EXPECT_NEAR(total, expected.lse.value[r], 2e-6 * std::max(1., std::abs(total)));
      }
      EXPECT_EQ(compare("combined", whole.forward.out, expected.out, combined, {}).failure, "")
          << name_of(*row) << " split at " << at;
    }
  }
}

// A prefill in chunks of queries equals the prefill at once.
TEST(Repeat, ChunkedPrefillEqualsOneShot) {
  Shape whole;
  whole.name = "prefill";
  whole.seqlens_q = {150};
  whole.seqlens_k = {150};
  whole.heads_q = 2;
  whole.head_dim = 32;
  whole.band = kCausal;
  for (const KernelRow* row : runnable_rows()) {
    if (row->pass != Pass::forward) continue;
    Problem once(whole, row->dtype, 8);
    if (!run_checked(*row, once)) continue;
    const std::vector<double> want = once.tokens(once.forward.out, once.q_slices);
    int done = 0;
    for (const int chunk : {64, 1, 50, 35}) {
      Shape step = whole;
      step.seqlens_q = {chunk};
      step.seqlens_k = {done + chunk};
      const int first = done;
      Problem p(step, row->dtype, 8, Poison::nan, [&](Input which, Place at, double x) {
        if (which != Input::q) return x;
        const ConstTensorView& q = once.forward.q;
        return load(q.dtype, q.data,
                    (first + at.token) * q.stride[1] + at.head * q.stride[2] + at.channel);
      });
      run_checked(*row, p);
      const std::vector<double> got = p.tokens(p.forward.out, p.q_slices);
      done += chunk;
      if (row->arch >=
          Arch::sm80) {  // a warp rescales its rows together: their bits depend on them
        const ForwardOracle expected = oracle(p.forward, rounding_of(*row));
        EXPECT_EQ(compare("out", p.forward.out, expected.out, values(p.forward.out), {}).failure,
                  "")
            << name_of(*row) << " rows " << first << " to " << done;
        continue;
      }
      const auto begin = want.begin() + first * 2 * 32;
      EXPECT_EQ(difference({begin, begin + chunk * 2 * 32}, got), "")
          << name_of(*row) << " rows " << first << " to " << done;
    }
  }
}

}  // namespace
}  // namespace heed::test
