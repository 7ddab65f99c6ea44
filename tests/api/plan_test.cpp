// Plans: workspace contract, printing, forcing a device or a kernel, options.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <optional>

#include "api/small_problem.hpp"
#include "registry.hpp"

namespace heed::test {
namespace {

// Sets an environment variable for one scope.
class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    setenv(name, value, 1);
  }
  ~Environment() {
    if (old_)
      setenv(name_, old_->c_str(), 1);
    else
      unsetenv(name_);
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
  std::optional<std::string> old_;
};

// Large enough that every kernel wants scratch memory.
const Sizes kMedium{.batch = 1,
                    .seqlen_q = 70,
                    .seqlen_k = 90,
                    .heads_q = 4,
                    .heads_k = 2,
                    .head_dim = 16,
                    .head_dim_v = 16};

template <class Problem>
void expect_workspace_contract(const Problem& problem) {
  for (const Device& device : cpu_devices()) {
    SCOPED_TRACE(name_of(device.arch));
    const Result<Plan> made = plan(problem, device);
    ASSERT_TRUE(made.ok()) << made.status().message();
    const std::size_t bytes = made->workspace_bytes;
    ASSERT_GT(bytes, 0u);
    EXPECT_EQ(bytes % kWorkspaceAlignment, 0u);
    Scratch scratch(bytes);
    const Workspace exact = scratch.workspace();
    EXPECT_EQ(run(*made, problem, exact).message(), "");

    const std::string needed = std::to_string(bytes);
    Status s = run(*made, problem, {exact.data, bytes - 1});
    EXPECT_EQ(s.code(), Code::invalid);
    EXPECT_EQ(s.message(),
              "workspace.bytes = " + std::to_string(bytes - 1) + " must be at least " + needed);
    s = run(*made, problem, {});
    EXPECT_EQ(s.message(), "workspace.bytes = 0 must be at least " + needed);
    for (void* bad : {static_cast<void*>(static_cast<std::byte*>(exact.data) + 4),
                      static_cast<void*>(nullptr)}) {
      s = run(*made, problem, {bad, bytes});
      EXPECT_EQ(s.code(), Code::invalid);
      EXPECT_NE(s.message().find("workspace.data"), std::string::npos) << s.message();
      EXPECT_NE(s.message().find("64"), std::string::npos) << s.message();
    }
  }
}

TEST(Workspace, ForwardContract) { expect_workspace_contract(SmallProblem(kMedium).forward); }
TEST(Workspace, BackwardContract) { expect_workspace_contract(SmallProblem(kMedium).backward); }
TEST(Workspace, DecodeContract) {
  SmallProblem small({.batch = 1, .seqlen_q = 1, .seqlen_k = 2000, .heads_q = 2, .heads_k = 1});
  expect_workspace_contract(small.forward);
}

TEST(Workspace, OneLineCallSaysWhatItNeeds) {
  SmallProblem small(kMedium);
  const Status s = forward(small.forward);
  EXPECT_EQ(s.code(), Code::invalid);
  EXPECT_EQ(s.message().rfind("workspace.bytes = 0 must be at least ", 0), 0u) << s.message();
  Scratch scratch(std::strtoull(
      s.message().c_str() + std::strlen("workspace.bytes = 0 must be at least "), nullptr, 10));
  EXPECT_EQ(forward(small.forward, scratch.workspace()).message(), "");
}

TEST(Plans, ArePlainValues) {
  static_assert(std::is_trivially_copyable_v<Plan>);
  SmallProblem small;
  const Plan made = plan(small.forward, {.arch = Arch::scalar, .units = 1}).value();
  EXPECT_EQ(describe(made).rfind(name_of(*made.row) + ": ", 0), 0u) << describe(made);
  EXPECT_NE(describe(made).find("workspace " + std::to_string(made.workspace_bytes) + " bytes"),
            std::string::npos);
  EXPECT_EQ(plan(small.forward, {.arch = Arch::scalar, .units = 3})->workers, 3);
}

TEST(Plans, OfOnePassRefuseTheOther) {
  SmallProblem small;
  const Device device{};
  Scratch scratch(1 << 22);
  const Plan forward_plan = plan(small.forward, device).value();
  const Plan backward_plan = plan(small.backward, device).value();
  EXPECT_EQ(run(forward_plan, small.backward, scratch.workspace()).code(), Code::invalid);
  EXPECT_EQ(run(backward_plan, small.forward, scratch.workspace()).code(), Code::invalid);
  EXPECT_EQ(run(Plan{}, small.forward, scratch.workspace()).code(), Code::invalid);
}

TEST(Plans, ExplainWhyBetterKernelsDoNotServe) {
  SmallProblem small;
  const std::string text = explain(small.forward, {.arch = Arch::scalar, .units = 1});
  EXPECT_EQ(text.find("scalar/"), 0u) << text;
  for (const KernelRow& row : registry())
    if (row.pass == Pass::forward && row.dtype == DType::f32 && row.arch > Arch::scalar) {
      EXPECT_NE(text.find("not " + name_of(row) + ": needs " + name_of(row.arch) +
                          ", this device is scalar"),
                std::string::npos)
          << text;
    }
}

TEST(Plans, AnInventedDeviceNeedsNoMachine) {
  SmallProblem small;
  for (const KernelRow& row : registry()) {
    if (row.dtype != DType::f32) continue;
    const Device device{.arch = row.arch, .units = 4};
    const Result<Plan> made =
        row.pass == Pass::backward ? plan(small.backward, device) : plan(small.forward, device);
    ASSERT_TRUE(made.ok()) << made.status().message();
    EXPECT_EQ(made->row->arch, row.arch);
  }
}

TEST(Plans, ForADeviceWithoutKernelsAreRefused) {
  SmallProblem small;
  for (const Arch arch : {Arch::sm80, Arch::sm90, Arch::sm100, Arch::sm120}) {
    const Status s = plan(small.forward, {.arch = arch, .units = 132}).status();
    EXPECT_EQ(s.code(), Code::unsupported);
    EXPECT_NE(s.message().find(name_of(arch)), std::string::npos) << s.message();
  }
}

TEST(Plans, ForAnAbsurdNumberOfThreadsAreRefused) {
  const SmallProblem small;
  for (const int units : {-1, 0, 65537, 1 << 30}) {
    const Status s = plan(small.forward, {.arch = Arch::scalar, .units = units}).status();
    EXPECT_EQ(s.code(), Code::invalid);
    EXPECT_EQ(s.message(),
              "device.units = " + std::to_string(units) +
                  " must be in [1, 65536]: threads of a CPU, multiprocessors of a GPU");
  }
  EXPECT_TRUE(plan(small.forward, {.arch = Arch::scalar, .units = 65536}).ok());
}

// Tensors that repeat in memory are legal at any size, and so are empty ones.
TEST(Plans, WhoseMemoryCannotBeCountedAreRefused) {
  SmallProblem small;
  const std::int64_t most = (std::int64_t{1} << 31) - 1;
  for (ConstTensorView* x : {&small.forward.k, &small.forward.v}) {
    x->shape = {2, (1 << 30) - 1, most, x->head_dim()};
    x->stride = {0, 0, 0, 1};
  }
  small.forward.q.shape[1] = small.forward.out.shape[1] = 0;
  small.forward.q.shape[2] = small.forward.out.shape[2] = most;
  const Status s = plan(small.forward, {}).status();
  EXPECT_EQ(s.code(), Code::unsupported);
  EXPECT_EQ(s.message(),
            "k.heads = 2147483647 times 2147483646 tokens of all batch entries must be at most "
            "1099511627776");
  small.forward.q.shape[0] = small.forward.out.shape[0] = small.forward.k.shape[0] =
      small.forward.v.shape[0] = most;
  EXPECT_EQ(plan(small.forward, {}).status().message(),
            "q.heads = 2147483647 times 2147483647 batch entries must be at most 4294967296");
}

// ---- which problems Hopper's own kernels take; planning reads no tensor ----

constexpr Device kH200{.arch = Arch::sm90, .units = 132};

ForwardProblem hopper_problem(std::int64_t seqlen_q = 512, std::int64_t seqlen_k = 512,
                              std::int64_t head_dim = 128, std::int64_t head_dim_v = 128) {
  const auto at = [](std::uintptr_t place) { return reinterpret_cast<void*>(place << 40); };
  ForwardProblem p;
  p.q = contiguous(at(1), DType::bf16, {2, seqlen_q, 8, head_dim});
  p.k = contiguous(at(2), DType::bf16, {2, seqlen_k, 4, head_dim});
  p.v = contiguous(at(3), DType::bf16, {2, seqlen_k, 4, head_dim_v});
  p.out = contiguous(at(4), DType::bf16, {2, seqlen_q, 8, head_dim_v});
  return p;
}

class Hopper : public testing::Test {
 protected:
  void SetUp() override {
    for (const KernelRow& row : registry())
      if (row.arch == Arch::sm90) return;
    GTEST_SKIP() << "built without code for sm_90";
  }
  // The row's name, and behind it why Hopper's own was not taken.
  static std::string chosen(const ForwardProblem& p, const Options& options = {}) {
    const Result<Plan> made = plan(p, kH200, options);
    if (!made.ok()) return made.status().message();
    const std::string text = explain(p, kH200, options);
    const std::size_t why = text.find("not sm90/forward");
    const std::size_t begin = why == std::string::npos ? 0 : text.find(": ", why);
    return name_of(*made->row) +
           (why == std::string::npos ? "" : text.substr(begin, text.find('\n', why) - begin));
  }
};

TEST_F(Hopper, TakesTheNarrowestKernel) {
  EXPECT_EQ(chosen(hopper_problem()),
            "sm90/forward/bf16/hdim128/plain/128x128: takes head_dim up "
            "to 64, here 128");
  EXPECT_EQ(chosen(hopper_problem(512, 512, 64, 64)), "sm90/forward/bf16/hdim64/plain/192x128");
  EXPECT_EQ(chosen(hopper_problem(512, 512, 192, 128)).rfind("sm90/forward/bf16/hdim192v128/", 0),
            0u);
  EXPECT_EQ(chosen(hopper_problem(512, 512, 192, 192)).rfind("sm90/forward/bf16/hdim192/", 0), 0u);
  EXPECT_EQ(chosen(hopper_problem(512, 512, 64, 128)).rfind("sm90/forward/bf16/hdim128/", 0), 0u);
  ForwardProblem p = hopper_problem();
  p.score.softcap = 30.f;
  EXPECT_EQ(chosen(p).rfind("sm90/forward/bf16/hdim128/softcap/", 0), 0u);
}

TEST_F(Hopper, LeavesToOthersWhatItDoesNotTake) {
  const auto left = [](const ForwardProblem& p, const std::string& why) {
    const std::string text = chosen(p);
    EXPECT_EQ(text.rfind("sm80/", 0), 0u) << text;
    EXPECT_NE(text.find(why), std::string::npos) << text;
  };
  ForwardProblem p = hopper_problem(512, 512, 64, 64);
  p.score.scale = -1.f;
  left(p, "needs a scale of at least 0");
  p = hopper_problem(512, 512, 64, 64);
  p.k.data = static_cast<const std::byte*>(p.k.data) + 2;
  left(p, "addresses that are multiples of 16 bytes");
  p = hopper_problem(512, 512, 60, 60);
  left(p, "multiples of 8");
  p = hopper_problem(512, 512, 64, 64);
  p.v.stride[2] = 0;
  left(p, "repeat no axis");
  p = hopper_problem(512, 512, 64, 64);
  const float bias = 0.f;
  p.bias = contiguous(&bias, DType::f32, {1, 1, 1, 512});
  left(p, "computes plain scores, here general");
  EXPECT_EQ(chosen(hopper_problem(8, 512, 64, 64)).rfind("sm80/decode/", 0), 0u);
}

TEST_F(Hopper, PagesFitIntoTilesOrTilesIntoPages) {
  const std::int32_t table = 0, used = 0;
  const auto paged = [&](std::int64_t page_size, std::int64_t head_dim) {
    ForwardProblem p = hopper_problem(512, 512, head_dim, head_dim);
    for (ConstTensorView* x : {&p.k, &p.v})
      *x = contiguous(x->data, DType::bf16, {64, page_size, 4, head_dim});
    p.paged = {&table, 32};
    p.sequences.seqused_k = &used;
    return chosen(p).substr(0, 4);
  };
  for (const int page_size : {8, 16, 64, 128, 256, 384}) EXPECT_EQ(paged(page_size, 64), "sm90");
  for (const int page_size : {1, 4, 24, 96, 192}) EXPECT_EQ(paged(page_size, 64), "sm80");
  for (const int page_size : {16, 80}) EXPECT_EQ(paged(page_size, 256), "sm90");
  for (const int page_size : {32, 256}) EXPECT_EQ(paged(page_size, 256), "sm80");
}

BackwardProblem hopper_backward(std::int64_t head_dim = 128, std::int64_t head_dim_v = 128) {
  const auto at = [](std::uintptr_t place) { return reinterpret_cast<void*>(place << 40); };
  BackwardProblem b;
  b.forward = hopper_problem(512, 512, head_dim, head_dim_v);
  b.forward.lse = static_cast<float*>(at(5));
  const auto like = [&](std::uintptr_t place, const auto& x) {
    return contiguous(at(place), DType::bf16, {2, 512, x.heads(), x.head_dim()});
  };
  b.dout = like(6, b.forward.out);
  b.dq = like(7, b.forward.q);
  b.dk = like(8, b.forward.k);
  b.dv = like(9, b.forward.v);
  return b;
}

TEST_F(Hopper, TakesTheBackwardsThatItCan) {
  const auto row = [](const BackwardProblem& b) {
    const Result<Plan> made = plan(b, kH200);
    return made.ok() ? name_of(*made->row) : made.status().message();
  };
  EXPECT_EQ(row(hopper_backward()), "sm90/backward/bf16/hdim128/plain/64x128");
  EXPECT_EQ(row(hopper_backward(64, 64)), "sm90/backward/bf16/hdim64/plain/128x128");
  EXPECT_EQ(row(hopper_backward(64, 96)), "sm90/backward/bf16/hdim96/plain/64x128");
  EXPECT_EQ(row(hopper_backward(192, 128)), "sm90/backward/bf16/hdim192/plain/64x64");
  EXPECT_EQ(row(hopper_backward(256, 256)), "sm90/backward/bf16/hdim256/plain/64x64");
  const auto left = [&](const BackwardProblem& b, const std::string& why) {
    EXPECT_EQ(row(b).rfind("sm80/backward/", 0), 0u) << row(b);
    const std::string text = explain(b, kH200);
    EXPECT_NE(text.find(why), std::string::npos) << text;
  };
  BackwardProblem b = hopper_backward();
  b.dout.stride[2] = 0;
  left(b, "repeat no axis");
  b = hopper_backward();
  b.dout.data = static_cast<const std::byte*>(b.dout.data) + 2;
  left(b, "addresses that are multiples of 16 bytes");
  b = hopper_backward();
  b.forward.score.softcap = 30.f;
  left(b, "computes plain scores, here softcap");
  b = hopper_backward();
  b.forward.score.scale = -1.f;
  left(b, "needs a scale of at least 0");
}

TEST_F(Hopper, FewKeysTakeTilesThatDivideThem) {
  const auto row = [](std::int64_t seqlen_k) {
    const Result<Plan> made = plan(hopper_problem(512, seqlen_k, 256, 256), kH200);
    return made.ok() ? name_of(*made->row) : made.status().message();
  };
  EXPECT_EQ(row(512), "sm90/forward/bf16/hdim256/plain/128x64");
  EXPECT_EQ(row(513), "sm90/forward/bf16/hdim256/plain/128x80");
  const std::string text = explain(hopper_problem(512, 513, 256, 256), kH200);
  EXPECT_NE(text.find("takes up to 512 keys of an entry, here 513"), std::string::npos) << text;
}

TEST_F(Hopper, FewTilesSplitTheirKeys) {
  ForwardProblem p = hopper_problem(128, 65536);
  Result<Plan> made = plan(p, kH200);
  ASSERT_TRUE(made.ok());
  EXPECT_EQ(made->row->arch, Arch::sm90);
  EXPECT_GT(made->splits, 4);  // 16 tiles of queries
  EXPECT_GE(made->workspace_bytes, static_cast<std::size_t>(made->splits) * 2 * 8 * 128 * 128 * 4);
  made = plan(hopper_problem(4096, 4096), kH200);
  EXPECT_EQ(made->splits, 1);
  EXPECT_EQ(made->workspace_bytes, 0u);  // equal items need no counter
  p = hopper_problem(4096, 4096);
  p.band = kCausal;
  EXPECT_EQ(plan(p, kH200)->workspace_bytes, kWorkspaceAlignment);
  EXPECT_EQ(plan(p, kH200, {.splits = 3})->splits, 3);
}

TEST(Options, ForceAKernel) {
  SmallProblem small;
  const Device device = Device::cpu().value();
  EXPECT_EQ(plan(small.forward, device, {.force = "reference"})->row->arch, Arch::reference);
  EXPECT_EQ(name_of(*plan(small.backward, device, {.force = "scalar/backward/f32"})->row),
            "scalar/backward/f32");
  const Status s = plan(small.forward, device, {.force = "abacus"}).status();
  EXPECT_EQ(s.code(), Code::unsupported);
  EXPECT_NE(s.message().find("abacus"), std::string::npos) << s.message();
  EXPECT_NE(s.message().find("heed list"), std::string::npos) << s.message();
}

TEST(Options, EnvironmentForcesAKernel) {
  SmallProblem small;
  const Device device = Device::cpu().value();
  const Environment forced("HEED_FORCE_KERNEL", "reference");
  EXPECT_EQ(plan(small.forward, device)->row->arch, Arch::reference);
  EXPECT_EQ(plan(small.backward, device)->row->arch, Arch::reference);
  EXPECT_EQ(plan(small.forward, device, {.force = "scalar"})->row->arch, Arch::scalar);
}

TEST(Options, SplitsAreKept) {
  SmallProblem small({.batch = 1, .seqlen_q = 1, .seqlen_k = 4096, .heads_q = 2, .heads_k = 1});
  for (const int splits : {1, 3, 8}) {
    const Result<Plan> made = plan(small.forward, {}, {.splits = splits});
    ASSERT_TRUE(made.ok());
    EXPECT_EQ(made->splits, splits);
  }
  const Status s = plan(small.forward, {}, {.splits = -1}).status();
  EXPECT_EQ(s.code(), Code::invalid);
  EXPECT_NE(s.message().find("splits = -1 must be"), std::string::npos) << s.message();
}

TEST(Devices, EnvironmentLowersTheInstructionSet) {
  for (const Device& device : cpu_devices()) {
    const Environment forced("HEED_FORCE_ISA", name_of(device.arch));
    const Result<Device> cpu = Device::cpu();
    ASSERT_TRUE(cpu.ok());
    EXPECT_EQ(cpu->arch, device.arch);
    SmallProblem small;
    EXPECT_LE(plan(small.forward, *cpu)->row->arch, device.arch);
  }
  const Environment forced("HEED_FORCE_ISA", "mmx");
  const Status s = Device::cpu().status();
  EXPECT_EQ(s.code(), Code::invalid);
  EXPECT_EQ(
      s.message(),
      "HEED_FORCE_ISA = mmx must be one of reference, scalar, avx2, avx512, avx512_bf16, amx_bf16, "
      "neon, neon_bf16");
}

// Everything that the CPU offers but slow dot products.
TEST(Devices, PlansTakeTheFastestInstructionSet) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool slow = cpu::best_arch() == Arch::avx512_bf16 && __builtin_cpu_is("intel");
#else
  const bool slow = false;
#endif
  EXPECT_EQ(Device::cpu()->arch, slow ? Arch::avx512 : cpu::best_arch());
}

#if defined(__x86_64__)
// Tiles are set up and filled with zeros, which few rows and few keys do not pay; and where there
// are tiles, dot products are slower than fp32.
TEST(Devices, TilesAreTakenWhereTheyPay) {
  struct Case {
    std::int64_t seqlen_q, seqlen_k;  // two query heads share a key head
    const char *forward, *backward, *why_not;
  };
  const Device device{.arch = Arch::amx_bf16, .units = 2};
  for (const Case& c : {Case{2, 1000, "avx512/decode/bf16", "amx_bf16/backward/bf16",
                             "takes at least 5 query rows per key head, here 4"},
                        Case{3, 1000, "amx_bf16/decode/bf16", "amx_bf16/backward/bf16", ""},
                        Case{4, 17, "avx512/decode/bf16", "avx512/backward/bf16",
                             "takes at least 144 scores per key head, here 136"},
                        Case{4, 18, "amx_bf16/decode/bf16", "avx512/backward/bf16", ""},
                        Case{32, 16, "amx_bf16/decode/bf16", "amx_bf16/backward/bf16", ""},
                        Case{40, 40, "amx_bf16/forward/bf16", "amx_bf16/backward/bf16", ""}}) {
    SmallProblem small({.seqlen_q = c.seqlen_q, .seqlen_k = c.seqlen_k});
    BackwardProblem& b = small.backward;
    for (ConstTensorView* t : {&b.forward.q, &b.forward.k, &b.forward.v, &b.dout})
      t->dtype = DType::bf16;
    for (TensorView* t : {&b.forward.out, &b.dq, &b.dk, &b.dv}) t->dtype = DType::bf16;
    const Result<Plan> forward = plan(b.forward, device), backward = plan(b, device);
    ASSERT_TRUE(forward.ok() && backward.ok()) << forward.status().message();
    EXPECT_EQ(name_of(*forward->row), c.forward) << c.seqlen_q << " x " << c.seqlen_k;
    EXPECT_EQ(name_of(*backward->row), c.backward) << c.seqlen_q << " x " << c.seqlen_k;
    const std::string text = explain(b.forward, device);
    EXPECT_NE(text.find(c.why_not), std::string::npos) << text;
    if (*c.why_not == '\0') continue;
    EXPECT_NE(
        text.find("not avx512_bf16/decode/bf16: on CPUs with AMX, bf16 dot products are slower"),
        std::string::npos)
        << text;
    const Environment forced("HEED_FORCE_KERNEL", "amx_bf16/decode");
    EXPECT_EQ(name_of(*plan(b.forward, device)->row), "amx_bf16/decode/bf16");
  }
}
#endif

// An instruction set of processors that this one is not.
Arch of_another_cpu() { return Device::cpu()->arch >= Arch::neon ? Arch::avx2 : Arch::neon; }

TEST(Devices, AnInstructionSetTheMachineLacksIsRefused) {
  const Arch here = cpu::best_arch();
  const Environment forced("HEED_FORCE_ISA", name_of(of_another_cpu()));
  const Status s = Device::cpu().status();
  EXPECT_EQ(s.code(), Code::unsupported);
  EXPECT_NE(s.message().find(std::string("this CPU offers up to ") + name_of(here)),
            std::string::npos);
}

TEST(Plans, ForACpuThisIsNotAreRefused) {
  const SmallProblem small(kMedium);
  const Result<Plan> made = plan(small.forward, *Device::cpu());
  ASSERT_TRUE(made.ok());
  KernelRow row = *made->row;
  row.arch = of_another_cpu();
  Plan foreign = *made;
  foreign.row = &row;
  Scratch scratch(foreign.workspace_bytes);
  const Status s = run(foreign, small.forward, scratch.workspace());
  EXPECT_EQ(s.code(), Code::unsupported);
  EXPECT_EQ(s.message().rfind(
                std::string("plan is for ") + name_of(row.arch) + ", this CPU offers up to ", 0),
            0u)
      << s.message();
}

}  // namespace
}  // namespace heed::test
