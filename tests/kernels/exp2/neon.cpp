#include "cpu/isa/neon.hpp"
#include "kernels/exp2/text.hpp"

namespace heed::test {

void exp2_neon(float* values, int count) { exp2_of<cpu::Neon>(values, count); }

}  // namespace heed::test
