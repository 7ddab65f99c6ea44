// What this machine can do at most, measured: the yardstick of `heed bench`.
#pragma once

#include "heed/plan.hpp"

namespace heed::tool {

struct Peaks {
  double fma_gflops = 0;   // fp32 multiply-add on registers, the widest set of the device
  double bf16_gflops = 0;  // bf16 dot products with fp32 sums; 0: the device has none
  double read_gbs = 0;     // streaming read of memory that no cache holds
};
// On all threads of heed's pool.
Peaks measure_peaks(Arch arch);

}  // namespace heed::tool
