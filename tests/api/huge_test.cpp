// Tensors past 2^31 elements: strides that only 64-bit offsets reach, in memory that is never all
// there.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>

#include "api/small_problem.hpp"

namespace heed::test {
namespace {

// Address space without memory: a page appears when it is touched.
class Sparse {
 public:
  explicit Sparse(std::size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~Sparse() {
    if (ok()) munmap(data_, bytes_);
  }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;
  bool ok() const { return data_ != MAP_FAILED; }
  float* at(std::int64_t element) const { return static_cast<float*>(data_) + element; }

 private:
  std::size_t bytes_;
  void* data_;
};

using Strides = std::array<std::int64_t, 4>;

// Moves a dense tensor to `strides` inside sparse memory, or back.
template <class Copy>
void for_each_row(const TensorView& dense, const Strides& strides, const Copy& copy) {
  for (std::int64_t b = 0; b < dense.shape[0]; ++b)
    for (std::int64_t s = 0; s < dense.shape[1]; ++s)
      for (std::int64_t h = 0; h < dense.shape[2]; ++h)
        copy(b * dense.stride[0] + s * dense.stride[1] + h * dense.stride[2],
             b * strides[0] + s * strides[1] + h * strides[2]);
}

// More than 2^31 elements between two batch entries, two tokens or two heads.
constexpr std::int64_t kFar = (std::int64_t{1} << 31) + 4096;
constexpr Strides kFarStrides[] = {
    {kFar, 64, 16, 1}, {1 << 20, kFar, 16, 1}, {1 << 20, 64, kFar, 1}};

class Huge : public testing::TestWithParam<Device> {};
INSTANTIATE_TEST_SUITE_P(Cpu, Huge, testing::ValuesIn(cpu_devices()), [](const auto& device) {
  return std::string(name_of(device.param.arch));
});

TEST_P(Huge, StridesPast2To31) {
  const Sizes sizes{.batch = 2,
                    .seqlen_q = 3,
                    .seqlen_k = 3,
                    .heads_q = 2,
                    .heads_k = 2,
                    .head_dim = 8,
                    .head_dim_v = 8};
  SmallProblem dense(sizes);
  dense.forward.band = kCausal;
  ASSERT_EQ(plan_and_run(dense.forward, GetParam()).message(), "");
  ASSERT_EQ(plan_and_run(dense.backward, GetParam()).message(), "");

  for (const Strides& strides : kFarStrides) {
    SmallProblem far(sizes);
    far.forward.band = kCausal;
    const std::int64_t slot = 4 * kFar;  // elements between tensors
    const Sparse memory(static_cast<std::size_t>(8 * slot) * 4);
    if (!memory.ok()) GTEST_SKIP() << "no address space of 256 GiB here";
    std::int64_t used = 0;
    const auto move = [&](auto& view) {
      const auto* from = static_cast<const float*>(view.data);
      float* to = memory.at(used);
      used += slot;
      TensorView old{const_cast<float*>(from), view.dtype, view.rank, view.shape, view.stride};
      for_each_row(old, strides, [&](std::int64_t i, std::int64_t j) {
        std::memcpy(to + j, from + i, static_cast<std::size_t>(view.shape[3]) * 4);
      });
      view.data = to;
      view.stride = strides;
    };
    const auto expect_same = [&](const TensorView& got, const std::vector<float>& expected) {
      const TensorView like =
          contiguous(const_cast<float*>(expected.data()), DType::f32, got.shape);
      for_each_row(like, strides, [&](std::int64_t i, std::int64_t j) {
        EXPECT_EQ(std::memcmp(static_cast<const float*>(got.data) + j, expected.data() + i,
                              static_cast<std::size_t>(got.shape[3]) * 4),
                  0);
      });
    };
    for (auto* view : {&far.forward.q, &far.forward.k, &far.forward.v, &far.backward.dout})
      move(*view);
    for (auto* view : {&far.forward.out, &far.backward.dq, &far.backward.dk, &far.backward.dv})
      move(*view);
    ASSERT_EQ(plan_and_run(far.forward, GetParam()).message(), "");
    expect_same(far.forward.out, dense.out);
    EXPECT_EQ(far.lse, dense.lse);
    ASSERT_EQ(plan_and_run(far.backward, GetParam()).message(), "");
    expect_same(far.backward.dq, dense.dq);
    expect_same(far.backward.dk, dense.dk);
    expect_same(far.backward.dv, dense.dv);
  }
}

// Planning reads no tensor, so the addresses may be anything aligned.
TEST_P(Huge, PlansTensorsOf2To40Elements) {
  const auto view = [](std::uintptr_t address, std::int64_t heads) {
    return contiguous(reinterpret_cast<void*>(address << 44), DType::bf16,
                      {1 << 10, 1 << 17, heads, 128});
  };
  ForwardProblem p{.q = view(1, 64), .k = view(2, 8), .v = view(3, 8), .out = view(4, 64)};
  p.lse = reinterpret_cast<float*>(std::uintptr_t{5} << 44);
  const Result<Plan> made = plan(p, GetParam());
  ASSERT_TRUE(made.ok()) << made.status().message();
  const BackwardProblem b{
      .forward = p, .dout = view(6, 64), .dq = view(7, 64), .dk = view(8, 8), .dv = view(9, 8)};
  EXPECT_TRUE(plan(b, GetParam()).ok()) << plan(b, GetParam()).status().message();
}

}  // namespace
}  // namespace heed::test
