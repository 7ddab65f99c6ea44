// Where an operator computes: PyTorch's threads, or its current stream of a GPU.
#include "target.hpp"

#include <dlfcn.h>

#include "executor.hpp"

namespace heed::operators {
namespace {

// Lives in libtorch_cuda, which a PyTorch without CUDA does not have: linking against it would make
// two wheels of one.
using GetStream = AOTITorchError (*)(std::int32_t device, void** stream);

GetStream find_get_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  if (found == nullptr)
    raise({Code::device, "this PyTorch has no CUDA streams: it was built without CUDA"});
  return reinterpret_cast<GetStream>(found);
}

// The stream that PyTorch computes on; not synchronised with.
CUstream_st* current_stream(std::int32_t device) {
  static const GetStream get_stream = find_get_stream();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream(device, &stream));
  return static_cast<CUstream_st*>(stream);
}

}  // namespace

DeviceGuard::DeviceGuard(std::int32_t device) {
  std::int32_t current = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_device_index(&current));
  if (current != device) TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device, &guard_));
}

DeviceGuard::~DeviceGuard() {
  if (guard_ != nullptr) aoti_torch_delete_device_guard(guard_);
}

void aim_at(Target& target, const Tensor& tensor) {
  if (device_type(tensor) == aoti_torch_device_type_cpu()) {
    static TorchExecutor executor;
    static const Result<Device> cpu = Device::cpu();
    check(cpu.status());
    target.device = *cpu;
    target.device.units = executor.concurrency();
    target.queue = executor;
    return;
  }
  const std::int32_t index = device_index(tensor);
  const Result<Device> gpu = Device::cuda(index);
  check(gpu.status());
  target.device = *gpu;
  target.guard.emplace(index);
  target.queue = current_stream(index);
}

}  // namespace heed::operators
