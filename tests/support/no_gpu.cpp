// For builds without CUDA, which plan for no GPU.
#include "support/gpu.hpp"

namespace heed::test {

Status run_on_gpu(const Plan&, Problem&) { return Device::cuda().status(); }

}  // namespace heed::test
