// The CPU kernels on the baseline instruction set.
#include "cpu/isa/scalar.hpp"
#include "cpu/rows.hpp"

namespace heed {

std::span<const KernelRow> cpu_scalar_rows() { return cpu::rows<cpu::Scalar, float, bf16, f16>(); }

}  // namespace heed
