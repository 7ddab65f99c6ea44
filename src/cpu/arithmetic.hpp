// The arithmetic that kernels are written for: round to nearest, subnormal numbers kept, no traps.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif

namespace heed::cpu {

// Switches the calling thread to it for a scope, whatever the thread was set to. Costs a read of
// the control register where it was not set to anything else.
class StandardArithmetic {
 public:
  StandardArithmetic(const StandardArithmetic&) = delete;
  StandardArithmetic& operator=(const StandardArithmetic&) = delete;

#if defined(__x86_64__)
  StandardArithmetic() : caller_(_mm_getcsr()) {
    if (changed()) _mm_setcsr(kStandard);
  }
  ~StandardArithmetic() {
    if (changed()) _mm_setcsr(caller_);
  }

 private:
  // Every bit of MXCSR above the six flags that say what happened: all exceptions masked.
  static constexpr unsigned kStandard = 0x1F80, kControl = 0xFFC0;
  bool changed() const { return (caller_ & kControl) != kStandard; }

  const unsigned caller_;
#elif defined(__aarch64__)
  StandardArithmetic() {
    asm volatile("mrs %0, fpcr" : "=r"(caller_) : : "memory");
    if (caller_ != 0) set(0);
  }
  ~StandardArithmetic() {
    if (caller_ != 0) set(caller_);
  }

 private:
  static void set(std::uint64_t fpcr) { asm volatile("msr fpcr, %0" : : "r"(fpcr) : "memory"); }

  std::uint64_t caller_;
#else
  StandardArithmetic() {
    std::fegetenv(&caller_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~StandardArithmetic() { std::fesetenv(&caller_); }

 private:
  std::fenv_t caller_;
#endif
};

}  // namespace heed::cpu
