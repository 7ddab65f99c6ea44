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

// What a problem's results must be; computed once for all kernels.
using Prepare = std::function<std::vector<double>(const Problem&)>;
std::vector<double> exact_out(const Problem& p) { return oracle(p.forward, {}).out.value; }
std::vector<double> exact_dv(const Problem& p) { return oracle(p.backward, {}).dv.value; }
std::vector<double> nothing(const Problem&) { return {}; }

// Runs every kernel that takes a shape, with the inputs changed, then body(row, problem, wanted).
using Body = std::function<void(const KernelRow&, const Problem&, const std::vector<double>&)>;
void for_every_kernel(const std::vector<Shape>& shapes, const Override& change,
                      const Prepare& prepare, const Body& body) {
  for (const Shape& shape : shapes)
    for (const DType dtype : kDTypes) {
      Problem problem(shape, dtype, 3, Poison::nan, change);
      const std::vector<double> wanted = prepare(problem);
      for (const KernelRow* row : distinct_rows(dtype)) {
        SCOPED_TRACE(label(*row, shape, 3));
        if (!run_checked(*row, problem)) continue;
        body(*row, problem, wanted);
        if (testing::Test::HasFailure()) return;
      }
    }
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
  const Override change = [](Input which, Place at, double x) {
    if (which == Input::v) return at.channel == at.token ? 1. : 0.;
    return which == Input::bias ? x : 0.5 * x;
  };
  for_every_kernel(shapes, change, exact_out, [](const auto& row, const auto& p, const auto& want) {
    if (row.pass == Pass::backward) return;
    const std::vector<double> got = values(p.forward.out);
    for (std::size_t i = 0; i < want.size(); ++i)
      ASSERT_EQ(want[i] == 0, got[i] == 0) << "element " << i;
  });
}

// A dout of one row reaches exactly the keys that the row sees.
TEST(Exact, GradientsReachExactlyTheVisibleKeys) {
  std::vector<Shape> shapes = masks();
  std::erase_if(shapes, [](const Shape& s) { return s.seqlens_q[0] < 40; });
  for (const int only : {0, 17, 39}) {
    const Override change = [&](Input which, Place at, double x) {
      if (which == Input::dout) return at.token == only && at.head == 1 ? 1 + std::abs(x) : 0;
      return which == Input::bias ? x : 0.5 * x;
    };
    for_every_kernel(
        shapes, change, exact_dv, [](const auto& row, const auto& p, const auto& want) {
          if (row.pass != Pass::backward) return;
          const std::vector<double> dv = values(p.backward.dv), dk = values(p.backward.dk);
          for (std::size_t i = 0; i < dv.size(); ++i)
            ASSERT_EQ(want[i] == 0, dv[i] == 0) << "dv " << i;
          ASSERT_EQ(dk.size(), dv.size());  // head_dim_v = head_dim
          for (std::size_t i = 0; i < dk.size(); ++i)
            if (want[i] == 0) {
              ASSERT_EQ(dk[i], 0) << "dk " << i;
            }
        });
  }
}

TEST(Exact, NoGradientIsZeroGradient) {
  const Override change = [](Input which, Place, double x) { return which == Input::dout ? 0 : x; };
  for_every_kernel(masks(), change, nothing, [](const auto& row, const auto& p, const auto&) {
    if (row.pass != Pass::backward) return;
    for (const double x : outputs_of(row, p)) ASSERT_EQ(x, 0);
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
  const Override change = [](Input which, Place at, double x) {
    if (which == Input::v) return at.channel == at.token ? 1. : 0.;
    return 0.5 * x;
  };
  for_every_kernel(shapes, change, nothing, [](const auto& row, const auto& p, const auto&) {
    if (row.pass == Pass::backward) return;
    const double threshold = std::floor(double{p.shape.dropout} * 0x1p32);
    const std::vector<double> out = p.tokens(p.forward.out, p.q_slices);
    std::size_t i = 0;
    for (std::uint32_t entry = 0; entry < 2; ++entry)
      for (std::uint32_t r = 0; r < static_cast<std::uint32_t>(p.shape.seqlens_q[0]); ++r)
        for (std::uint32_t head = 0; head < 4; ++head)
          for (std::uint32_t key = 0; key < static_cast<std::uint32_t>(p.shape.seqlens_k[0]);
               ++key, ++i) {
            const PhiloxBlock words = philox(*p.forward.dropout.seed, {r, key / 4, head, entry});
            ASSERT_EQ(out[i] != 0, static_cast<double>(words[key % 4]) >= threshold)
                << "entry " << entry << " row " << r << " head " << head << " key " << key;
          }
  });
}

// Equal scores, small integers, a power of two of visible keys: every sum and quotient is exact.
TEST(Exact, MeansOfIntegersAreExact) {
  std::vector<Shape> shapes;
  for (const int queries : {3, 50})
    for (const auto& [band, keys] :
         {std::pair{kFull, 128}, {sliding_window(31), 90}, {sliding_window(0), 100}}) {
      Shape s = base(queries, keys);
      s.band = band;
      s.inputs = Inputs::q_zero;
      shapes.push_back(s);
    }
  for_every_kernel(shapes, {}, exact_out, [](const auto& row, const auto& p, const auto& want) {
    if (row.pass == Pass::backward) return;
    const std::vector<double> got = values(p.forward.out);
    for (std::size_t i = 0; i < want.size(); ++i)
      ASSERT_NEAR(want[i], got[i], 1e-12) << "element " << i;  // the oracle itself rounds at 1e-17
  });
}

// One key ahead of all others by more than exp can hold: out is its v, bit for bit.
TEST(Exact, TheDominantKeyIsCopied) {
  for (const int target : {0, 1, 63, 95, 96, 100, 191, 192, 199}) {
    const Override change = [&](Input which, Place at, double x) {
      if (which == Input::q) return 8.;
      if (which == Input::k) return at.token == target ? 8. : -8.;
      return x;
    };
    const std::vector<Shape> shapes{base(2, 200), base(30, 200)};
    for_every_kernel(shapes, change, nothing, [&](const auto& row, const auto& p, const auto&) {
      if (row.pass == Pass::backward) return;
      const std::vector<double> out = p.tokens(p.forward.out, p.q_slices);
      const ConstTensorView& v = p.forward.v;
      std::size_t i = 0;
      for (int entry = 0; entry < 2; ++entry)
        for (int r = 0; r < p.shape.seqlens_q[0]; ++r)
          for (int head = 0; head < 4; ++head)
            for (int c = 0; c < 16; ++c, ++i)
              ASSERT_EQ(out[i], load(v.dtype, v.data,
                                     entry * v.stride[0] + target * v.stride[1] +
                                         head / 2 * v.stride[2] + c));
    });
  }
}

// ---- NaN ----

constexpr int kNanToken = 20, kNanRow = 1, kNanChannel = 5, kKeys = 60;

// Whether a NaN planted in head 1 of entry 0 reaches an element by the formula.
enum class Reach { must, may, never };
Reach reach(Input where, int queries, int entry, int row, int head, int channel) {
  if (entry != 0) return Reach::never;
  if (where == Input::q) return head == 1 && row == kNanRow ? Reach::must : Reach::never;
  if (head / 2 != 1) return Reach::never;
  if (where == Input::v && channel != kNanChannel) return Reach::never;
  return kNanToken <= row + kKeys - queries ? Reach::must : Reach::may;
}

// A NaN in a visible key or value is never laundered, and goes to no other head, entry or channel.
TEST(Exact, NanReachesWhatSeesItAndNothingElse) {
  for (const int queries : {3, 40})
    for (const DType dtype : kDTypes)
      for (const Input where : {Input::k, Input::v, Input::q}) {
        Shape shape = base(queries, kKeys);
        shape.band = kCausal;
        Problem clean(shape, dtype, 3);
        Problem planted(shape, dtype, 3, Poison::nan, [&](Input which, Place at, double x) {
          const bool here = which == where && at.entry == 0 && at.head == 1 &&
                            at.channel == kNanChannel &&
                            at.token == (where == Input::q ? kNanRow : kNanToken);
          return here ? NAN : x;
        });
        for (const KernelRow* row : distinct_rows(dtype)) {
          if (!run_checked(*row, clean)) continue;
          run_checked(*row, planted);
          SCOPED_TRACE(label(*row, shape, 3));
          const bool backward = row->pass == Pass::backward;
          const auto result = [&](const Problem& p) {
            return p.tokens(backward ? p.backward.dq : p.forward.out, p.q_slices);
          };
          const std::vector<double> want = result(clean), got = result(planted);
          const std::vector<double> lse = planted.lse_values();
          for (int i = 0; i < static_cast<int>(want.size()); ++i) {
            const auto at = static_cast<std::size_t>(i);
            const int channel = i % 16, head = i / 16 % 4, r = i / 64 % queries,
                      entry = i / 64 / queries;
            // A NaN of v reaches all channels of dq, through dP.
            const Reach reached =
                reach(where, queries, entry, r, head, backward ? kNanChannel : channel);
            if (reached == Reach::must) {
              ASSERT_TRUE(std::isnan(got[at])) << "element " << i;
            }
            if (reached == Reach::never) {
              ASSERT_EQ(want[at], got[at]) << "element " << i;
            }
            if (reached == Reach::must && where != Input::v) {
              ASSERT_TRUE(std::isnan(lse[static_cast<std::size_t>(head * queries + r)]))
                  << "lse of " << i;
            }
          }
        }
      }
}

// ---- two ways to say the same ----

void expect_same_bits(const Shape& a, const Shape& b) {
  for (const DType dtype : kDTypes) {
    Problem first(a, dtype, 5), second(b, dtype, 5);
    for (const KernelRow* row : distinct_rows(dtype)) {
      if (!run_checked(*row, first) || !run_checked(*row, second)) continue;
      std::vector<double> x = outputs_of(*row, first), y = outputs_of(*row, second);
      if (row->pass == Pass::backward && (a.sinks != Sinks::none) != (b.sinks != Sinks::none))
        (x.size() > y.size() ? x : y).resize(std::min(x.size(), y.size()));  // dsink comes last
      EXPECT_EQ(difference(x, y), "")
          << name_of(*row) << ": " << describe(a) << " against " << describe(b);
    }
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
    for (const DType dtype : kDTypes) {
      Shape grouped = base(50, 120), repeated;
      grouped.band = kCausal;
      grouped.heads_k = 2;
      grouped.heads_q = 2 * group;
      repeated = grouped;
      repeated.heads_k = repeated.heads_q;
      Problem a(grouped, dtype, 5);
      Problem b(repeated, dtype, 5, Poison::nan, [&](Input which, Place at, double x) {
        if (which != Input::k && which != Input::v) return x;
        const ConstTensorView& t = which == Input::k ? a.forward.k : a.forward.v;
        return load(t.dtype, t.data,
                    at.entry * t.stride[0] + at.token * t.stride[1] +
                        at.head / group * t.stride[2] + at.channel);
      });
      for (const KernelRow* row : distinct_rows(dtype)) {
        if (row->pass == Pass::decode) continue;  // packs the rows of a group into one tile
        run_checked(*row, a);
        run_checked(*row, b);
        const auto result = [&](const Problem& p) {
          return values(row->pass == Pass::backward ? p.backward.dq : p.forward.out);
        };
        EXPECT_EQ(difference(result(a), result(b)), "") << name_of(*row) << " group " << group;
        EXPECT_EQ(difference(a.lse_values(), b.lse_values()), "")
            << name_of(*row) << " group " << group;
      }
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
      {"seqused", [](Shape& s) {
         s.seqlens_k = {59, 41};
       }}};
  for (const int queries : {3, 40})
    for (const DType dtype : kDTypes) {
      Problem plain(base(queries, 60), dtype, 5);
      for (const auto& [name, change] : changes) {
        Shape shape = base(queries, 60);
        change(shape);
        Problem changed(shape, dtype, 5);
        for (const KernelRow* row : distinct_rows(dtype)) {
          if (row->pass != Pass::backward && std::string(name) == "dlse") continue;
          if (!run_checked(*row, plain)) continue;
          // A GPU has kernels of its own for softcap, bias and dropout.
          if (row->score != ScoreKind::general && !serves(*row, changed)) continue;
          ASSERT_TRUE(run_checked(*row, changed)) << name_of(*row) << " refuses " << name;
          std::vector<double> before = outputs_of(*row, plain), after = outputs_of(*row, changed);
          const std::size_t common = std::min(before.size(), after.size());
          before.resize(common);
          after.resize(common);
          EXPECT_NE(difference(before, after), "") << name_of(*row) << " ignores " << name;
        }
      }
    }
}

}  // namespace
}  // namespace heed::test
