// Tensor core instructions of sm_90: products of a warpgroup, asynchronous.
//
// d[64 x kN] += a[64 x 16] b[16 x kN]. Warp w of the warpgroup holds rows 16 w + [0, 16) of d, in
// the order of mma.sync's accumulators: d[4 j + i] is element i of columns 8 j + [0, 8).
#pragma once

#include <cstdint>

#include "core/half.hpp"

namespace heed::ptx {

// Registers that products read or add to may be touched before the fence and after the wait.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// ss: a and b in shared memory, given by descriptors; rs: a in registers, as mma.sync's left
// operand. `accumulate` = 0: d is overwritten. kTransposed, kRight: b has n contiguous, else k;
// kLeft: a has m contiguous, else k.
template <class Element, int kN>
struct Wgmma;

// The operands' numbers in the assembly depend on how many registers d takes, so every shape needs
// a text of its own.
#define HEED_D8(i)                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define HEED_D16 HEED_D8(0), HEED_D8(8)
#define HEED_D32 HEED_D16, HEED_D8(16), HEED_D8(24)
#define HEED_D40 HEED_D32, HEED_D8(32)
#define HEED_D48 HEED_D40, HEED_D8(40)
#define HEED_D64 HEED_D48, HEED_D8(48), HEED_D8(56)
#define HEED_D96 HEED_D64, HEED_D8(64), HEED_D8(72), HEED_D8(80), HEED_D8(88)
#define HEED_D128 HEED_D96, HEED_D8(96), HEED_D8(104), HEED_D8(112), HEED_D8(120)
#define HEED_TEXT16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define HEED_TEXT32                                                        \
  HEED_TEXT16                                                              \
  ", "                                                                     \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
  "%30, %31"
#define HEED_TEXT40 \
  HEED_TEXT32       \
  ", "              \
  "%32, %33, %34, %35, %36, %37, %38, %39"
#define HEED_TEXT48 \
  HEED_TEXT40       \
  ", "              \
  "%40, %41, %42, %43, %44, %45, %46, %47"
#define HEED_TEXT64                                                        \
  HEED_TEXT48                                                              \
  ", "                                                                     \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63"
#define HEED_TEXT96                                                        \
  HEED_TEXT64                                                              \
  ", "                                                                     \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
  "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, " \
  "%92, %93, %94, %95"
#define HEED_TEXT128                                                                     \
  HEED_TEXT96                                                                            \
  ", "                                                                                   \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"

#define HEED_WGMMA(Type, type, kN, kRegs, n0, n1, n2, n3, n4, n5, n6)                              \
  template <>                                                                                      \
  struct Wgmma<Type, kN> {                                                                         \
    template <int kLeft, int kRight>                                                               \
    static __device__ __forceinline__ void ss(float (&d)[kRegs], std::uint64_t a, std::uint64_t b, \
                                              int accumulate) {                                    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n2                                        \
                   ", 0;\n"                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type                \
                   " {" HEED_TEXT##kRegs "}, %" #n0 ", %" #n1 ", p, 1, 1, %" #n3 ", %" #n4 ";\n}"  \
                   : HEED_D##kRegs                                                                 \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kLeft), "n"(kRight));                    \
    }                                                                                              \
    template <int kTransposed>                                                                     \
    static __device__ __forceinline__ void rs(float (&d)[kRegs], const std::uint32_t (&a)[4],      \
                                              std::uint64_t b, int accumulate) {                   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #n5                                        \
                   ", 0;\n"                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." type "." type                \
                   " {" HEED_TEXT##kRegs "}, {%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, %" #n4      \
                                         ", p, 1, 1, %" #n6 ";\n}"                                 \
                   : HEED_D##kRegs                                                                 \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),          \
                     "n"(kTransposed));                                                            \
    }                                                                                              \
  };
#define HEED_WGMMAS(kN, ...)                \
  HEED_WGMMA(bf16, "bf16", kN, __VA_ARGS__) \
  HEED_WGMMA(f16, "f16", kN, __VA_ARGS__)
HEED_WGMMAS(32, 16, 16, 17, 18, 19, 20, 21, 22)
HEED_WGMMAS(64, 32, 32, 33, 34, 35, 36, 37, 38)
HEED_WGMMAS(80, 40, 40, 41, 42, 43, 44, 45, 46)
HEED_WGMMAS(96, 48, 48, 49, 50, 51, 52, 53, 54)
HEED_WGMMAS(128, 64, 64, 65, 66, 67, 68, 69, 70)
HEED_WGMMAS(192, 96, 96, 97, 98, 99, 100, 101, 102)
HEED_WGMMAS(256, 128, 128, 129, 130, 131, 132, 133, 134)

#undef HEED_WGMMAS
#undef HEED_WGMMA
#undef HEED_D8
#undef HEED_D16
#undef HEED_TEXT16
#undef HEED_D32
#undef HEED_TEXT32
#undef HEED_D40
#undef HEED_TEXT40
#undef HEED_D48
#undef HEED_TEXT48
#undef HEED_D64
#undef HEED_TEXT64
#undef HEED_D96
#undef HEED_TEXT96
#undef HEED_D128
#undef HEED_TEXT128

}  // namespace heed::ptx
