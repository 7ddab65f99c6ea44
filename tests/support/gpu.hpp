// Runs a plan for a GPU on a copy of the problem in device memory.
#pragma once

#include "heed/plan.hpp"
#include "support/problem.hpp"

namespace heed::test {

// Results come back into the problem's own tensors; damage to anything else is Code::device.
Status run_on_gpu(const Plan& plan, Problem& problem);

}  // namespace heed::test
