// The CPU kernels on NEON with bf16 dot products.
#include "cpu/isa/neon_bf16.hpp"
#include "cpu/rows.hpp"

namespace heed {

std::span<const KernelRow> cpu_neon_bf16_rows() { return cpu::rows<cpu::NeonBf16, bf16>(); }

}  // namespace heed
