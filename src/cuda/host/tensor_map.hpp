// What the copy engine of sm_90 must know of a tensor.
#pragma once

#include <cuda.h>

#include "heed/problem.hpp"
#include "heed/status.hpp"

namespace heed::cuda {

// Boxes of 64 channels by `rows` rows of one head of one entry (or page), written with the 128-byte
// swizzle. The tensor must be is_bulk().
Status tensor_map(CUtensorMap& map, const ConstTensorView& tensor, int rows);

}  // namespace heed::cuda
