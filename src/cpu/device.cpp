// Which instruction set this CPU and its operating system offer.
#include "cpu/device.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <cstring>
#include <string>

#include "registry.hpp"

namespace heed {
namespace cpu {
namespace {

#if defined(__x86_64__)
// Linux gives a process the tile registers when it asks, once for all of its threads. It refuses
// where a thread has a signal stack that their 8 KB do not fit on.
bool may_use_tiles() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// __builtin_cpu_supports also asks XGETBV whether the operating system saves the wide registers.
Arch detected_arch() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;  // clang 14 has no name for F16C
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16"))
    return may_use_tiles() ? Arch::amx_bf16 : Arch::avx512_bf16;
  if (avx512) return Arch::avx512;
  if (avx2) return Arch::avx2;
  return Arch::scalar;
#elif defined(__aarch64__)
  return (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0 ? Arch::neon_bf16 : Arch::neon;
#else
  return Arch::scalar;
#endif
}

// Intel's cores issue a bf16 dot product every other cycle and two fp32 FMAs in each: bf16 that is
// widened to fp32 takes 0.57 of the time forward and backward, and no more in decode (measured on a
// Xeon of family 6, model 207).
bool has_slow_dots() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}

}  // namespace

Arch best_arch() {
  static const Arch detected = detected_arch();
  return detected;
}

}  // namespace cpu

Result<Device> Device::cpu() {
  const Arch detected = heed::cpu::best_arch();
  Device device{.arch = detected, .units = Executor::pool().concurrency()};
  if (detected == Arch::avx512_bf16 && cpu::has_slow_dots()) device.arch = Arch::avx512;
  const char* forced = std::getenv("HEED_FORCE_ISA");
  if (forced == nullptr || *forced == '\0') return device;
  std::string names;
  for (int i = 0; i < static_cast<int>(Arch::sm80); ++i) {
    const auto arch = static_cast<Arch>(i);
    names += std::string(i == 0 ? "" : ", ") + name_of(arch);
    if (std::strcmp(forced, name_of(arch)) != 0) continue;
    if (!serves(arch, detected))
      return Status(Code::unsupported, std::string("HEED_FORCE_ISA = ") + forced +
                                           " is not available: this CPU offers up to " +
                                           name_of(detected));
    device.arch = arch;
    return device;
  }
  return Status(Code::invalid,
                std::string("HEED_FORCE_ISA = ") + forced + " must be one of " + names);
}

}  // namespace heed
