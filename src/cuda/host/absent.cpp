// Stands for the GPU part in a build without it.
#include "heed/plan.hpp"

namespace heed {

Result<Device> Device::cuda(int) {
  return Status(Code::unsupported,
                "this build of heed has no CUDA kernels: build it with -DHEED_CUDA=ON");
}

}  // namespace heed
