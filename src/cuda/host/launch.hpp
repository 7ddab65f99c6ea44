// The only place where a kernel starts.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "heed/status.hpp"

namespace heed::cuda {

inline Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return {Code::device, std::string("CUDA: ") + what + ": " + cudaGetErrorString(error)};
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  int smem_bytes = 0;
};

// A grid without blocks is no error: there is nothing to do.
template <class... Params>
Status launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream,
              const std::type_identity_t<Params>&... params) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return {};
  if (shape.smem_bytes > 48 * 1024)  // more than a kernel gets unasked
    if (Status s = cuda_status(
            cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, shape.smem_bytes),
            "shared memory");
        !s.ok())
      return s;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = static_cast<size_t>(shape.smem_bytes);
  config.stream = stream;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, params...), "launch");
}

}  // namespace heed::cuda
