// What the GPUs of this machine are.
#include <cuda_runtime.h>

#include <array>
#include <mutex>
#include <optional>
#include <string>

#include "heed/plan.hpp"

namespace heed {
namespace {

// The driver's own words are of little help where it is missing or too old.
Status no_device(cudaError_t error) {
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver ||
      error == cudaErrorStubLibrary || error == cudaErrorSystemDriverMismatch)
    return {Code::device,
            "no NVIDIA GPU with a driver for CUDA 13 or newer: install one, or compute on the CPU"};
  return {Code::device, std::string("CUDA: ") + cudaGetErrorString(error)};
}

std::optional<Arch> arch_of(int major) {
  if (major < 8) return std::nullopt;
  return major == 8 ? Arch::sm80 : major == 9 ? Arch::sm90 : major < 12 ? Arch::sm100 : Arch::sm120;
}

Result<Device> describe_device(int ordinal) {
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess)
    return no_device(error);
  if (ordinal < 0 || ordinal >= count)
    return Status(Code::invalid, "device = " + std::to_string(ordinal) + " must be below " +
                                     std::to_string(count) + ", the number of GPUs");
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    if (cudaDeviceGetAttribute(&value, which, ordinal) != cudaSuccess) return 0;
    return value;
  };
  const int major = attribute(cudaDevAttrComputeCapabilityMajor);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor);
  const std::optional<Arch> arch = arch_of(major);
  if (!arch)
    return Status(Code::unsupported,
                  "GPU " + std::to_string(ordinal) + " is sm_" +
                      std::to_string(10 * major + minor) +
                      ", heed needs sm_80 (Ampere) or newer: compute on the CPU");
  return Device{.arch = *arch,
                .units = attribute(cudaDevAttrMultiProcessorCount),
                .smem_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

}  // namespace

Result<Device> Device::cuda(int ordinal) {
  constexpr int kKnown = 64;
  static std::array<std::once_flag, kKnown> asked;
  static std::array<std::optional<Result<Device>>, kKnown> known;
  if (ordinal < 0)
    if (const cudaError_t error = cudaGetDevice(&ordinal); error != cudaSuccess)
      return no_device(error);
  if (ordinal >= kKnown) return describe_device(ordinal);
  const auto at = static_cast<std::size_t>(ordinal);
  std::call_once(asked[at], [&] { known[at] = describe_device(ordinal); });
  return *known[at];
}

}  // namespace heed
