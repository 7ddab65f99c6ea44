// What the files beside this one compile, each for its instruction set.
#pragma once

#include "cpu/rowwise.hpp"

namespace heed::test {

// values[i] = 2^values[i]; count is a multiple of 16.
template <class Isa>
void exp2_of(float* values, int count) {
  for (int i = 0; i < count; i += Isa::kLanes)
    Isa::store(values + i, cpu::exp2<Isa>(Isa::load(values + i)));
}

}  // namespace heed::test
