// AVX-512 with the bf16 dot product. Everything after this header is compiled for it, up to
// isa/end.hpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

#ifndef HEED_ISA
#define HEED_ISA avx512_bf16
#endif
#include "cpu/isa/avx512.hpp"

#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                     \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx512bf16")
#endif

namespace heed::cpu::inline HEED_ISA {

struct Avx512Bf16 : Avx512 {
  static constexpr Arch kArch = Arch::avx512_bf16;
  static constexpr bool kHasBf16Dot = true;
  using Pairs = __m512i;  // 16 words of two bf16: the even one in the low half

  static Pairs load_pairs(const std::uint32_t* p) { return _mm512_loadu_si512(p); }
  // acc + a.lo * b.lo + a.hi * b.hi; denormals count as zero.
  static Vec dot(Vec acc, std::uint32_t a, Pairs b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
  static Vec dot(Vec acc, Pairs a, Pairs b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
  }
  using Avx512::store;
  static void store(bf16* p, Vec x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static void store(bf16* p, Vec low, Vec high) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  // Words that pair the lanes of two rows: even in the low half.
  static Vec zipped(Vec even, Vec odd) {
    alignas(64) static constexpr std::uint16_t kPaired[2 * kLanes] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kPaired),
                                                        (__m512i)_mm512_cvtne2ps_pbh(odd, even)));
  }
  static void store_zipped(std::uint32_t* p, Vec even, Vec odd) {
    _mm512_storeu_ps(p, zipped(even, odd));
  }
  static void store_zipped(std::uint32_t* p, const bf16* even, const bf16* odd) {
    const __m512i lo = _mm512_cvtepu16_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
    const __m512i hi =
        _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd)));
    _mm512_storeu_si512(p, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
  }
};

}  // namespace heed::cpu::inline HEED_ISA
