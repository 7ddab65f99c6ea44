// The shapes every kernel is tested on: chosen ones, and random ones.
#pragma once

#include <cstdint>
#include <vector>

#include "support/problem.hpp"

namespace heed::test {

// Ragged, tiny and odd sizes, each feature alone, and every input kind.
const std::vector<Shape>& curated_shapes();
// Few query rows against many keys.
const std::vector<Shape>& decode_shapes();
// Several tiles of the GPU kernels along both axes, for each of their head_dims.
const std::vector<Shape>& larger_shapes();
// Any legal combination of features whose reference run costs at most about `pairs` query-key
// pairs.
Shape random_shape(std::uint64_t seed, std::int64_t pairs = 6000);

}  // namespace heed::test
