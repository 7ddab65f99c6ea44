// What this machine's CPU can run.
#pragma once

#include "heed/plan.hpp"

namespace heed::cpu {

// The widest instruction set that the CPU and its operating system offer.
Arch best_arch();

}  // namespace heed::cpu
