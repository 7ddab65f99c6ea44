// Every refusal by its words: the field, its value, the allowed values.
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "api/small_problem.hpp"

namespace heed::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr Device kDevice{.arch = Arch::scalar, .units = 1};

struct Case {
  const char* name;
  std::function<void(SmallProblem&)> change;
  const char* message;
  Code code = Code::invalid;
};
std::string name_of_case(const testing::TestParamInfo<Case>& info) { return info.param.name; }

template <class Problem>
void expect_refused(const Problem& problem, const Case& c) {
  const Status status = plan(problem, kDevice).status();
  EXPECT_EQ(status.code(), c.code) << status.message();
  EXPECT_NE(status.message().find(c.message), std::string::npos)
      << "got      " << status.message() << "\nexpected " << c.message;
  EXPECT_EQ(explain(problem, kDevice), status.message() + "\n");
}

class RefusedForward : public testing::TestWithParam<Case> {};
TEST_P(RefusedForward, Says) {
  SmallProblem small;
  ASSERT_TRUE(plan(small.forward, kDevice).ok()) << plan(small.forward, kDevice).status().message();
  GetParam().change(small);
  expect_refused(small.forward, GetParam());
}

class RefusedBackward : public testing::TestWithParam<Case> {};
TEST_P(RefusedBackward, Says) {
  SmallProblem small;
  ASSERT_TRUE(plan(small.backward, kDevice).ok());
  GetParam().change(small);
  expect_refused(small.backward, GetParam());
}

template <class T>
T* shifted(T* pointer, int bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(pointer) +
                              static_cast<std::uintptr_t>(bytes));
}

const Case kTensorCases[] = {
    {"q_rank", [](auto& s) { s.forward.q.rank = 2; },
     "q.rank = 2 must be 4, [batch, seqlen, heads, head_dim], or 3, packed"},
    {"k_rank", [](auto& s) { s.forward.k.rank = 5; }, "k.rank = 5 must be 4"},
    {"v_rank",
     [](auto& s) {
       s.forward.v =
           contiguous(s.forward.v.data, DType::f32, std::array<std::int64_t, 3>{10, 2, 6});
     },
     "v.rank = 3 must be k.rank = 4"},
    {"q_dtype", [](auto& s) { s.forward.q.dtype = DType::boolean; },
     "q.dtype = bool must be f32, bf16, f16 or f64"},
    {"no_dtype", [](auto& s) { s.forward.q.dtype = static_cast<DType>(77); },
     "q.dtype = 77 must be f32, bf16, f16 or f64"},
    {"k_dtype", [](auto& s) { s.forward.k.dtype = DType::f16; },
     "k.dtype = f16 must be q.dtype = f32"},
    {"out_dtype", [](auto& s) { s.forward.out.dtype = DType::bf16; },
     "out.dtype = bf16 must be q.dtype = f32"},
    {"head_dim_zero", [](auto& s) { s.forward.q.shape[3] = 0; },
     "q.head_dim = 0 must be in [1, 512]"},
    {"head_dim_large", [](auto& s) { s.forward.v.shape[3] = 513; },
     "v.head_dim = 513 must be in [1, 512]"},
    {"k_head_dim", [](auto& s) { s.forward.k.shape[3] = 7; },
     "k.head_dim = 7 must be q.head_dim = 8"},
    {"heads_ratio", [](auto& s) { s.forward.k.shape[2] = s.forward.v.shape[2] = 3; },
     "q.heads = 4 must be a multiple of k.heads = 3"},
    {"heads_none", [](auto& s) { s.forward.k.shape[2] = s.forward.v.shape[2] = 0; },
     "q.heads = 4 must be a multiple of k.heads = 0"},
    {"v_heads", [](auto& s) { s.forward.v.shape[2] = 1; }, "v.heads = 1 must be k.heads = 2"},
    {"v_seqlen", [](auto& s) { s.forward.v.shape[1] = 4; }, "v.seqlen = 4 must be k.seqlen = 5"},
    {"out_seqlen", [](auto& s) { s.forward.out.shape[1] = 2; },
     "out.seqlen = 2 must be q.seqlen = 3"},
    {"out_batch", [](auto& s) { s.forward.out.shape[0] = 1; }, "out.batch = 1 must be q.batch = 2"},
    {"out_head_dim", [](auto& s) { s.forward.out.shape[3] = 5; },
     "out.head_dim = 5 must be v.head_dim = 6"},
    {"batch", [](auto& s) { s.forward.k.shape[0] = s.forward.v.shape[0] = 1; },
     "k.batch = 1 must be q.batch = 2"},
    {"negative_extent", [](auto& s) { s.forward.q.shape[1] = -3; },
     "q.seqlen = -3 must be in [0, 1073741823]"},
    {"huge_seqlen", [](auto& s) { s.forward.q.shape[1] = std::int64_t{1} << 30; },
     "q.seqlen = 1073741824 must be in [0, 1073741823]"},
    {"huge_heads", [](auto& s) { s.forward.k.shape[2] = std::int64_t{1} << 31; },
     "k.heads = 2147483648 must be in [0, 2147483647]"},
    {"last_stride", [](auto& s) { s.forward.k.stride[3] = 2; }, "k.stride[3] = 2 must be 1"},
    {"negative_stride", [](auto& s) { s.forward.v.stride[1] = -12; },
     "v.stride[1] = -12 must be at least 0"},
    {"overflowing_stride", [](auto& s) { s.forward.q.stride[0] = std::int64_t{1} << 62; },
     "q.stride[0] = 4611686018427387904 must keep 2 elements within 2^61 bytes"},
    {"null_q", [](auto& s) { s.forward.q.data = nullptr; }, "q = null must not be null"},
    {"null_out", [](auto& s) { s.forward.out.data = nullptr; }, "out = null must not be null"},
    {"unaligned_k", [](auto& s) { s.forward.k.data = shifted(s.forward.k.data, 2); },
     "(address) must be a multiple of 4 bytes"},
    {"unaligned_lse", [](auto& s) { s.forward.lse = shifted(s.forward.lse, 1); },
     "(address) must be a multiple of 4 bytes"},
    {"unaligned_sink", [](auto& s) { s.forward.sink = shifted(s.sink.data(), 3); },
     "(address) must be a multiple of 4 bytes"},
    {"broadcast_out", [](auto& s) { s.forward.out.stride[0] = 0; },
     "out.stride[0] = 0 must be at least 1"},
    {"out_overlaps_itself", [](auto& s) { s.forward.out.stride[1] = 12; },
     "out overlaps itself: the stride 12 of its axis of 3 must be at least 24"},
};
INSTANTIATE_TEST_SUITE_P(Tensors, RefusedForward, testing::ValuesIn(kTensorCases), name_of_case);

const Case kSequenceCases[] = {
    {"packed_q_without_cu_seqlens",
     [](auto& s) {
       s.pack_q();
       s.forward.sequences.cu_seqlens_q = nullptr;
     },
     "sequences.cu_seqlens_q = null must not be null: q.rank = 3 means packed"},
    {"cu_seqlens_of_padded_k", [](auto& s) { s.forward.sequences.cu_seqlens_k = s.ints.data(); },
     "k.rank = 4 must be 3 (packed) when sequences.cu_seqlens_k is given"},
    {"start_of_packed_q",
     [](auto& s) {
       s.pack_q();
       s.forward.sequences.start_q = s.ints.data();
     },
     "q.rank = 3 must be 4 (padded) when sequences.start_q is given"},
    {"batch_negative", [](auto& s) { s.forward.sequences.batch = -1; },
     "sequences.batch = -1 must be in [0, 2147483647]"},
    {"batch_other", [](auto& s) { s.forward.sequences.batch = 3; },
     "sequences.batch = 3 must be 0 or q.batch = 2"},
    {"batch_forgotten",
     [](auto& s) {
       s.pack_q();
       s.forward.sequences.batch = 0;
     },
     "sequences.batch = 0 must be at least 1: q packs 6 tokens"},
    {"packed_q_padded_k",
     [](auto& s) {
       s.pack_q();
       s.forward.sequences.batch = 1;
     },
     "k.batch = 2 must be sequences.batch = 1"},
    {"max_seqlen", [](auto& s) { s.forward.sequences.max_seqlen_q = -4; },
     "sequences.max_seqlen_q = -4 must be in [0, 1073741823]"},
    {"unaligned_seqused",
     [](auto& s) { s.forward.sequences.seqused_k = shifted(s.ints.data(), 2); },
     "sequences.seqused_k = "},
    {"paged_without_seqused",
     [](auto& s) {
       s.page();
       s.forward.sequences.seqused_k = nullptr;
     },
     "sequences.seqused_k = null must not be null: pages do not say how many keys they hold"},
    {"paged_without_max_pages",
     [](auto& s) {
       s.page();
       s.forward.paged.max_pages = 0;
     },
     "paged.max_pages = 0 must be at least 1"},
    {"paged_without_table",
     [](auto& s) {
       s.page();
       s.forward.paged.page_table = nullptr;
     },
     "paged.page_table = null must not be null"},
    {"paged_with_start",
     [](auto& s) {
       s.page();
       s.forward.sequences.start_k = s.ints.data();
     },
     "sequences.start_k must be null when paged.page_table is given"},
    {"paged_and_packed",
     [](auto& s) {
       s.page();
       s.pack_k();
     },
     "k.rank = 3 must be 4, [num_pages, page_size, heads, head_dim]"},
    {"paged_too_large",
     [](auto& s) {
       s.page();
       s.forward.paged.max_pages = 1 << 28;
     },
     "paged.max_pages = 268435456 must be at most 214748364 with pages of k.shape[1] = 5"},
    {"empty_pages",
     [](auto& s) {
       s.page();
       s.forward.k.shape[1] = s.forward.v.shape[1] = 0;
     },
     "k.shape[1] = 0 (page_size) must be at least 1"},
};
INSTANTIATE_TEST_SUITE_P(Sequences, RefusedForward, testing::ValuesIn(kSequenceCases),
                         name_of_case);

const Case kMaskCases[] = {
    {"left", [](auto& s) { s.forward.band.left = -1; },
     "band.left = -1 must be in [0, 1073741824]"},
    {"right", [](auto& s) { s.forward.band.right = std::numeric_limits<int>::max(); },
     "band.right = 2147483647 must be in [0, 1073741824]"},
    {"chunk", [](auto& s) { s.forward.band.chunk = -8; },
     "band.chunk = -8 must be in [0, 1073741824]"},
    {"rows_stride",
     [](auto& s) {
       s.forward.intervals.rows = s.ints.data();
       s.forward.intervals.rows_batch_stride = 5;
     },
     "intervals.rows_batch_stride = 5 must be 0 (shared) or at least 6"},
    {"rows_stride_negative",
     [](auto& s) {
       s.forward.intervals.rows = s.ints.data();
       s.forward.intervals.rows_batch_stride = -6;
     },
     "intervals.rows_batch_stride = -6 must be 0 (shared) or at least 6"},
    {"bits_words",
     [](auto& s) { s.forward.intervals.bits = reinterpret_cast<std::uint32_t*>(s.ints.data()); },
     "intervals.bits_words = 0 must be in [1, 1073741823]"},
    {"bits_stride",
     [](auto& s) {
       s.forward.intervals.bits = reinterpret_cast<std::uint32_t*>(s.ints.data());
       s.forward.intervals.bits_words = 2;
       s.forward.intervals.bits_batch_stride = 1;
     },
     "intervals.bits_batch_stride = 1 must be 0 (shared) or at least 2"},
    {"scale_nan", [](auto& s) { s.forward.score.scale = kNan; },
     "score.scale = nan must be finite"},
    {"softcap_negative", [](auto& s) { s.forward.score.softcap = -1.5f; },
     "score.softcap = -1.5 must be finite and at least 0"},
    {"softcap_infinite",
     [](auto& s) { s.forward.score.softcap = std::numeric_limits<float>::infinity(); },
     "score.softcap = inf must be finite and at least 0"},
    {"dropout_one",
     [](auto& s) {
       s.forward.dropout = {1.f, &s.seed};
     },
     "dropout.probability = 1 must be in [0, 1)"},
    {"dropout_nan",
     [](auto& s) {
       s.forward.dropout = {kNan, &s.seed};
     },
     "dropout.probability = nan must be in [0, 1)"},
    {"dropout_seed", [](auto& s) { s.forward.dropout.probability = 0.5f; },
     "dropout.seed = null must not be null: dropout.probability is above 0"},
    {"seed_unaligned",
     [](auto& s) {
       s.forward.dropout = {0.5f, shifted(&s.seed, 4)};
     },
     "(address) must be a multiple of 8 bytes"},
    {"bias_rank",
     [](auto& s) {
       s.forward.bias = contiguous(s.bias.data(), DType::f32, std::array<std::int64_t, 3>{4, 3, 5});
     },
     "bias.rank = 3 must be 4, [batch or 1, heads_q or 1, seqlen_q or 1, seqlen_k]"},
    {"bias_keys",
     [](auto& s) {
       s.forward.bias = s.bias_view();
       s.forward.bias.shape[3] = 1;
     },
     "bias.shape[3] = 1 must be k.seqlen = 5"},
    {"bias_heads",
     [](auto& s) {
       s.forward.bias = s.bias_view();
       s.forward.bias.shape[1] = 2;
     },
     "bias.shape[1] = 2 must be q.heads = 4 or 1"},
    {"bias_last_stride",
     [](auto& s) {
       s.forward.bias = s.bias_view();
       s.forward.bias.stride[3] = 0;
     },
     "bias.stride[3] = 0 must be 1"},
    {"bias_dtype",
     [](auto& s) {
       s.forward.bias = s.bias_view();
       s.forward.bias.dtype = static_cast<DType>(9);
     },
     "bias.dtype = 9 must be f32, bf16, f16, f64 or bool"},
    {"bias_of_packed_q",
     [](auto& s) {
       s.pack_q();
       s.forward.bias = s.bias_view();
     },
     "sequences.max_seqlen_q = 0 must be at least 1 when q is packed and has a bias"},
    {"bias_of_packed_k",
     [](auto& s) {
       s.pack_k();
       s.forward.sequences.max_seqlen_k = 4;
       s.forward.bias = s.bias_view();
     },
     "bias.shape[3] = 5 must be sequences.max_seqlen_k = 4"},
    {"bias_of_pages",
     [](auto& s) {
       s.page();
       s.forward.paged.max_pages = 2;
       s.forward.bias = s.bias_view();
     },
     "bias.shape[3] = 5 must be paged.max_pages * k.shape[1] = 10"},
};
INSTANTIATE_TEST_SUITE_P(Masks, RefusedForward, testing::ValuesIn(kMaskCases), name_of_case);

const Case kBackwardCases[] = {
    {"forward_rules_hold", [](auto& s) { s.forward.band.left = -1; }, "band.left = -1 must be in"},
    {"lse", [](auto& s) { s.forward.lse = nullptr; }, "lse = null must not be null"},
    {"dout_dtype", [](auto& s) { s.backward.dout.dtype = DType::f16; },
     "dout.dtype = f16 must be q.dtype = f32"},
    {"dout_shape", [](auto& s) { s.backward.dout.shape[1] = 2; },
     "dout.seqlen = 2 must be out.seqlen = 3"},
    {"dq_shape", [](auto& s) { s.backward.dq.shape[3] = 6; },
     "dq.head_dim = 6 must be q.head_dim = 8"},
    {"dk_shape", [](auto& s) { s.backward.dk.shape[2] = 4; }, "dk.heads = 4 must be k.heads = 2"},
    {"dv_rank",
     [](auto& s) {
       s.backward.dv = contiguous(s.dv.data(), DType::f32, std::array<std::int64_t, 3>{10, 2, 6});
     },
     "dv.rank = 3 must be v.rank = 4"},
    {"dv_null", [](auto& s) { s.backward.dv.data = nullptr; }, "dv = null must not be null"},
    {"dk_last_stride", [](auto& s) { s.backward.dk.stride[3] = 2; }, "dk.stride[3] = 2 must be 1"},
    {"dk_broadcast", [](auto& s) { s.backward.dk.stride[2] = 0; },
     "dk.stride[2] = 0 must be at least 1"},
    {"dlse_unaligned", [](auto& s) { s.backward.dlse = shifted(s.dlse.data(), 2); },
     "(address) must be a multiple of 4 bytes"},
    {"pages", [](auto& s) { s.page(); }, "paged.page_table must be null in a backward pass",
     Code::unsupported},
    {"dbias_without_bias", [](auto& s) { s.backward.dbias = s.dbias_view(); },
     "dbias must be null when bias is null"},
    {"dbias_of_mask",
     [](auto& s) {
       s.forward.bias = s.bias_view();
       s.forward.bias.dtype = DType::boolean;
       s.backward.dbias = s.dbias_view();
     },
     "dbias must be null when bias.dtype = bool"},
    {"dbias_dtype",
     [](auto& s) {
       s.forward.bias = s.bias_view();
       s.backward.dbias = s.dbias_view();
       s.backward.dbias.dtype = DType::bf16;
     },
     "dbias.dtype = bf16 must be f32"},
    {"dbias_shape",
     [](auto& s) {
       s.forward.bias = s.bias_view();
       s.backward.dbias = s.dbias_view();
       s.backward.dbias.shape[0] = 1;
     },
     "dbias.shape[0] = 1 must be bias.shape[0] = 2"},
    {"dsink_without_sink", [](auto& s) { s.backward.dsink = s.dsink.data(); },
     "dsink must be null when sink is null"},
};
INSTANTIATE_TEST_SUITE_P(Gradients, RefusedBackward, testing::ValuesIn(kBackwardCases),
                         name_of_case);

// ---- what must not be refused ----

TEST(Accepted, StridesOfShortAxesMeanNothing) {
  SmallProblem small({.batch = 1,
                      .seqlen_q = 1,
                      .seqlen_k = 1,
                      .heads_q = 1,
                      .heads_k = 1,
                      .head_dim = 1,
                      .head_dim_v = 1});
  for (ConstTensorView* t : {&small.forward.q, &small.forward.k, &small.forward.v})
    t->stride = {-7, 0, std::numeric_limits<std::int64_t>::max(), 99};
  small.forward.out.stride = {0, 0, 0, 0};
  EXPECT_EQ(plan(small.forward, kDevice).status().message(), "");
}

TEST(Accepted, InputsMayRepeatAndShareMemory) {
  SmallProblem small({.seqlen_q = 5, .heads_q = 2, .head_dim_v = 8});
  small.forward.q.stride[1] = 0;
  small.forward.k = small.forward.v = small.forward.q;
  small.forward.k.shape[2] = small.forward.v.shape[2] = 2;
  EXPECT_EQ(plan(small.forward, kDevice).status().message(), "");
}

TEST(Accepted, EveryLayout) {
  for (const bool pack_q : {false, true})
    for (const bool pack_k : {false, true}) {
      SmallProblem small;
      if (pack_q) small.pack_q();
      if (pack_k) small.pack_k();
      EXPECT_EQ(plan(small.backward, kDevice).status().message(), "");
      small.forward.sequences.max_seqlen_q = small.sizes.seqlen_q;
      small.forward.sequences.max_seqlen_k = small.sizes.seqlen_k;
      small.forward.bias = small.bias_view();
      small.backward.dbias = small.dbias_view();
      EXPECT_EQ(plan(small.backward, kDevice).status().message(), "");
    }
  SmallProblem small;
  small.page();
  EXPECT_EQ(plan(small.forward, kDevice).status().message(), "");
}

TEST(Accepted, EmptyTensorsNeedNoPointer) {
  SmallProblem small({.batch = 0});
  for (ConstTensorView* t :
       {&small.forward.q, &small.forward.k, &small.forward.v, &small.backward.dout})
    t->data = nullptr;
  for (TensorView* t :
       {&small.forward.out, &small.backward.dq, &small.backward.dk, &small.backward.dv})
    t->data = nullptr;
  small.forward.lse = nullptr;
  EXPECT_EQ(plan(small.backward, kDevice).status().message(), "");
}

}  // namespace
}  // namespace heed::test
