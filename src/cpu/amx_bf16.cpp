// The CPU kernels on AMX.
#include "cpu/baseline.hpp"
//
#include "cpu/isa/amx_bf16.hpp"
//
#include "cpu/rows.hpp"
//
#include "cpu/isa/end.hpp"

namespace heed {

std::span<const KernelRow> cpu_amx_bf16_rows() { return cpu::rows<cpu::AmxBf16, bf16>(); }

}  // namespace heed
