// The CPU kernels on AVX-512 with bf16 dot products.
#include "cpu/baseline.hpp"
//
#include "cpu/isa/avx512_bf16.hpp"
//
#include "cpu/rows.hpp"
//
#include "cpu/isa/end.hpp"

namespace heed {

std::span<const KernelRow> cpu_avx512_bf16_rows() {
  return cpu::rows<cpu::Avx512Bf16, bf16>();
}

}  // namespace heed
