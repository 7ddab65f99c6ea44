// AVX2 with FMA and F16C. Everything after this header is compiled for it, up to isa/end.hpp.
#pragma once

#include <immintrin.h>

#include "core/half.hpp"
#include "heed/plan.hpp"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define HEED_ISA avx2
// Planning is for any device, on any machine.
#define HEED_BASELINE __attribute__((target("no-avx")))

namespace heed::cpu::inline HEED_ISA {

struct Avx2 {
  static constexpr Arch kArch = Arch::avx2;
  static constexpr int kLanes = 8;
  static constexpr int kMicroRows = 6;  // 6 x 2 accumulators + 2 + 1 of 16 registers
  // Words of depth that a product multiplies between two tests of its loop. Where another program
  // has the core's other thread, half of the instructions that the core decodes are left to this
  // one, and its multiply-adds wait behind counting: 1.04 to 1.18 times as fast (EPYC of family 25
  // model 1). AVX-512 gains nothing (Xeon of family 6 model 207).
  static constexpr int kProductStep = 4;
  static constexpr bool kHasBf16Dot = false;
  using Vec = __m256;

  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static Vec load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static Vec load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
  static void store(bf16* p, Vec x) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, x);
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<bf16>(lanes[i]);
  }
  static void store(f16* p, Vec x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // Keeps x in a register. gcc would read it from memory for each use, and a kernel with more loads
  // than multiply-adds waits for its loads.
  static void keep(Vec& x) { asm("" : "+x"(x)); }
  static Vec broadcast(float x) { return _mm256_set1_ps(x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // sum + a * b where the sum is. gcc moves sums from register to register in a loop of several
  // steps, until two of 12 are in memory.
  static Vec accumulate(Vec sum, Vec a, Vec b) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
  }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static float reduce_add(Vec x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  static Vec round(Vec x) {
    return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Vec scale_by_power(Vec p, Vec n, Vec x) {
    const __m256i exponent =
        _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    const Vec power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    const Vec zero = _mm256_cmp_ps(x, _mm256_set1_ps(-125.f), _CMP_LT_OQ);
    return _mm256_andnot_ps(zero, _mm256_mul_ps(p, power));
  }
};

}  // namespace heed::cpu::inline HEED_ISA
