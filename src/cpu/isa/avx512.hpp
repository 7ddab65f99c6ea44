// AVX-512 F, BW, DQ, VL. Everything after this header is compiled for it, up to isa/end.hpp.
#pragma once

#include <immintrin.h>

#include "core/half.hpp"
#include "heed/plan.hpp"

#if defined(__clang__)
#pragma clang attribute push(                                                             \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))),                            \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#ifndef HEED_ISA
#define HEED_ISA avx512
#endif
// Planning is for any device, on any machine.
#define HEED_BASELINE __attribute__((target("no-avx")))

namespace heed::cpu::inline HEED_ISA {

struct Avx512 {
  static constexpr Arch kArch = Arch::avx512;
  static constexpr int kLanes = 16;
  static constexpr int kMicroRows = 12;  // 12 x 2 accumulators + 2 + 1 of 32 registers
  static constexpr int kProductStep = 1;
  static constexpr bool kHasBf16Dot = false;
  using Vec = __m512;

  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static Vec load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Vec load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
  static void store(bf16* p, Vec x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  static void store(f16* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // The four words at p, four times.
  static Vec load_repeated(const void* p) {
    return _mm512_broadcast_f32x4(_mm_loadu_ps(static_cast<const float*>(p)));
  }
  static Vec broadcast(float x) { return _mm512_set1_ps(x); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec accumulate(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  static float reduce_add(Vec x) { return _mm512_reduce_add_ps(x); }
  static Vec round(Vec x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Vec scale_by_power(Vec p, Vec n, Vec x) {
    const __mmask16 live = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-125.f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(live, p, n);
  }
};

}  // namespace heed::cpu::inline HEED_ISA
