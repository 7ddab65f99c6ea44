// Stands for the GPU part in a build without it.
#include "cuda/common/band_mask.cuh"
#include "heed/plan.hpp"

namespace heed {
namespace {

Status no_cuda() {
  return {Code::unsupported,
          "this build of heed has no CUDA kernels: build it with -DHEED_CUDA=ON"};
}

}  // namespace

Result<Device> Device::cuda(int) { return no_cuda(); }

namespace cuda {

Status write_band_mask(const BandMask&, CUstream_st*) { return no_cuda(); }

}  // namespace cuda

}  // namespace heed
