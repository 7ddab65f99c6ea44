// The CPU kernels on NEON.
#include "cpu/isa/neon.hpp"
#include "cpu/rows.hpp"

namespace heed {

std::span<const KernelRow> cpu_neon_rows() { return cpu::rows<cpu::Neon, float, bf16, f16>(); }

}  // namespace heed
