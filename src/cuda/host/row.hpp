// What every row of the GPU kernels says of its configuration.
#pragma once

#include "registry.hpp"

namespace heed::cuda {

// Without the functions, which depend on the pass.
template <class C>
constexpr KernelRow row_of(Arch arch, Pass pass, DType dtype, int tile_m) {
  KernelRow row{.arch = arch,
                .pass = pass,
                .dtype = dtype,
                .operand = dtype,
                .tile_m = tile_m,
                .tile_n = C::tile.tile_n,
                .max_head_dim = C::tile.head_dim,
                .max_query_rows = 0,
                .forward_bytes = nullptr,
                .forward = nullptr,
                .backward_bytes = nullptr,
                .backward = nullptr};
  row.score = C::Score::kKind;
  row.smem_bytes = sizeof(typename C::Smem);
  return row;
}

}  // namespace heed::cuda
