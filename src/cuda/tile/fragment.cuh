// What one warp holds of a matrix in registers: fp32 accumulators and 16-bit left operands.
#pragma once

#include <cstdint>
#include <utility>

#include "cuda/ptx/mma.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace heed::tile {

__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp() { return threadIdx.x / 32; }

// 16 kM rows x 8 kN columns. Lane 4 g + t holds rows 16 m + g + 8 h at columns 8 n + 2 t + e in
// at[m][n][2 h + e]: 2 kM rows per lane ("slots" 2 m + h), each spread over the four lanes of a
// quad.
template <int kM, int kN>
struct Accumulator {
  static constexpr int kSlots = 2 * kM;
  float at[kM][kN][4];

  __device__ void clear() {
#pragma unroll
    for (auto& row : at)
      for (auto& four : row)
        for (float& x : four) x = 0.f;
  }
};

// 16 kM rows x 16 kK columns, the left operand of kK steps of mma.
template <int kM, int kK>
struct Operand {
  std::uint32_t at[kM][kK][4];
};

// Row within the warp's slab of a slot; column of the first of a lane's two neighbours in fragment
// n.
__device__ __forceinline__ int slot_row(int slot) { return slot * 8 + lane() / 4; }
__device__ __forceinline__ int pair_col(int n) { return 8 * n + 2 * (lane() % 4); }

// Calls body(slot, col, x) for every element of this lane; `col` within the tile.
template <int kM, int kN, class Body>
__device__ __forceinline__ void for_each(Accumulator<kM, kN>& acc, const Body& body) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) body(2 * m + i / 2, pair_col(n) + i % 2, acc.at[m][n][i]);
}

// Calls body(slot, col, x, y) for every pair of neighbours: y stands at col + 1.
template <int kM, int kN, class Body>
__device__ __forceinline__ void for_each_pair(const Accumulator<kM, kN>& acc, const Body& body) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        body(2 * m + h, pair_col(n), acc.at[m][n][2 * h], acc.at[m][n][2 * h + 1]);
}

// for_each for two accumulators of one shape.
template <int kM, int kN, class Body>
__device__ __forceinline__ void for_each(Accumulator<kM, kN>& a, Accumulator<kM, kN>& b,
                                         const Body& body) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        body(2 * m + i / 2, pair_col(n) + i % 2, a.at[m][n][i], b.at[m][n][i]);
}

template <int kM, int kN>
__device__ __forceinline__ void scale(Accumulator<kM, kN>& acc, float factor) {
  for_each(acc, [&](int, int, float& x) { x *= factor; });
}

template <int kM, int kN>
__device__ __forceinline__ void scale_rows(Accumulator<kM, kN>& acc,
                                           const float (&factor)[2 * kM]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc.at[m][n][i] *= factor[2 * m + i / 2];
}

// An accumulator's lanes hold exactly what the left operand of the next product needs.
template <class Element, int kM, int kN>
__device__ __forceinline__ Operand<kM, kN / 2> to_operand(const Accumulator<kM, kN>& acc) {
  Operand<kM, kN / 2> a;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int k = 0; k < kN / 2; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&four)[4] = acc.at[m][2 * k + i / 2];
        a.at[m][k][i] = ptx::pack<Element>(four[2 * (i % 2)], four[2 * (i % 2) + 1]);
      }
  return a;
}

// Rounds to the tile's elements; rows [row, row + 16 kM), columns [col, col + 8 kN).
template <int kM, int kN, class Tile>
__device__ __forceinline__ void store(Tile& tile, int row, const Accumulator<kM, kN>& acc,
                                      int col = 0) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        auto* chunk = tile.chunk(row + slot_row(2 * m + h), col / 8 + n);
        reinterpret_cast<std::uint32_t*>(chunk)[lane() % 4] =
            ptx::pack<typename Tile::Element>(acc.at[m][n][2 * h], acc.at[m][n][2 * h + 1]);
      }
}

// The four lanes of a quad hold a 4 x 4 matrix, lane t column t; afterwards lane t holds row t.
__device__ __forceinline__ void transpose_quad(std::uint32_t (&r)[4]) {
  const bool odd = lane() % 2 != 0, high = lane() / 2 % 2 != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {  // within pairs of lanes
    const std::uint32_t other = __shfl_xor_sync(~0u, odd ? r[i] : r[i + 1], 1);
    (odd ? r[i] : r[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {  // between the pairs
    const std::uint32_t other = __shfl_xor_sync(~0u, high ? r[i] : r[i + 2], 2);
    (high ? r[i] : r[i + 2]) = other;
  }
}

// The first `count` of eight elements; rarely needed, so one text for all.
template <class Element>
__device__ __noinline__ void store_elements(Element* target, uint4 eight, int count) {
  const std::uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
  for (int c = 0; c < 8; ++c)
    if (c < count) target[c].bits = static_cast<std::uint16_t>(pairs[c / 2] >> 16 * (c % 2));
}

// Rounds to Element and writes the rows to memory: address(slot)[0 .. channels), nullptr: nothing.
// `wide`: 16 bytes at a time, which needs addresses and channels that are multiples of 8 elements.
template <class Element, int kM, int kN, class Address>
__device__ __forceinline__ void store_global(const Accumulator<kM, kN>& acc, bool wide,
                                             int channels, const Address& address) {
  static_assert(kN % 4 == 0);
#pragma unroll
  for (int slot = 0; slot < 2 * kM; ++slot) {
    Element* target = address(slot);
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      std::uint32_t chunk[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&four)[4] = acc.at[slot / 2][n + i];
        chunk[i] = ptx::pack<Element>(four[2 * (slot % 2)], four[2 * (slot % 2) + 1]);
      }
      transpose_quad(chunk);
      const int first = 8 * (n + lane() % 4);
      if (target == nullptr || first >= channels) continue;
      if (wide)
        *reinterpret_cast<uint4*>(target + first) = uint4{chunk[0], chunk[1], chunk[2], chunk[3]};
      else
        store_elements(target + first, {chunk[0], chunk[1], chunk[2], chunk[3]}, channels - first);
    }
  }
}

// fp32 accumulators in memory in the order of the registers: 512 bytes of consecutive memory
// per warp and fragment. `base`: 32 kM kN * 4 floats of this warp, a multiple of 16 bytes. Of
// accumulators of one row of fragments the first kCount may be meant.
template <int kCount, int kM, int kN>
__device__ __forceinline__ void add_to_global(float* base, const Accumulator<kM, kN>& acc) {
  static_assert(kCount == kM * kN || kM == 1);
  float* mine = base + 4 * lane();
  [&]<int... kFragment>(std::integer_sequence<int, kFragment...>) {
    const auto add = [&]<int kAt>(const float(&x)[4]) {
      ptx::add_to_global<128 * kAt>(mine, {x[0], x[1], x[2], x[3]});
    };
    (add.template operator()<kFragment>(acc.at[kFragment / kN][kFragment % kN]), ...);
  }
  (std::make_integer_sequence<int, kCount>());
}
template <int kM, int kN>
__device__ __forceinline__ void add_to_global(float* base, const Accumulator<kM, kN>& acc) {
  add_to_global<kM * kN>(base, acc);
}

template <int kM, int kN>
__device__ __forceinline__ void store_in_order(float* base, const Accumulator<kM, kN>& acc) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float(&x)[4] = acc.at[m][n];
      *reinterpret_cast<float4*>(base + 4 * (32 * (m * kN + n) + lane())) = {x[0], x[1], x[2],
                                                                             x[3]};
    }
}

// acc += what store_in_order or add_to_global left there.
template <int kM, int kN>
__device__ __forceinline__ void add_in_order(Accumulator<kM, kN>& acc, const float* base) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const float4 x = *reinterpret_cast<const float4*>(base + 4 * (32 * (m * kN + n) + lane()));
      acc.at[m][n][0] += x.x;
      acc.at[m][n][1] += x.y;
      acc.at[m][n][2] += x.z;
      acc.at[m][n][3] += x.w;
    }
}

}  // namespace heed::tile
