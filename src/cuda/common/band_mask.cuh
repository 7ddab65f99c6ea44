// A band and a padding mask as key intervals and validity bits.
#pragma once

#include "core/band_mask.hpp"
#include "heed/status.hpp"

struct CUstream_st;

namespace heed::cuda {

Status write_band_mask(const BandMask& mask, CUstream_st* stream);

}  // namespace heed::cuda
