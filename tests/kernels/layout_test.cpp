// The same sequences in another layout give the same bits.
#include <gtest/gtest.h>

#include <functional>
#include <memory>

#include "support/check.hpp"

namespace heed::test {
namespace {

// What a pass computed, tensor by tensor, in an order that does not depend on the layout.
std::vector<std::vector<double>> parts_of(const KernelRow& row, const Problem& p) {
  if (row.pass != Pass::backward) return {p.tokens(p.forward.out, p.q_slices), p.lse_values()};
  return {p.tokens(p.backward.dq, p.q_slices), p.tokens(p.backward.dk, p.k_slices),
          p.tokens(p.backward.dv, p.k_slices)};
}

std::vector<double> joined(const std::vector<std::vector<double>>& parts) {
  std::vector<double> all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

std::vector<double> results(const KernelRow& row, const Problem& p) {
  return joined(parts_of(row, p));
}

using Change = std::function<void(Shape&)>;
const std::vector<std::pair<const char*, Change>>& features() {
  static const std::vector<std::pair<const char*, Change>> all = {
      {"plain", [](Shape&) {}},
      {"causal dlse",
       [](Shape& s) {
         s.band = kCausal;
         s.dlse = true;
       }},
      {"window softcap",
       [](Shape& s) {
         s.band = {.left = 11, .right = 3};
         s.softcap = 4.f;
       }},
      {"chunked sinks",
       [](Shape& s) {
         s.band = chunked(13);
         s.sinks = Sinks::mixed;
       }},
      {"intervals bits", [](Shape& s) { s.intervals = s.key_bits = true; }},
      {"planted maxima", [](Shape& s) { s.inputs = Inputs::planted_max; }},
      {"strided", [](Shape& s) { s.strided = true; }}};
  return all;
}

std::vector<Shape> sequences() {
  Shape s;
  s.heads_q = 4;
  s.heads_k = 2;
  s.head_dim = 24;
  s.head_dim_v = 40;
  std::vector<Shape> all;
  s.name = "many rows";
  s.seqlens_q = {33, 0, 97, 5};
  s.seqlens_k = {47, 20, 97, 0};
  all.push_back(s);
  s.name = "few rows";
  s.seqlens_q = {1, 3, 2};
  s.seqlens_k = {200, 64, 33};
  all.push_back(s);
  return all;
}

void expect_same(const Change& change, const char* what) {
  for (const auto& [feature, add] : features())
    for (const Shape& sequence : sequences())
      for (const DType dtype : kDTypes) {
        Shape dense = sequence;
        add(dense);
        Shape other = dense;
        change(other);
        Problem a(dense, dtype, 9), b(other, dtype, 9);
        for (const KernelRow* row : distinct_rows(dtype)) {
          if (!serves(*row, a) || !serves(*row, b)) continue;
          run_checked(*row, a, {.splits = 1});  // how many there are may depend on the layout
          run_checked(*row, b, {.splits = 1});
          EXPECT_EQ(difference(results(*row, a), results(*row, b)), "")
              << name_of(*row) << ": " << what << ", " << sequence.name << ", " << feature;
        }
      }
}

TEST(Layout, PackedEqualsDense) {
  expect_same([](Shape& s) { s.layout_q = s.layout_k = Layout::packed; }, "packed");
}
TEST(Layout, PackedWithGapsEqualsDense) {
  expect_same(
      [](Shape& s) {
        s.layout_q = s.layout_k = Layout::packed;
        s.seqused = true;
      },
      "packed seqused");
}
TEST(Layout, PaddedEqualsDense) {
  expect_same([](Shape& s) { s.layout_q = s.layout_k = Layout::padded; }, "left padded");
}
TEST(Layout, PaddedOnBothSidesEqualsDense) {
  expect_same(
      [](Shape& s) {
        s.layout_q = s.layout_k = Layout::padded;
        s.seqused = true;
      },
      "padded");
}
TEST(Layout, MixedLayoutsEqualDense) {
  expect_same(
      [](Shape& s) {
        s.layout_q = Layout::packed;
        s.layout_k = Layout::padded;
      },
      "packed/padded");
  expect_same([](Shape& s) { s.layout_k = Layout::packed; }, "dense/packed");
}
TEST(Layout, PagedEqualsDense) {
  for (const int page_size : {1, 7, 64})
    expect_same(
        [=](Shape& s) {
          s.layout_k = Layout::paged;
          s.page_size = page_size;
        },
        "paged");
}

// A result does not depend on what else is in the batch.
TEST(Layout, EverySequenceAloneEqualsTheBatch) {
  for (const auto& [feature, add] : features())
    for (const Shape& sequence : sequences())
      for (const DType dtype : kDTypes) {
        if (std::string(feature) == "intervals bits") continue;  // drawn for the whole batch
        Shape packed = sequence;
        add(packed);
        packed.layout_q = packed.layout_k = Layout::packed;
        Problem batch(packed, dtype, 9);
        std::vector<std::unique_ptr<Problem>> alone;
        for (std::size_t entry = 0; entry < sequence.seqlens_q.size(); ++entry) {
          Shape s = sequence;
          add(s);
          s.seqlens_q = {sequence.seqlens_q[entry]};
          s.seqlens_k = {sequence.seqlens_k[entry]};
          s.first_entry = static_cast<int>(entry);
          alone.push_back(std::make_unique<Problem>(s, dtype, 9));
        }
        for (const KernelRow* row : distinct_rows(dtype)) {
          if (!serves(*row, batch)) continue;
          run_checked(*row, batch);
          std::vector<std::vector<double>> parts;
          for (const auto& p : alone) {
            run_checked(*row, *p);
            const std::vector<std::vector<double>> own = parts_of(*row, *p);
            parts.resize(own.size());
            for (std::size_t i = 0; i < own.size(); ++i)
              parts[i].insert(parts[i].end(), own[i].begin(), own[i].end());
          }
          EXPECT_EQ(difference(results(*row, batch), joined(parts)), "")
              << name_of(*row) << ": " << sequence.name << ", " << feature;
        }
      }
}

}  // namespace
}  // namespace heed::test
