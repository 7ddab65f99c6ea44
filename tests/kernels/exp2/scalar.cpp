#include "cpu/isa/scalar.hpp"
#include "kernels/exp2/text.hpp"

namespace heed::test {

void exp2_scalar(float* values, int count) { exp2_of<cpu::Scalar>(values, count); }

}  // namespace heed::test
