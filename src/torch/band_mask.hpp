// The operator heed::band_mask.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace heed::operators {

// int32 [batch, 1, seqlen_q + bit_rows, 2]: what `intervals` of heed::forward takes, from a padding
// mask and the position of the queries; core/band_mask.hpp says what is in it.
inline constexpr const char* kBandMaskSchema =
    "band_mask(Tensor? padding, Tensor? positions, Tensor? chunk_start, SymInt batch, "
    "SymInt seqlen_q, SymInt q_offset, SymInt slots, SymInt kv_offset, int left, int right, "
    "int chunk, bool rows_are_slots, Device device) -> Tensor";
void band_mask(StableIValue* stack, std::uint64_t num_arguments, std::uint64_t num_results);

}  // namespace heed::operators
