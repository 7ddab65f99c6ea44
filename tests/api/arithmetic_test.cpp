// What the calling thread's floating-point control register says changes no result, and is as it
// was after a call.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "api/small_problem.hpp"
#include "support/run.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace heed::test {
namespace {

#if defined(__x86_64__)
std::uint64_t control() { return _mm_getcsr() & 0xFFC0u; }
void set_control(std::uint64_t bits) { _mm_setcsr(static_cast<unsigned>(bits)); }
constexpr std::uint64_t kSettings[] = {
    0x1F80 | 0x8040,           // subnormal results and operands count as zero
    0x1F80 | 0x2000,           // rounds down
    0x1F80 | 0x6000 | 0x8040,  // rounds toward zero, without subnormal numbers
    0x1900,                    // infinities and invalid operations trap
};
#elif defined(__aarch64__)
std::uint64_t control() {
  std::uint64_t bits = 0;
  asm volatile("mrs %0, fpcr" : "=r"(bits));
  return bits;
}
void set_control(std::uint64_t bits) { asm volatile("msr fpcr, %0" : : "r"(bits) : "memory"); }
constexpr std::uint64_t kSettings[] = {
    1u << 24,            // subnormal results and operands count as zero
    2u << 22,            // rounds down
    3u << 22 | 1u << 24  // rounds toward zero, without subnormal numbers
};
#endif

#if defined(__x86_64__) || defined(__aarch64__)
// Small and odd enough that other arithmetic shows: v and dout have subnormal elements.
void make_subnormal(SmallProblem& small) {
  for (auto* tensor : {&small.v, &small.dout})
    for (std::size_t i = 0; i < tensor->size(); ++i)
      if (i % 3 == 0) (*tensor)[i] *= 0x1p-130f;
}

struct Outcome {
  std::vector<float> all;
  std::uint64_t control_after;
};

// Both passes by a thread whose control register says `setting`.
Outcome run_with(std::uint64_t setting, Device device, int workers) {
  SmallProblem small({.batch = 2,
                      .seqlen_q = 110,
                      .seqlen_k = 130,
                      .heads_q = 4,
                      .heads_k = 2,
                      .head_dim = 24,
                      .head_dim_v = 24});
  make_subnormal(small);
  small.forward.band = kCausal;
  device.units = workers;
  const Plan forward = plan(small.forward, device).value();
  const Plan backward = plan(small.backward, device).value();
  Scratch scratch(std::max(forward.workspace_bytes, backward.workspace_bytes));
  // Its threads begin with the control register of the thread that starts them.
  ThreadExecutor executor(workers);
  const std::uint64_t before = control();
  set_control(setting);
  const Status first = run(forward, small.forward, scratch.workspace(), executor);
  const Status second = run(backward, small.backward, scratch.workspace(), executor);
  const std::uint64_t after = control();
  set_control(before);
  EXPECT_EQ(first.message() + second.message(), "");
  Outcome outcome{.all = {}, .control_after = after};
  for (const auto* part : {&small.out, &small.lse, &small.dq, &small.dk, &small.dv})
    outcome.all.insert(outcome.all.end(), part->begin(), part->end());
  return outcome;
}

TEST(Arithmetic, OfTheCallerChangesNothing) {
  for (const Device& device : cpu_devices())
    for (const int workers : {1, 3}) {
      SCOPED_TRACE(std::string(name_of(device.arch)) + ", " + std::to_string(workers));
      const std::vector<float> expected = run_with(control(), device, workers).all;
      for (const std::uint64_t setting : kSettings) {
        const Outcome got = run_with(setting, device, workers);
        EXPECT_EQ(std::memcmp(got.all.data(), expected.data(), expected.size() * 4), 0) << setting;
        EXPECT_EQ(got.control_after, setting);
      }
    }
}
#endif

}  // namespace
}  // namespace heed::test
