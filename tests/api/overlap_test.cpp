// Outputs may interleave in one buffer, but share no byte with anything else.
#include <gtest/gtest.h>

#include <set>

#include "api/overlap.hpp"
#include "api/small_problem.hpp"

namespace heed::test {
namespace {

constexpr Device kDevice{.arch = Arch::scalar, .units = 1};

std::string refusal(const ForwardProblem& p) { return plan(p, kDevice).status().message(); }
std::string refusal(const BackwardProblem& p) { return plan(p, kDevice).status().message(); }

bool says(const std::string& message, const std::string& output, const std::string& other) {
  return message.rfind(output + " = ", 0) == 0 &&
         message.find("(address) must not overlap " + other + " at addresses") != std::string::npos;
}

TEST(Overlap, OutputsWithInputs) {
  {
    SmallProblem s({.head_dim_v = 8});
    s.forward.out.data = s.q.data();
    EXPECT_TRUE(says(refusal(s.forward), "out", "q")) << refusal(s.forward);
  }
  {
    SmallProblem s;
    s.forward.out.data = s.v.data() + s.v.size() - 1;
    EXPECT_TRUE(says(refusal(s.forward), "out", "v")) << refusal(s.forward);
  }
  {
    SmallProblem s;
    s.forward.sink = s.lse.data() + 3;
    EXPECT_TRUE(says(refusal(s.forward), "lse", "sink")) << refusal(s.forward);
  }
  {
    SmallProblem s;
    s.forward.sequences.seqused_k = reinterpret_cast<std::int32_t*>(s.out.data() + 5);
    EXPECT_TRUE(says(refusal(s.forward), "out", "sequences.seqused_k")) << refusal(s.forward);
  }
  {
    SmallProblem s;
    s.backward.dv.data = s.out.data();
    EXPECT_TRUE(says(refusal(s.backward), "dv", "out")) << refusal(s.backward);
  }
}

TEST(Overlap, OutputsWithOutputs) {
  {
    SmallProblem s;
    s.forward.lse = s.out.data();
    EXPECT_TRUE(says(refusal(s.forward), "lse", "out")) << refusal(s.forward);
  }
  {
    SmallProblem s;
    s.backward.dk.data = s.dq.data() + 8;
    EXPECT_TRUE(says(refusal(s.backward), "dk", "dq")) << refusal(s.backward);
  }
  {
    SmallProblem s;
    s.forward.sink = s.sink.data();
    s.backward.dsink = s.dv.data();
    EXPECT_TRUE(says(refusal(s.backward), "dsink", "dv")) << refusal(s.backward);
  }
}

// Gradients of a fused projection, [batch, seqlen, ...] with q, k and v side by side per token.
TEST(Overlap, InterleavedGradientsAreFine) {
  constexpr std::int64_t kBatch = 2, kSeqlen = 5, kHeads = 4, kHeadsK = 2, kDim = 8;
  struct Fused {
    const char* name;
    std::int64_t token, head_q, head_k, k_at, v_at, heads_k;
  };
  for (const Fused& f :
       {Fused{"[3, heads, dim]", 3 * kHeads * kDim, kDim, kDim, kHeads * kDim, 2 * kHeads * kDim,
              kHeads},
        Fused{"[heads, 3, dim]", 3 * kHeads * kDim, 3 * kDim, 3 * kDim, kDim, 2 * kDim, kHeads},
        Fused{"[heads_q + 2 heads_k, dim]", (kHeads + 2 * kHeadsK) * kDim, kDim, kDim,
              kHeads * kDim, (kHeads + kHeadsK) * kDim, kHeadsK},
        // Two q heads, then a k and a v head, per group; q's heads as one axis: only one group
        // here.
        Fused{"heads first", kDim, kSeqlen * kDim, kSeqlen * kDim, kHeads * kSeqlen * kDim,
              (kHeads + kHeadsK) * kSeqlen * kDim, kHeadsK}}) {
    SmallProblem s({.batch = kBatch,
                    .seqlen_q = kSeqlen,
                    .seqlen_k = kSeqlen,
                    .heads_q = kHeads,
                    .heads_k = f.heads_k,
                    .head_dim = kDim,
                    .head_dim_v = kDim});
    const std::int64_t entry = 3 * kHeads * kSeqlen * kDim;
    std::vector<float> fused(static_cast<std::size_t>(kBatch * entry + 64));
    const auto view = [&](std::int64_t at, std::int64_t heads, std::int64_t head) {
      return TensorView{fused.data() + at,
                        DType::f32,
                        4,
                        {kBatch, kSeqlen, heads, kDim},
                        {entry, f.token, head, 1}};
    };
    s.backward.dq = view(0, kHeads, f.head_q);
    s.backward.dk = view(f.k_at, f.heads_k, f.head_k);
    s.backward.dv = view(f.v_at, f.heads_k, f.head_k);
    EXPECT_EQ(refusal(s.backward), "") << f.name;
    // One element earlier, dv meets the last number of some run of dk.
    s.backward.dv.data = fused.data() + f.v_at - 1;
    EXPECT_TRUE(says(refusal(s.backward), "dv", "dk")) << f.name << ": " << refusal(s.backward);
  }
}

// Brute force: the answer of runs_meet against the sets of bytes.
TEST(Overlap, MatchesTheSetsOfBytes) {
  Random random(3);
  int apart = 0, together = 0, cautious = 0;
  std::vector<std::byte> memory(1 << 16);
  const auto tensor = [&](int shared_stride) {
    TensorView t{memory.data() + random.between(0, 40) * 4, DType::f32, 4, {}, {}};
    std::int64_t inner = t.shape[3] = random.between(1, 4);
    t.stride[3] = 1;
    for (std::size_t d = 3; d-- > 0;) {
      t.shape[d] = random.between(1, 3);
      t.stride[d] = inner + random.between(0, 6);
      if (d == 0) t.stride[d] = std::max<std::int64_t>(inner, shared_stride);
      inner = t.stride[d] * t.shape[d];
    }
    return t;
  };
  const auto bytes_of_view = [&](const TensorView& t) {
    std::set<const std::byte*> bytes;
    for (std::int64_t b = 0; b < t.shape[0]; ++b)
      for (std::int64_t s = 0; s < t.shape[1]; ++s)
        for (std::int64_t h = 0; h < t.shape[2]; ++h)
          for (std::int64_t c = 0; c < t.shape[3]; ++c)
            bytes.insert(static_cast<std::byte*>(t.data) +
                         4 * (b * t.stride[0] + s * t.stride[1] + h * t.stride[2] + c));
    return bytes;
  };
  for (int i = 0; i < 20000; ++i) {
    const int shared = random.between(1, 120);
    const TensorView a = tensor(shared), b = tensor(random.chance(0.7) ? shared : 1);
    const std::set<const std::byte*> in_a = bytes_of_view(a);
    bool meet = false;
    for (const std::byte* at : bytes_of_view(b)) meet = meet || in_a.contains(at);
    const bool answer = overlap(footprint("a", a), footprint("b", b));
    ASSERT_FALSE(meet && !answer) << "an overlap was missed in problem " << i;
    (meet ? together : answer ? cautious : apart) += 1;
  }
  EXPECT_GT(together, 1000);
  EXPECT_GT(apart, 1000);
  EXPECT_EQ(cautious, 0);
}

}  // namespace
}  // namespace heed::test
