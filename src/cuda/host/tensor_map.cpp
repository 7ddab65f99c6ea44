// What the copy engine of sm_90 must know of a tensor.
#include "cuda/host/tensor_map.hpp"

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

namespace heed::cuda {
namespace {

// A function of the driver, which the library is not linked with.
auto* find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  constexpr unsigned kVersion = 12000;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kVersion,
                                       cudaEnableDefault, &found) != cudaSuccess)
    function = nullptr;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

}  // namespace

Status tensor_map(CUtensorMap& map, const ConstTensorView& tensor, int rows) {
  if (tensor.numel() == 0) return {};  // no box of it is ever copied
  static const auto encode = find_encoder();
  if (encode == nullptr)
    return {Code::device,
            "CUDA: the driver has no cuTensorMapEncodeTiled: install one for CUDA 13"};
  // An axis of length 1 may have any stride; the engine wants a multiple of 16 bytes.
  const auto bytes = [](std::int64_t length, std::int64_t stride) {
    return length == 1 ? cuuint64_t{16} : static_cast<cuuint64_t>(2 * stride);
  };
  const cuuint64_t sizes[4] = {
      static_cast<cuuint64_t>(tensor.head_dim()), static_cast<cuuint64_t>(tensor.seqlen()),
      static_cast<cuuint64_t>(tensor.heads()), static_cast<cuuint64_t>(tensor.batch())};
  const cuuint64_t strides[3] = {bytes(tensor.seqlen(), tensor.seqlen_stride()),
                                 bytes(tensor.heads(), tensor.head_stride()),
                                 bytes(tensor.batch(), tensor.batch_stride())};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map,
             tensor.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             4, const_cast<void*>(tensor.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return {Code::device, "CUDA: tensor map: error " + std::to_string(static_cast<int>(result))};
}

}  // namespace heed::cuda
