#include "peaks.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace heed::tool {
namespace {

constexpr int kRounds = 5;
constexpr std::int64_t kSteps = 2'000'000;
constexpr int kChains = 24;      // independent sums: more than latency times instructions per cycle
constexpr int kAvx2Chains = 12;  // which with two constants fit 16 registers

// Best time of a round in seconds, body(worker) on every thread of the pool.
template <class Body>
double best_seconds(int workers, const Body& body) {
  double best = 1e30;
  for (int round = 0; round < kRounds; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    Executor::pool().run(
        workers, [](void* context, int worker) { (*static_cast<const Body*>(context))(worker); },
        const_cast<Body*>(&body));
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    best = std::min(best, took.count());
  }
  return best;
}

// Each returns the floating-point operations of one call; the sum keeps the loop alive.
using Loop = double (*)(float* sink);

double fma_scalar(float* sink) {
  float sums[kChains] = {};
  for (std::int64_t step = 0; step < kSteps; ++step)
    for (float& sum : sums) sum = sum * 0.5f + 1.f;
  for (const float sum : sums) *sink += sum;
  return 2.0 * kChains * static_cast<double>(kSteps);
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) double fma_avx2(float* sink) {
  const __m256 half = _mm256_set1_ps(0.5f), one = _mm256_set1_ps(1.f);
  __m256 sums[kAvx2Chains];
  for (__m256& sum : sums) sum = one;
  for (std::int64_t step = 0; step < kSteps; ++step)
#pragma GCC unroll 12
    for (int i = 0; i < kAvx2Chains; ++i) sums[i] = _mm256_fmadd_ps(sums[i], half, one);
  for (const __m256& sum : sums) *sink += _mm256_cvtss_f32(sum);
  return 2.0 * 8 * kAvx2Chains * static_cast<double>(kSteps);
}

__attribute__((target("avx512f"))) double fma_avx512(float* sink) {
  const __m512 half = _mm512_set1_ps(0.5f), one = _mm512_set1_ps(1.f);
  __m512 sums[kChains];
  for (__m512& sum : sums) sum = one;
  for (std::int64_t step = 0; step < kSteps; ++step)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_fmadd_ps(sums[i], half, one);
  for (const __m512& sum : sums) *sink += _mm512_cvtss_f32(sum);
  return 2.0 * 16 * kChains * static_cast<double>(kSteps);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"))) double bf16_avx512(float* sink) {
  const __m512bh half = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
  __m512 sums[kChains];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (std::int64_t step = 0; step < kSteps; ++step)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], half, half);
  for (const __m512& sum : sums) *sink += _mm512_cvtss_f32(sum);
  return 2.0 * 32 * kChains * static_cast<double>(kSteps);
}

// Written out, because the intrinsics take no tile number that is not a literal.
__attribute__((target("amx-tile,amx-bf16"))) double bf16_amx(float* sink) {
  struct alignas(64) {
    std::uint8_t palette = 1, rest[15] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } tiles;
  // Of mixed bits: zeros are up to a quarter faster, which no attention is.
  alignas(64) std::uint32_t operands[16 * 16];
  for (std::uint32_t i = 0; i < 256; ++i)
    operands[i] = (i * 2654435761U & 0x80FF80FFU) | 0x3F003F00U;
  alignas(64) float sums[16 * 16];
  asm volatile("ldtilecfg %0" : : "m"(tiles));
  asm volatile(
      "tileloadd (%0,%1,1), %%tmm4\n\ttileloadd (%0,%1,1), %%tmm5\n\t"
      "tileloadd (%0,%1,1), %%tmm6\n\ttileloadd (%0,%1,1), %%tmm7"
      :
      : "r"(operands), "r"(std::int64_t{64})
      : "memory");
  constexpr std::int64_t kTurns = kSteps / 4;
  for (std::int64_t turn = 0; turn < kTurns; ++turn)
    asm volatile(
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3"
        :
        :);
  asm volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(sums), "r"(std::int64_t{64}) : "memory");
  asm volatile("tilerelease");
  *sink += sums[0];
  return 2.0 * 16 * 16 * 32 * 4 * static_cast<double>(kTurns);
}
#elif defined(__aarch64__)
constexpr int kNeonChains = 24;  // four instructions a clock, each of up to 6 clocks

double fma_neon(float* sink) {
  const float32x4_t half = vdupq_n_f32(0.5f);
  float32x4_t sums[kNeonChains];
  for (float32x4_t& sum : sums) sum = vdupq_n_f32(1.f);
  for (std::int64_t step = 0; step < kSteps; ++step)
#pragma GCC unroll 24
    for (int i = 0; i < kNeonChains; ++i) sums[i] = vfmaq_f32(half, sums[i], half);
  for (const float32x4_t& sum : sums) *sink += vgetq_lane_f32(sum, 0);
  return 2.0 * 4 * kNeonChains * static_cast<double>(kSteps);
}

double bf16_neon(float* sink) {
  const uint32x4_t half = vdupq_n_u32(0x3F003F00);  // two bf16
  float32x4_t sums[kNeonChains];
  for (float32x4_t& sum : sums) sum = vdupq_n_f32(0.f);
  for (std::int64_t step = 0; step < kSteps; ++step)
#pragma GCC unroll 24
    for (int i = 0; i < kNeonChains; ++i)
      asm(".arch_extension bf16\n\tbfdot %0.4s, %1.8h, %1.8h" : "+w"(sums[i]) : "w"(half));
  for (const float32x4_t& sum : sums) *sink += vgetq_lane_f32(sum, 0);
  return 2.0 * 8 * kNeonChains * static_cast<double>(kSteps);
}
#endif

Loop fma_loop(Arch arch) {
#if defined(__x86_64__)
  if (Arch::avx512 <= arch && arch <= Arch::amx_bf16) return fma_avx512;
  if (arch == Arch::avx2) return fma_avx2;
#elif defined(__aarch64__)
  if (arch == Arch::neon || arch == Arch::neon_bf16) return fma_neon;
#endif
  (void)arch;
  return fma_scalar;
}

Loop bf16_loop(Arch arch) {
#if defined(__x86_64__)
  if (arch == Arch::amx_bf16) return bf16_amx;
  if (arch == Arch::avx512_bf16) return bf16_avx512;
#elif defined(__aarch64__)
  if (arch == Arch::neon_bf16) return bf16_neon;
#endif
  (void)arch;
  return nullptr;
}

double gflops(Loop loop, int workers) {
  if (loop == nullptr) return 0;
  std::vector<float> sinks(static_cast<std::size_t>(workers) * 64);
  std::vector<double> flops(sinks.size());
  const double seconds = best_seconds(workers, [&](int worker) {
    const std::size_t at = static_cast<std::size_t>(worker) * 64;
    flops[at] = loop(&sinks[at]);
  });
  double total = 0;
  for (const double x : flops) total += x;
  return total / seconds * 1e-9;
}

// Asks for memory kAhead words before they are read: without it some CPUs read a quarter less, and
// kernels that ask would seem to be faster than memory.
template <std::size_t kAhead>
double read_gbs(int workers) {
  constexpr std::size_t kWords = std::size_t{256} << 17;  // 256 MiB of 8 bytes
  const std::vector<std::uint64_t> memory(kWords, 1);
  std::vector<std::uint64_t> sinks(static_cast<std::size_t>(workers) * 8);
  const auto count = static_cast<std::size_t>(workers);
  const double seconds = best_seconds(workers, [&](int worker) {
    const auto w = static_cast<std::size_t>(worker);
    std::uint64_t sums[8] = {};
    for (std::size_t i = kWords * w / count / 8 * 8; i + 8 <= kWords * (w + 1) / count; i += 8) {
      if constexpr (kAhead > 0) __builtin_prefetch(&memory[std::min(i + kAhead, kWords - 1)], 0, 2);
      for (std::size_t lane = 0; lane < 8; ++lane) sums[lane] += memory[i + lane];
    }
    for (const std::uint64_t sum : sums) sinks[w * 8] += sum;
  });
  return static_cast<double>(kWords) * 8 / seconds * 1e-9;
}

}  // namespace

Peaks measure_peaks(Arch arch) {
  const int workers = Executor::pool().concurrency();
  return {.fma_gflops = gflops(fma_loop(arch), workers),
          .bf16_gflops = gflops(bf16_loop(arch), workers),
          .read_gbs = std::max(read_gbs<0>(workers), read_gbs<512>(workers))};
}

}  // namespace heed::tool
