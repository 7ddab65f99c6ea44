#include "cpu/baseline.hpp"
//
#include "cpu/isa/avx2.hpp"
//
#include "kernels/exp2/text.hpp"
//
#include "cpu/isa/end.hpp"

namespace heed::test {

void exp2_avx2(float* values, int count) { exp2_of<cpu::Avx2>(values, count); }

}  // namespace heed::test
