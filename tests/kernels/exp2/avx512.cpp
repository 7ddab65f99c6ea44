#include "cpu/baseline.hpp"
//
#include "cpu/isa/avx512.hpp"
//
#include "kernels/exp2/text.hpp"
//
#include "cpu/isa/end.hpp"

namespace heed::test {

void exp2_avx512(float* values, int count) { exp2_of<cpu::Avx512>(values, count); }

}  // namespace heed::test
