// src/cuda/ptx/mma.cuh: tensor core products, matrix loads, rounding to 16 bits, 2^x.
#include "cuda/ptx/mma.cuh"

#include <bit>
#include <limits>

#include "tile/support.cuh"

namespace heed::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

class PtxMma : public GpuTest {};

template <class Element>
struct Mma {
  using Shared = Nothing;
  const Element* a;  // [16][16]
  const Element* b;  // [16][8]
  float* d;          // [16][8]

  __device__ static std::uint32_t pair(Element low, Element high) {
    return low.bits | std::uint32_t{high.bits} << 16;
  }
  __device__ void operator()(Shared&) const {
    const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
    const auto left = [&](int row, int k) { return pair(a[16 * row + k], a[16 * row + k + 1]); };
    const auto right = [&](int k, int col) { return pair(b[8 * k + col], b[8 * (k + 1) + col]); };
    const std::uint32_t four[4] = {left(g, 2 * t), left(g + 8, 2 * t), left(g, 2 * t + 8),
                                   left(g + 8, 2 * t + 8)};
    float* const at[4] = {d + 8 * g + 2 * t, d + 8 * g + 2 * t + 1, d + 8 * (g + 8) + 2 * t,
                          d + 8 * (g + 8) + 2 * t + 1};
    float acc[4] = {*at[0], *at[1], *at[2], *at[3]};
    ptx::mma<Element>(acc, four, right(2 * t, g), right(2 * t + 8, g));
    for (int i = 0; i < 4; ++i) *at[i] = acc[i];
  }
};

template <class Element>
void check_mma() {
  const Matrix a = small_integers(16, 16, 1), b = small_integers(16, 8, 2);
  Matrix expected = small_integers(16, 8, 3);
  const DeviceArray<Element> a_device(rounded<Element>(a)), b_device(rounded<Element>(b));
  const DeviceArray<float> d_device(rounded<float>(expected));
  launch(Mma<Element>{a_device.data(), b_device.data(), d_device.data()});
  for (int row = 0; row < 16; ++row)
    for (int col = 0; col < 8; ++col)
      for (int k = 0; k < 16; ++k) expected(row, col) += a(row, k) * b(k, col);
  expect_equal(expected, matrix_of(16, 8, d_device.values()), "d += a b");
}

TEST_F(PtxMma, AddsTheProductBf16) { check_mma<bf16>(); }
TEST_F(PtxMma, AddsTheProductF16) { check_mma<f16>(); }

// Element c of row r of matrix i is 64 i + 8 r + c. Rows stand in an order of their own: only the
// lanes' addresses say where.
template <bool kTransposed>
struct LoadMatrix {
  using Shared = std::uint16_t[32][8];
  std::uint32_t* registers;  // [32 lanes][4]

  __device__ void operator()(Shared& shared) const {
    const int lane = static_cast<int>(threadIdx.x), place = 11 * lane % 32;
    for (int c = 0; c < 8; ++c) shared[place][c] = static_cast<std::uint16_t>(8 * lane + c);
    __syncwarp();
    std::uint32_t r[4];
    if constexpr (kTransposed)
      ptx::ldmatrix_trans(r, ptx::shared_address(shared[place]));
    else
      ptx::ldmatrix(r, ptx::shared_address(shared[place]));
    for (int i = 0; i < 4; ++i) registers[4 * lane + i] = r[i];
  }
};

template <bool kTransposed>
void check_ldmatrix() {
  const DeviceArray<std::uint32_t> registers(32 * 4);
  launch(LoadMatrix<kTransposed>{registers.data()});
  const std::vector<std::uint32_t> actual = registers.values();
  for (std::uint32_t lane = 0; lane < 32; ++lane)
    for (std::uint32_t i = 0; i < 4; ++i) {
      const std::uint32_t g = lane / 4, t = lane % 4;
      const std::uint32_t low = 64 * i + (kTransposed ? 8 * (2 * t) + g : 8 * g + 2 * t);
      const std::uint32_t high = low + (kTransposed ? 8 : 1);
      EXPECT_EQ(low | high << 16, actual[4 * lane + i]) << "lane " << lane << ", matrix " << i;
    }
}

TEST_F(PtxMma, LdmatrixGivesLaneItsPairOfARow) { check_ldmatrix<false>(); }
TEST_F(PtxMma, LdmatrixTransGivesLaneItsPairOfAColumn) { check_ldmatrix<true>(); }

// out[i] = pack(x[i], x[count - 1 - i])
template <class Element>
struct Pack {
  using Shared = Nothing;
  const float* x;
  std::uint32_t* out;
  int count;

  __device__ void operator()(Shared&) const {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) out[i] = ptx::pack<Element>(x[i], x[count - 1 - i]);
  }
};

template <class Element>
std::vector<std::uint32_t> pack_on_gpu(const std::vector<float>& x) {
  const DeviceArray<float> x_device(x);
  const DeviceArray<std::uint32_t> out(x.size());
  const int count = static_cast<int>(x.size());
  launch(Pack<Element>{x_device.data(), out.data(), count}, 256, (count + 255) / 256);
  return out.values();
}

TEST_F(PtxMma, PackPutsTheFirstLow) {
  EXPECT_EQ(pack_on_gpu<bf16>({1.f, -2.f})[0], 0xC0003F80u);
  EXPECT_EQ(pack_on_gpu<f16>({1.f, -2.f})[0], 0xC0003C00u);
}

TEST_F(PtxMma, PackRoundsTiesToEven) {
  // 1 + 1/2 and 1 + 3/2 spacings; a little above 1 + 1/2.
  EXPECT_EQ(pack_on_gpu<bf16>({1.f + 0x1p-8f, 1.f + 0x3p-8f})[0], 0x3F823F80u);
  EXPECT_EQ(pack_on_gpu<f16>({1.f + 0x1p-11f, 1.f + 0x3p-11f})[0], 0x3C023C00u);
  EXPECT_EQ(pack_on_gpu<bf16>({1.f + 0x1p-8f + 0x1p-23f, 0.f})[0], 0x00003F81u);
  EXPECT_EQ(pack_on_gpu<f16>({1.f + 0x1p-11f + 0x1p-23f, 0.f})[0], 0x00003C01u);
}

// Every value of the format, every boundary between two neighbours and the floats beside it.
template <class Element>
void check_pack(std::uint16_t infinity) {
  std::vector<float> x{kInf,     65520.f,      std::nextafter(65520.f, 0.f),
                       0x1p-25f, 0x1.8p-25f,   std::numeric_limits<float>::max(),
                       0x1p-149, std::nanf("")};
  for (std::uint16_t bits = 0; bits < infinity; ++bits) {
    const float low = to_float(Element{bits});
    x.push_back(low);
    if (bits + 1 == infinity) break;
    const float high = to_float(Element{static_cast<std::uint16_t>(bits + 1)});
    const auto middle = static_cast<float>((double{low} + double{high}) / 2);
    x.insert(x.end(), {std::nextafter(middle, low), middle, std::nextafter(middle, high)});
  }
  for (std::size_t i = 0, count = x.size(); i < count; ++i) x.push_back(-x[i]);

  const std::vector<std::uint32_t> actual = pack_on_gpu<Element>(x);
  int wrong = 0;
  const auto compare = [&](float input, std::uint32_t bits) {
    const Element expected = from_float<Element>(input), got{static_cast<std::uint16_t>(bits)};
    const bool same = std::isnan(input) ? std::isnan(to_float(got)) : expected.bits == got.bits;
    if (!same && ++wrong <= 8)
      ADD_FAILURE() << input << ": expected bits " << expected.bits << ", actual " << got.bits;
  };
  for (std::size_t i = 0; i < x.size(); ++i) {
    compare(x[i], actual[i] & 0xFFFFu);
    compare(x[x.size() - 1 - i], actual[i] >> 16);
  }
  EXPECT_EQ(wrong, 0) << "of " << 2 * x.size();
}

TEST_F(PtxMma, PackRoundsAsTheHostBf16) { check_pack<bf16>(0x7F80); }
TEST_F(PtxMma, PackRoundsAsTheHostF16) { check_pack<f16>(0x7C00); }

struct Exp2 {
  using Shared = Nothing;
  const float* x;
  float* y;
  int count;

  __device__ void operator()(Shared&) const {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < count) y[i] = ptx::exp2(x[i]);
  }
};

std::vector<float> exp2_on_gpu(const std::vector<float>& x) {
  const DeviceArray<float> x_device(x), y(x.size());
  const int count = static_cast<int>(x.size());
  launch(Exp2{x_device.data(), y.data(), count}, 256, (count + 255) / 256);
  return y.values();
}

TEST_F(PtxMma, Exp2IsWithinItsErrorBound) {
  std::vector<float> x;
  for (int i = -125; i <= 127; ++i) x.push_back(static_cast<float>(i));
  Random random(5);
  for (int i = 0; i < 500'000; ++i) {
    x.push_back(static_cast<float>(-125.9 + 253.8 * random.uniform()));  // where 2^x is normal
    x.push_back(static_cast<float>(-1 + 2 * random.uniform()));
  }
  const std::vector<float> y = exp2_on_gpu(x);
  double worst = 0;
  float at = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double expected = std::exp2(double{x[i]});
    const double error = std::isnan(y[i]) ? INFINITY : std::abs(double{y[i]} - expected) / expected;
    if (error > worst) {
      worst = error;
      at = x[i];
    }
  }
  EXPECT_LE(worst, 0x1p-22) << "at " << at;
}

TEST_F(PtxMma, Exp2OfSpecialValues) {
  const std::vector<float> x{-kInf, -1000.f, -150.f, -126.5f, -0.f, 0.f, 1e-40f, kInf};
  const std::vector<float> expected{0.f, 0.f, 0.f, 0.f, 1.f, 1.f, 1.f, kInf};
  const std::vector<float> actual = exp2_on_gpu(x);
  for (std::size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(expected[i], actual[i]) << "2^" << x[i];
    EXPECT_FALSE(std::signbit(actual[i])) << "2^" << x[i];
  }
  const float of_nan = exp2_on_gpu({std::nanf("")})[0];
  EXPECT_TRUE(std::isnan(of_nan)) << of_nan;
}

}  // namespace
}  // namespace heed::test
