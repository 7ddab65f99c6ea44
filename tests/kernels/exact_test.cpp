// What needs no tolerance: masks read out of the results, sums of integers, values that are copied.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "core/philox.hpp"
#include "support/check.hpp"

namespace heed::test {
namespace {

Shape base(int queries, int keys) {
  Shape s;
  s.name = "exact";
  s.seqlens_q = {queries, queries};
  s.seqlens_k = {keys, keys};
  s.heads_q = 4;
  s.heads_k = 2;
  s.head_dim = 16;
  return s;
}

// Calls body(row, make) for every kernel and size it takes; make(override) builds the problem.
using Make = std::function<std::unique_ptr<Problem>(const Override&)>;
void for_every_kernel(const std::vector<Shape>& shapes,
                      const std::function<void(const KernelRow&, const Make&)>& body) {
  for (const Shape& shape : shapes)
    for (const KernelRow* row : runnable_rows()) {
      const Make make = [&](const Override& change) {
        return std::make_unique<Problem>(shape, row->dtype, 3, Poison::nan, change);
      };
      if (!serves(*row, *make({}))) continue;
      SCOPED_TRACE(label(*row, shape, 3));
      body(*row, make);
      if (testing::Test::HasFailure()) return;
    }
}

std::vector<double> exact_results(const KernelRow& row, const Problem& p) {
  const Rounding rounding = rounding_of(row);
  if (row.pass != Pass::backward) return oracle(p.forward, rounding).out.value;
  const BackwardOracle o = oracle(p.backward, rounding);
  std::vector<double> all = o.dq.value;
  all.insert(all.end(), o.dk.value.begin(), o.dk.value.end());
  all.insert(all.end(), o.dv.value.begin(), o.dv.value.end());
  return all;
}

// Masks of every kind on sizes around a tile, and a few query rows for the decode kernels.
std::vector<Shape> masks() {
  std::vector<Shape> all;
  for (const auto& [queries, keys] : {std::pair{40, 97}, {97, 40}, {3, 200}}) {
    std::vector<std::function<void(Shape&)>> kinds = {
        [](Shape&) {},
        [](Shape& s) { s.band = kCausal; },
        [](Shape& s) { s.band = sliding_window(5); },
        [](Shape& s) { s.band = {.left = 3, .right = 4}; },
        [](Shape& s) { s.band = chunked(7); },
        [](Shape& s) { s.intervals = true; },
        [](Shape& s) { s.key_bits = true; },
        [](Shape& s) { s.bias = BiasKind::boolean; },
        [](Shape& s) { s.bias = BiasKind::f32; },
        [](Shape& s) {
          s.key_bits = s.intervals = true;
          s.band = {.left = 30, .right = 2, .chunk = 19};
          s.layout_q = s.layout_k = Layout::packed;
        },
        [](Shape& s) {
          s.key_bits = true;
          s.layout_k = Layout::padded;
          s.seqused = true;
        }};
    for (const auto& kind : kinds) {
      Shape s = base(queries, keys);
      kind(s);
      all.push_back(s);
    }
  }
  return all;
}

// With V = 1 on the diagonal, out is P: a weight is 0 exactly where the mask hides the key.
TEST(Exact, WeightsAreZeroExactlyWhereTheMaskHides) {
  std::vector<Shape> shapes = masks();
  for (Shape& s : shapes) s.head_dim_v = s.seqlens_k[0];
  for_every_kernel(shapes, [](const KernelRow& row, const Make& make) {
    if (row.pass == Pass::backward) return;
    const auto p = make([](Input which, Place at, double x) {
      if (which == Input::v) return at.channel == at.token ? 1. : 0.;
      return which == Input::bias ? x : 0.5 * x;
    });
    run_checked(row, *p);
    const std::vector<double> want = exact_results(row, *p), got = values(p->forward.out);
    for (std::size_t i = 0; i < want.size(); ++i) ASSERT_EQ(want[i] == 0, got[i] == 0) << "element " << i;
  });
}

// A dout of one row reaches exactly the keys that the row sees.
TEST(Exact, GradientsReachExactlyTheVisibleKeys) {
  for_every_kernel(masks(), [](const KernelRow& row, const Make& make) {
    if (row.pass != Pass::backward) return;
    for (const int only : {0, 17, 39}) {
      const auto p = make([&](Input which, Place at, double x) {
        if (which == Input::dout) return at.token == only && at.head == 1 ? 1 + std::abs(x) : 0;
        return which == Input::bias ? x : 0.5 * x;
      });
      run_checked(row, *p);
      const BackwardOracle o = oracle(p->backward, rounding_of(row));
      const std::vector<double> dv = values(p->backward.dv), dk = values(p->backward.dk);
      for (std::size_t i = 0; i < dv.size(); ++i) ASSERT_EQ(o.dv.value[i] == 0, dv[i] == 0) << "dv " << i;
      for (std::size_t i = 0; i < dk.size(); ++i)
        if (o.dk.value[i] == 0) {
          ASSERT_EQ(dk[i], 0) << "dk " << i;
        }
    }
  });
}

TEST(Exact, NoGradientIsZeroGradient) {
  for_every_kernel(masks(), [](const KernelRow& row, const Make& make) {
    if (row.pass != Pass::backward) return;
    const auto p = make([](Input which, Place, double x) { return which == Input::dout ? 0 : x; });
    run_checked(row, *p);
    for (const double x : outputs_of(row, *p)) ASSERT_EQ(x, 0);
  });
}

// The pattern comes from Philox itself, not from heed's helpers.
TEST(Exact, DropoutKeepsWhatPhiloxSays) {
  std::vector<Shape> shapes;
  for (const auto& [queries, keys] : {std::pair{40, 97}, {2, 200}})
    for (const float probability : {0.1f, 0.5f, 0.8f}) {
      Shape s = base(queries, keys);
      s.dropout = probability;
      s.head_dim_v = keys;
      s.layout_k = Layout::padded;
      s.seqused = true;
      shapes.push_back(s);
    }
  for_every_kernel(shapes, [](const KernelRow& row, const Make& make) {
    if (row.pass == Pass::backward) return;
    const auto p = make([](Input which, Place at, double x) {
      if (which == Input::v) return at.channel == at.token ? 1. : 0.;
      return 0.5 * x;
    });
    run_checked(row, *p);
    const double threshold = std::floor(double{p->shape.dropout} * 0x1p32);
    const std::vector<double> out = p->tokens(p->forward.out, p->q_slices);
    std::size_t i = 0;
    for (std::uint32_t entry = 0; entry < 2; ++entry)
      for (std::uint32_t r = 0; r < static_cast<std::uint32_t>(p->shape.seqlens_q[0]); ++r)
        for (std::uint32_t head = 0; head < 4; ++head)
          for (std::uint32_t key = 0; key < static_cast<std::uint32_t>(p->shape.seqlens_k[0]); ++key, ++i) {
            const PhiloxBlock words = philox(*p->forward.dropout.seed, {r, key / 4, head, entry});
            ASSERT_EQ(out[i] != 0, static_cast<double>(words[key % 4]) >= threshold)
                << "entry " << entry << " row " << r << " head " << head << " key " << key;
          }
  });
}

// Equal scores, small integers, a power of two of visible keys: every sum and quotient is exact.
TEST(Exact, MeansOfIntegersAreExact) {
  std::vector<Shape> shapes;
  for (const int queries : {3, 50})
    for (const auto& [band, keys] : {std::pair{kFull, 128}, {Band{.left = 31, .right = 0}, 90},
                                     {Band{.left = 10, .right = 5}, 100}}) {
      Shape s = base(queries, keys);
      s.band = band;
      s.inputs = Inputs::q_zero;
      shapes.push_back(s);
    }
  for_every_kernel(shapes, [](const KernelRow& row, const Make& make) {
    if (row.pass == Pass::backward) return;
    const auto p = make({});
    run_checked(row, *p);
    const std::vector<double> want = exact_results(row, *p), got = values(p->forward.out);
    const std::int64_t row_elements = p->forward.out.numel() / p->forward.out.seqlen() / 2;
    // The last rows of the (10, 5) band see fewer keys.
    const std::size_t whole = p->shape.band.right == 5 ? static_cast<std::size_t>(
        row_elements * std::max<std::int64_t>(0, p->forward.out.seqlen() - 5)) : want.size();
    for (std::size_t i = 0; i < whole; ++i) ASSERT_EQ(want[i], got[i]) << "element " << i;
  });
}

// One key ahead of all others by more than exp can hold: out is its v, bit for bit.
TEST(Exact, TheDominantKeyIsCopied) {
  for (const int target : {0, 1, 63, 95, 96, 100, 191, 192, 199}) {
    for_every_kernel({base(2, 200), base(30, 200)}, [&](const KernelRow& row, const Make& make) {
      if (row.pass == Pass::backward) return;
      const auto p = make([&](Input which, Place at, double x) {
        if (which == Input::q) return 8.;
        if (which == Input::k) return at.token == target ? 8. : -8.;
        return x;
      });
      run_checked(row, *p);
      const std::vector<double> out = p->tokens(p->forward.out, p->q_slices);
      const ConstTensorView& v = p->forward.v;
      std::size_t i = 0;
      for (int entry = 0; entry < 2; ++entry)
        for (int r = 0; r < p->shape.seqlens_q[0]; ++r)
          for (int head = 0; head < 4; ++head)
            for (int c = 0; c < 16; ++c, ++i)
              ASSERT_EQ(out[i], load(v.dtype, v.data,
                                     entry * v.stride[0] + target * v.stride[1] +
                                         head / 2 * v.stride[2] + c));
    });
  }
}

// A NaN in a visible key or value is never laundered, and goes nowhere else.
TEST(Exact, NanReachesWhatSeesItAndNothingElse) {
  const int token = 20;
  std::vector<Shape> shapes{base(3, 60), base(40, 60)};
  for (Shape& s : shapes) s.band = kCausal;
  for_every_kernel(shapes, [&](const KernelRow& row, const Make& make) {
    for (const Input where : {Input::k, Input::v, Input::q}) {
      const auto clean = make({});
      const auto planted = make([&](Input which, Place at, double x) {
        const bool here = which == where && at.entry == 0 && at.head == 1 && at.channel == 5 &&
                          at.token == (where == Input::q ? 1 : token);
        return here ? NAN : x;
      });
      for (const auto& p : {clean.get(), planted.get()}) run_checked(row, *p);
      const int queries = clean->shape.seqlens_q[0];
      const auto sees = [&](int entry, int r, int head) {
        if (where == Input::q) return entry == 0 && r == 1 && head == 1;
        return entry == 0 && head / 2 == 1 && token <= r + 60 - queries;
      };
      if (row.pass == Pass::backward) {
        const std::vector<double> want = clean->tokens(clean->backward.dq, clean->q_slices);
        const std::vector<double> got = planted->tokens(planted->backward.dq, planted->q_slices);
        for (std::size_t i = 0; i < want.size(); ++i) {
          const int entry = static_cast<int>(i) / (16 * 4 * queries);
          const int r = static_cast<int>(i) / (16 * 4) % queries, head = static_cast<int>(i) / 16 % 4;
          if (sees(entry, r, head)) {
            ASSERT_TRUE(std::isnan(got[i])) << "dq " << i;
          } else if (entry == 1 || head / 2 == 0) {
            ASSERT_EQ(want[i], got[i]) << "dq " << i;
          }
        }
        continue;
      }
      const std::vector<double> want = clean->tokens(clean->forward.out, clean->q_slices);
      const std::vector<double> got = planted->tokens(planted->forward.out, planted->q_slices);
      for (std::size_t i = 0; i < want.size(); ++i) {
        const int entry = static_cast<int>(i) / (16 * 4 * queries);
        const int r = static_cast<int>(i) / (16 * 4) % queries, head = static_cast<int>(i) / 16 % 4;
        const int channel = static_cast<int>(i) % 16;
        if (sees(entry, r, head) && (where != Input::v || channel == 5)) {
          ASSERT_TRUE(std::isnan(got[i])) << "out " << i;
        } else if (entry == 1 || head / 2 == 0 || (where == Input::v && channel != 5)) {
          ASSERT_EQ(want[i], got[i]) << "out " << i;
        }
      }
      if (where == Input::v) continue;
      const std::vector<double> lse = planted->lse_values();
      for (int head = 0; head < 4; ++head)
        for (int r = 0; r < queries; ++r)
          if (sees(0, r, head)) {
            ASSERT_TRUE(std::isnan(lse[static_cast<std::size_t>(head * queries + r)]));
          }
    }
  });
}

// ---- two ways to say the same ----

void expect_same_bits(const Shape& a, const Shape& b) {
  for (const KernelRow* row : runnable_rows()) {
    Problem first(a, row->dtype, 5), second(b, row->dtype, 5);
    if (!serves(*row, first) || !serves(*row, second)) continue;
    run_checked(*row, first);
    run_checked(*row, second);
    std::vector<double> x = outputs_of(*row, first), y = outputs_of(*row, second);
    if (row->pass == Pass::backward && (a.sinks != Sinks::none) != (b.sinks != Sinks::none))
      (x.size() > y.size() ? x : y).resize(std::min(x.size(), y.size()));  // dsink comes last
    EXPECT_EQ(difference(x, y), "") << name_of(*row) << ": " << describe(a) << " against " << describe(b);
  }
}

TEST(Same, AWindowAsWideAsTheKeysIsNone) {
  for (const int queries : {2, 40}) {
    Shape a = base(queries, 120), b = a;
    b.band = {.left = 200, .right = 200};
    expect_same_bits(a, b);
    a.band = kCausal;
    b.band = {.left = 119, .right = 0};
    expect_same_bits(a, b);
    b.band = chunked(120);
    expect_same_bits(a, b);
  }
}

TEST(Same, OneCausalRowSeesAll) {
  Shape a = base(1, 120), b = a;
  b.band = kCausal;
  expect_same_bits(a, b);
}

TEST(Same, ASinkOfMinusInfinityIsNone) {
  for (const int queries : {2, 40}) {
    Shape a = base(queries, 120), b = a;
    b.sinks = Sinks::minus_infinity;
    expect_same_bits(a, b);
  }
}

TEST(Same, GroupedHeadsEqualRepeatedKeys) {
  for (const int group : {2, 3, 8})
    for (const KernelRow* row : runnable_rows()) {
      if (row->pass == Pass::decode) continue;  // packs the rows of a group into one tile
      Shape grouped = base(50, 120), repeated;
      grouped.band = kCausal;
      grouped.heads_k = 2;
      grouped.heads_q = 2 * group;
      repeated = grouped;
      repeated.heads_k = repeated.heads_q;
      Problem a(grouped, row->dtype, 5);
      if (!serves(*row, a)) continue;
      Problem b(repeated, row->dtype, 5, Poison::nan, [&](Input which, Place at, double x) {
        if (which != Input::k && which != Input::v) return x;
        const ConstTensorView& t = which == Input::k ? a.forward.k : a.forward.v;
        return load(t.dtype, t.data, at.entry * t.stride[0] + at.token * t.stride[1] +
                                         at.head / group * t.stride[2] + at.channel);
      });
      run_checked(*row, a);
      run_checked(*row, b);
      const TensorView &x = row->pass == Pass::backward ? a.backward.dq : a.forward.out;
      const TensorView &y = row->pass == Pass::backward ? b.backward.dq : b.forward.out;
      EXPECT_EQ(difference(values(x), values(y)), "") << name_of(*row) << " group " << group;
      EXPECT_EQ(difference(a.lse_values(), b.lse_values()), "") << name_of(*row) << " group " << group;
    }
}

// Every argument is honoured or refused: changing it changes the result.
TEST(Sensitivity, EveryArgumentMatters) {
  const std::vector<std::pair<const char*, std::function<void(Shape&)>>> changes = {
      {"left", [](Shape& s) { s.band.left = 3; }},
      {"right", [](Shape& s) { s.band.right = 1; }},
      {"chunk", [](Shape& s) { s.band.chunk = 5; }},
      {"scale", [](Shape& s) { s.scale = 0.2f; }},
      {"softcap", [](Shape& s) { s.softcap = 1.f; }},
      {"bias bool", [](Shape& s) { s.bias = BiasKind::boolean; }},
      {"bias float", [](Shape& s) { s.bias = BiasKind::f32; }},
      {"sink", [](Shape& s) { s.sinks = Sinks::zero; }},
      {"dropout", [](Shape& s) { s.dropout = 0.2f; }},
      {"intervals", [](Shape& s) { s.intervals = true; }},
      {"key_bits", [](Shape& s) { s.key_bits = true; }},
      {"dlse", [](Shape& s) { s.dlse = true; }},
      {"seqused", [](Shape& s) { s.seqlens_k = {59, 41}; }}};
  for (const int queries : {3, 40})
    for (const KernelRow* row : runnable_rows()) {
      Problem plain(base(queries, 60), row->dtype, 5);
      if (!serves(*row, plain)) continue;
      run_checked(*row, plain);
      std::vector<double> before = outputs_of(*row, plain);
      for (const auto& [name, change] : changes) {
        if (row->pass != Pass::backward && std::string(name) == "dlse") continue;
        Shape shape = base(queries, 60);
        change(shape);
        Problem changed(shape, row->dtype, 5);
        ASSERT_TRUE(serves(*row, changed)) << name_of(*row) << " " << name;
        run_checked(*row, changed);
        std::vector<double> after = outputs_of(*row, changed);
        after.resize(std::min(before.size(), after.size()));
        std::vector<double> head(before.begin(), before.begin() + static_cast<std::ptrdiff_t>(after.size()));
        EXPECT_NE(difference(head, after), "") << name_of(*row) << " ignores " << name;
      }
    }
}

}  // namespace
}  // namespace heed::test
