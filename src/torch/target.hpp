// Where an operator computes: PyTorch's threads, or its current stream of a GPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <optional>

#include "heed/plan.hpp"
#include "tensors.hpp"

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

// Where a tensor's device computes; a GPU is the current one as long as this lives.
struct Target {
  Device device;
  Queue queue;
  std::optional<DeviceGuard> guard{};
};

void aim_at(Target& target, const Tensor& tensor);

}  // namespace heed::operators
