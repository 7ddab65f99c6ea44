// What the addresses of a problem's tensors allow.
#pragma once

#include <cstdint>

#include "heed/problem.hpp"

namespace heed {

// Whether every row of a tensor begins at a multiple of 16 bytes and has whole 16-byte chunks.
template <class View>
bool is_wide(const View& x) {
  bool wide = reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.head_dim() % 8 == 0;
  for (int d = 0; d + 1 < x.rank; ++d) wide = wide && (x.shape[d] == 1 || x.stride[d] % 8 == 0);
  return wide;
}

// Whether a GPU's copy engine can bring boxes of it: wide, and no axis is repeated.
inline bool is_bulk(const ConstTensorView& x) {
  bool bulk = is_wide(x);
  for (int d = 0; d < x.rank; ++d) bulk = bulk && (x.shape[d] <= 1 || x.stride[d] > 0);
  return bulk;
}
inline bool is_bulk(const ForwardProblem& p) {
  return is_bulk(p.q) && is_bulk(p.k) && is_bulk(p.v);
}
inline bool is_bulk(const BackwardProblem& p) { return is_bulk(p.forward) && is_bulk(p.dout); }

}  // namespace heed
