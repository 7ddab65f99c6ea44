// NEON with the bf16 dot product (FEAT_BF16). Its two instructions are written out, because clang
// before 16 has no target region that knows them.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#define HEED_ISA neon_bf16
#include "cpu/isa/neon.hpp"

namespace heed::cpu::inline HEED_ISA {

struct NeonBf16 : Neon {
  static constexpr Arch kArch = Arch::neon_bf16;
  static constexpr bool kHasBf16Dot = true;
  using Pairs = uint32x4_t;  // 4 words of two bf16: the even one in the low half

  static Pairs load_pairs(const std::uint32_t* p) { return vld1q_u32(p); }
  // acc + (a.lo * b.lo + a.hi * b.hi), both sums rounded to odd; denormals count as zero.
  static Vec dot(Vec acc, std::uint32_t a, Pairs b) {
    asm(".arch_extension bf16\n\tbfdot %0.4s, %1.8h, %2.2h[0]" : "+w"(acc) : "w"(b), "w"(a));
    return acc;
  }
  static Vec dot(Vec acc, Pairs a, Pairs b) {
    asm(".arch_extension bf16\n\tbfdot %0.4s, %1.8h, %2.8h" : "+w"(acc) : "w"(b), "w"(a));
    return acc;
  }
  using Neon::store;
  static void store(bf16* p, Vec x) { vst1_u16(reinterpret_cast<std::uint16_t*>(p), rounded(x)); }
  // Words that pair the lanes of two rows: even in the low half.
  static void store_zipped(std::uint32_t* p, Vec even, Vec odd) {
    store_zipped(p, rounded(even), rounded(odd));
  }
  static void store_zipped(std::uint32_t* p, const bf16* even, const bf16* odd) {
    store_zipped(p, vld1_u16(reinterpret_cast<const std::uint16_t*>(even)),
                 vld1_u16(reinterpret_cast<const std::uint16_t*>(odd)));
  }

 private:
  static uint16x4_t rounded(Vec x) {
    uint16x4_t half;
    asm(".arch_extension bf16\n\tbfcvtn %0.4h, %1.4s" : "=w"(half) : "w"(x));
    return half;
  }
  static void store_zipped(std::uint32_t* p, uint16x4_t even, uint16x4_t odd) {
    vst1q_u32(p, vorrq_u32(vmovl_u16(even), vshll_n_u16(odd, 16)));
  }
};

}  // namespace heed::cpu::inline HEED_ISA
