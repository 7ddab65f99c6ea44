// The instruction set every CPU has: four-lane vectors that the compiler maps as it can.
#pragma once

#include "core/half.hpp"
#include "heed/plan.hpp"

#define HEED_ISA scalar
#define HEED_BASELINE

namespace heed::cpu::inline HEED_ISA {

struct Scalar {
  static constexpr Arch kArch = Arch::scalar;
  static constexpr int kLanes = 4;
  static constexpr int kMicroRows = 4;  // 4 x 2 accumulators + 2 + 1 of 16 registers
  static constexpr int kProductStep = 1;
  static constexpr bool kHasBf16Dot = false;
  using Vec [[gnu::vector_size(16)]] = float;
  using IntVec [[gnu::vector_size(16)]] = int;

  template <class Element>
  static Vec load(const Element* p) {
    return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  template <class Element>
  static void store(Element* p, Vec x) {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<Element>(x[i]);
  }
  static Vec broadcast(float x) { return Vec{x, x, x, x}; }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec accumulate(Vec sum, Vec a, Vec b) { return fma(a, b, sum); }
  // Returns b where a or b is NaN.
  static Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static float reduce_add(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  // To the nearest integer, for |x| < 2^22.
  static Vec round(Vec x) {
    const Vec magic = broadcast(12582912.f);  // 1.5 * 2^23: its ulp is 1
    return (x + magic) - magic;
  }
  // p * 2^n where x >= -125, else 0; n is the rounded x. NaN stays NaN.
  static Vec scale_by_power(Vec p, Vec n, Vec x) {
    const IntVec bits = __builtin_convertvector(max(n, broadcast(-126.f)), IntVec);
    const Vec power = (Vec)((bits + 127) << 23);
    return x < -125.f ? Vec{} : p * power;
  }
};

}  // namespace heed::cpu::inline HEED_ISA
