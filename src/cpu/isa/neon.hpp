// NEON, which every aarch64 CPU has: no target region is opened.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "core/half.hpp"
#include "heed/plan.hpp"

#ifndef HEED_ISA
#define HEED_ISA neon
#endif
#define HEED_BASELINE

namespace heed::cpu::inline HEED_ISA {

struct Neon {
  static constexpr Arch kArch = Arch::neon;
  static constexpr int kLanes = 4;
  // 12 x 2 accumulators + 2 + 1 of 32 registers. 24 sums in flight hide a latency of 4 to 6 cycles
  // on cores that start 4 multiply-adds a cycle; not measured.
  static constexpr int kMicroRows = 12;
  static constexpr int kProductStep = 1;
  static constexpr bool kHasBf16Dot = false;
  using Vec = float32x4_t;

  static Vec load(const float* p) { return vld1q_f32(p); }
  static Vec load(const bf16* p) {
    const uint16x4_t half = vld1_u16(reinterpret_cast<const std::uint16_t*>(p));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  }
  static Vec load(const f16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))));
  }
  static void store(float* p, Vec x) { vst1q_f32(p, x); }
  static void store(bf16* p, Vec x) {
    const uint32x4_t u = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    const uint32x4_t quiet_nan = vorrq_u32(u, vdupq_n_u32(0x400000));
    const uint32x4_t number = vceqq_f32(x, x);
    vst1_u16(reinterpret_cast<std::uint16_t*>(p),
             vshrn_n_u32(vbslq_u32(number, rounded, quiet_nan), 16));
  }
  static void store(f16* p, Vec x) {
    vst1_u16(reinterpret_cast<std::uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x)));
  }
  static Vec broadcast(float x) { return vdupq_n_f32(x); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  static Vec accumulate(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }
  // Returns b where a or b is NaN.
  static Vec max(Vec a, Vec b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static float reduce_add(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static Vec round(Vec x) { return vrndnq_f32(x); }
  static Vec scale_by_power(Vec p, Vec n, Vec x) {
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    const Vec power = vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
    const uint32x4_t zero = vcltq_f32(x, vdupq_n_f32(-125.f));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(vmulq_f32(p, power)), zero));
  }
};

}  // namespace heed::cpu::inline HEED_ISA
