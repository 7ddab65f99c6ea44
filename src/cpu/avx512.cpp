// The CPU kernels on AVX-512.
#include "cpu/baseline.hpp"
//
#include "cpu/isa/avx512.hpp"
//
#include "cpu/rows.hpp"
//
#include "cpu/isa/end.hpp"

namespace heed {

std::span<const KernelRow> cpu_avx512_rows() {
  return cpu::rows<cpu::Avx512, float, bf16, f16>();
}

}  // namespace heed
