// PyTorch's current stream and device, where PyTorch has CUDA.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <optional>

#include "heed/plan.hpp"

namespace heed::operators {

// Makes a GPU the current one for as long as this lives; one that already is costs nothing.
class DeviceGuard {
 public:
  explicit DeviceGuard(std::int32_t device);
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard();

 private:
  DeviceGuardHandle guard_ = nullptr;
};

// The stream that PyTorch computes on; not synchronised with.
CUstream_st* current_stream(std::int32_t device);

}  // namespace heed::operators
