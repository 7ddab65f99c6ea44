// Index arrays that lie: a CPU refuses them by index and value before it touches a tensor.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "api/small_problem.hpp"

namespace heed::test {
namespace {

struct Case {
  const char* name;
  std::function<void(SmallProblem&)> change;
  const char* message;
};
std::string name_of_case(const testing::TestParamInfo<Case>& info) { return info.param.name; }

class Contents : public testing::TestWithParam<Case> {};

template <class Problem>
void expect_refused(const Problem& problem, const char* message) {
  for (const Device& device : cpu_devices()) {
    const Status status = plan_and_run(problem, device);
    EXPECT_EQ(status.code(), Code::invalid);
    EXPECT_EQ(status.message(), message);
  }
}

TEST_P(Contents, AreRefused) {
  SmallProblem small;
  GetParam().change(small);
  const std::vector<float> before = small.out;
  expect_refused(small.forward, GetParam().message);
  if (small.forward.paged.page_table == nullptr) expect_refused(small.backward, GetParam().message);
  EXPECT_EQ(small.out, before);
}

// Packed: q holds 6 tokens, k 10. Padded: q has 3 slots, k 5.
const Case kCases[] = {
    {"first_negative",
     [](auto& s) {
       s.pack_q();
       s.ints[0] = -1;
     },
     "sequences.cu_seqlens_q[0] = -1 must be in [0, 6]"},
    {"not_monotonic",
     [](auto& s) {
       s.pack_k();
       s.ints[16] = 6;
     },
     "sequences.cu_seqlens_k[1] = 5 must be in [6, 10]"},
    {"past_the_end",
     [](auto& s) {
       s.pack_q();
       s.ints[2] = 7;
     },
     "sequences.cu_seqlens_q[2] = 7 must be in [3, 6]"},
    {"huge",
     [](auto& s) {
       s.pack_k();
       s.ints[17] = 2147483647;
     },
     "sequences.cu_seqlens_k[1] = 2147483647 must be in [0, 10]"},
    {"longer_than_max_seqlen",
     [](auto& s) {
       s.pack_q();
       s.forward.sequences.max_seqlen_q = 2;
     },
     "sequences.cu_seqlens_q[1] = 3 must be at most 2, sequences.max_seqlen_q = 2 tokens after the "
     "entry's first one"},
    {"seqused_over_packed",
     [](auto& s) {
       s.pack_k();
       s.ints[33] = 6;
       s.forward.sequences.seqused_k = s.ints.data() + 32;
     },
     "sequences.seqused_k[1] = 6 must be in [0, 5]"},
    {"seqused_negative",
     [](auto& s) {
       s.ints[32] = -2;
       s.forward.sequences.seqused_q = s.ints.data() + 32;
     },
     "sequences.seqused_q[0] = -2 must be in [0, 3]"},
    {"start_negative",
     [](auto& s) {
       s.ints[33] = -1;
       s.forward.sequences.start_k = s.ints.data() + 32;
     },
     "sequences.start_k[1] = -1 must be in [0, 5]"},
    {"start_past_the_end",
     [](auto& s) {
       s.ints[33] = 4;
       s.forward.sequences.start_q = s.ints.data() + 32;
     },
     "sequences.start_q[1] = 4 must be in [0, 3]"},
    {"start_plus_seqused",
     [](auto& s) {
       s.ints[32] = 2;
       s.ints[40] = 4;
       s.forward.sequences.start_k = s.ints.data() + 32;
       s.forward.sequences.seqused_k = s.ints.data() + 40;
     },
     "sequences.seqused_k[0] = 4 must be in [0, 3]"},
    {"seqused_over_pages",
     [](auto& s) {
       s.page();
       s.ints[33] = 6;
     },
     "sequences.seqused_k[1] = 6 must be in [0, 5]"},
    {"page_past_the_pool",
     [](auto& s) {
       s.page();
       s.ints[49] = 2;
     },
     "paged.page_table[1][0] = 2 must be in [0, 2), a page of k"},
    {"page_negative",
     [](auto& s) {
       s.page();
       s.ints[48] = -1;
     },
     "paged.page_table[0][0] = -1 must be in [0, 2), a page of k"},
};
INSTANTIATE_TEST_SUITE_P(Lies, Contents, testing::ValuesIn(kCases), name_of_case);

TEST(Contents, DeadArraysAreNotRead) {
  SmallProblem small;
  small.page();
  small.ints[32] = 0;     // no live token:
  small.ints[48] = 1000;  // its page id means nothing
  EXPECT_EQ(plan_and_run(small.forward, {}).message(), "");
}

TEST(Contents, UsedTokensMayBeFewerThanMaxSeqlen) {
  SmallProblem small;
  small.pack_k();
  small.ints[32] = small.ints[33] = 2;
  small.forward.sequences.seqused_k = small.ints.data() + 32;
  small.forward.sequences.max_seqlen_k = 2;  // of room for 5
  EXPECT_EQ(plan_and_run(small.forward, {}).message(), "");
}

bool all_zero(const std::vector<float>& values) {
  return std::ranges::all_of(values, [](float x) { return x == 0.f; });
}

// A batch of no entries. Packed keys may have tokens all the same, whose gradients are zeros; the
// memory that empty tensors point to stays as it is.
TEST(NoEntries, PackedQueries) {
  for (const Device& device : cpu_devices()) {
    SmallProblem small;
    small.pack_q();
    small.forward.sequences.batch = 0;
    ForwardProblem& f = small.forward;
    BackwardProblem& b = small.backward;
    for (ConstTensorView* x : {&f.q, &f.k, &f.v, &b.dout}) x->shape[0] = 0;
    for (TensorView* x : {&f.out, &b.dq, &b.dk, &b.dv}) x->shape[0] = 0;
    const std::vector<std::vector<float>> before{small.out, small.dq, small.dk, small.dv};
    ASSERT_EQ(plan_and_run(f, device).message(), "") << name_of(device.arch);
    ASSERT_EQ(plan_and_run(b, device).message(), "") << name_of(device.arch);
    const std::vector<std::vector<float>> after{small.out, small.dq, small.dk, small.dv};
    EXPECT_EQ(after, before) << name_of(device.arch);
  }
}

TEST(NoEntries, PackedKeys) {
  for (const Device& device : cpu_devices()) {
    SmallProblem small;
    small.pack_k();
    for (ConstTensorView* x : {&small.forward.q, &small.backward.dout}) x->shape[0] = 0;
    for (TensorView* x : {&small.forward.out, &small.backward.dq}) x->shape[0] = 0;
    const std::vector<float> out = small.out, dq = small.dq;
    ASSERT_EQ(plan_and_run(small.forward, device).message(), "") << name_of(device.arch);
    EXPECT_EQ(small.out, out) << name_of(device.arch);
    ASSERT_EQ(plan_and_run(small.backward, device).message(), "") << name_of(device.arch);
    EXPECT_EQ(small.dq, dq) << name_of(device.arch);
    EXPECT_TRUE(all_zero(small.dk)) << name_of(device.arch);
    EXPECT_TRUE(all_zero(small.dv)) << name_of(device.arch);
  }
}

}  // namespace
}  // namespace heed::test
