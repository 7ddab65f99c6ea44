// The oracle against calculus: finite differences of its own fp64 forward.
#include <gtest/gtest.h>

#include <cmath>

#include "support/gate.hpp"
#include "support/problem.hpp"
#include "support/shapes.hpp"

namespace heed::test {
namespace {

constexpr Rounding kExact{};

// sum(out * dout) + sum(lse * dlse)
double loss(const Problem& p) {
  const ForwardOracle o = oracle(p.forward, kExact);
  const ConstTensorView& g = p.backward.dout;
  double sum = 0;
  std::size_t i = 0;
  const TensorView view{const_cast<void*>(g.data), g.dtype, g.rank, g.shape, g.stride};
  for_each_element(view, [&](std::int64_t offset) {
    const double x = o.out.value[i++];
    if (x != 0) sum += x * load(g.dtype, g.data, offset);
  });
  if (p.backward.dlse != nullptr)
    for (std::size_t r = 0; r < o.lse.value.size(); ++r)
      if (std::isfinite(o.lse.value[r])) sum += o.lse.value[r] * double{p.backward.dlse[r]};
  return sum;
}

// d loss / d element by a central difference of two numbers the element's type can hold.
double slope(const Problem& p, DType dtype, void* data, std::int64_t offset) {
  const double x = load(dtype, data, offset);
  const double step = dtype == DType::f64 ? 0x1p-17 : 0x1p-9;
  store(dtype, data, offset, x + step);
  const double high = load(dtype, data, offset), loss_high = loss(p);
  store(dtype, data, offset, x - step);
  const double low = load(dtype, data, offset), loss_low = loss(p);
  store(dtype, data, offset, x);
  return (loss_high - loss_low) / (high - low);
}

void expect_gradient(const Problem& p, const char* name, const ConstTensorView& of,
                     const std::vector<double>& gradient) {
  const TensorView view{const_cast<void*>(of.data), of.dtype, of.rank, of.shape, of.stride};
  const double tolerance = of.dtype == DType::f64 ? 1e-7 : 2e-4;
  std::size_t i = 0;
  for_each_element(view, [&](std::int64_t offset) {
    const double want = gradient[i++];
    // Every seventh element, and never the poison outside the sequences or a hidden bias.
    if (i % 7 != 0 || !std::isfinite(load(of.dtype, of.data, offset))) return;
    const double got = slope(p, of.dtype, view.data, offset);
    EXPECT_NEAR(want, got, tolerance * std::max(1., std::abs(want))) << name << " " << i - 1;
  });
}

TEST(Reference, GradientsAreFiniteDifferences) {
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    Shape shape = random_shape(seed, 60);
    if (shape.paged() || shape.head_dim > 64 || shape.dim_v() > 64) continue;
    if (shape.inputs != Inputs::integers) shape.inputs = Inputs::gaussian;
    if (shape.bias == BiasKind::f32) shape.bias = BiasKind::tensor;
    if (shape.sinks == Sinks::mixed || shape.sinks == Sinks::minus_infinity)
      shape.sinks = Sinks::zero;
    const Problem p(shape, DType::f64, seed);
    SCOPED_TRACE(describe(shape));
    const BackwardOracle o = oracle(p.backward, kExact);
    expect_gradient(p, "dq", p.forward.q, o.dq.value);
    expect_gradient(p, "dk", p.forward.k, o.dk.value);
    expect_gradient(p, "dv", p.forward.v, o.dv.value);
    if (p.backward.dbias) expect_gradient(p, "dbias", p.forward.bias, o.dbias.value);
    if (p.forward.sink != nullptr) {
      const ConstTensorView sink = contiguous(static_cast<const void*>(p.forward.sink), DType::f32,
                                              std::array<std::int64_t, 3>{shape.heads_q, 1, 1});
      expect_gradient(p, "dsink", sink, o.dsink.value);
    }
    if (HasFailure()) return;
  }
}

// Identities that hold whatever the inputs.
TEST(Reference, SumsOfGradients) {
  Shape shape;
  shape.name = "sums";
  shape.seqlens_q = {30};
  shape.seqlens_k = {50};
  shape.heads_q = 2;
  shape.head_dim = 8;
  shape.bias = BiasKind::tensor;
  shape.band = kCausal;
  const Problem p(shape, DType::f64, 3, Poison::nan, [](Input which, Place, double x) {
    return which == Input::bias && x < -9 ? 0. : x;
  });
  const BackwardOracle o = oracle(p.backward, kExact);
  for (std::size_t row = 0; row < 60; ++row) {
    double sum = 0;
    for (std::size_t key = 0; key < 50; ++key) sum += o.dbias.value[row * 50 + key];
    EXPECT_NEAR(sum, 0, 1e-12);  // a softmax does not see a shift of all its scores
  }
  for (std::size_t c = 0; c < 8; ++c) {
    double of_keys = 0, of_rows = 0;
    for (std::size_t key = 0; key < 50; ++key) of_keys += o.dv.value[key * 8 + c];
    for (std::int64_t row = 0; row < 30; ++row)
      for (std::int64_t head = 0; head < 2; ++head) {
        const ConstTensorView& g = p.backward.dout;
        of_rows += load(g.dtype, g.data,
                        row * g.stride[1] + head * g.stride[2] + static_cast<std::int64_t>(c));
      }
    EXPECT_NEAR(of_keys, of_rows, 1e-10);  // every row's weights sum to 1
  }
}

// The predicted variance is that of the errors: rounding the inputs of the model is not its
// business.
TEST(Reference, VarianceIsZeroOnlyWhereNothingIsSeen) {
  Shape shape;
  shape.seqlens_q = {40};
  shape.seqlens_k = {15};
  shape.band = kCausal;
  shape.head_dim = 8;
  const Problem p(shape, DType::f32, 3);
  const Rounding rounding{.tensor = 0x1p-24,
                          .operand = 0x1p-24,
                          .delta = 0x1p-24,
                          .accumulate = 0x1p-24,
                          .exp_ulp = 2,
                          .tanh_ulp = 4,
                          .flush = 0x1p-125,
                          .smallest = 0x1p-149};
  const ForwardOracle o = oracle(p.forward, rounding);
  for (std::size_t i = 0; i < o.out.value.size(); ++i) {
    const bool blind = i / 8 < 25;  // the first 25 of 40 rows stand before the first key
    EXPECT_EQ(o.out.variance[i] == 0, blind) << i;
    EXPECT_EQ(o.out.value[i] == 0, blind) << i;
    EXPECT_EQ(o.lse.value[i / 8] == -INFINITY, blind) << i;
  }
}

}  // namespace
}  // namespace heed::test
