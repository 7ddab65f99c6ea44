// The CPU kernels on AVX2 and FMA.
#include "cpu/baseline.hpp"
//
#include "cpu/isa/avx2.hpp"
//
#include "cpu/rows.hpp"
//
#include "cpu/isa/end.hpp"

namespace heed {

std::span<const KernelRow> cpu_avx2_rows() {
  return cpu::rows<cpu::Avx2, float, bf16, f16>();
}

}  // namespace heed
