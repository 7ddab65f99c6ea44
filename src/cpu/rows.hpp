// The rows of one instruction set: every pass for every tensor type.
#pragma once

#include <array>
#include <span>

#include "cpu/backward.hpp"
#include "cpu/decode.hpp"

namespace heed::cpu::inline HEED_ISA {

template <class Isa, class... Elements>
HEED_BASELINE std::span<const KernelRow> rows() {
  static constexpr std::array kRows{decode_row<Config<Isa, Elements>>()...,
                                   forward_row<Config<Isa, Elements>>()...,
                                   backward_row<Config<Isa, Elements>>()...};
  return kRows;
}

}  // namespace heed::cpu::inline HEED_ISA
