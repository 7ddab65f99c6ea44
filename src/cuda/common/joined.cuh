// Joining parts of the keys: what becomes of their sums, and a row that is complete.
#pragma once

#include <cstdint>

#include "core/sequence.hpp"
#include "core/softmax_state.hpp"
#include "cuda/common/rows.cuh"
#include "cuda/common/score.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/tile/fragment.cuh"
#include "heed/problem.hpp"

namespace heed::cuda {

// The factor of a part's sums among sums relative to `max`; 0 for an empty one.
__device__ __forceinline__ float weight_of(SoftmaxState part, float max) {
  const bool empty = part.max == -kInfinity && part.sum == 0.f;
  return empty ? 0.f : ptx::exp2(part.max - max);
}

// Four channels of a row.
struct Joined {
  float max = -kInfinity, sum = 0.f;  // of the row
  float4 x{0.f, 0.f, 0.f, 0.f};

  __device__ __forceinline__ void scale(float factor) {
    x = {factor * x.x, factor * x.y, factor * x.z, factor * x.w};
  }
  // Makes the sums relative to another maximum.
  __device__ __forceinline__ void raise(float to) {
    const float factor = rescale(max, to);
    max = to;
    sum *= factor;
    scale(factor);
  }
  __device__ __forceinline__ void add(const float4& sums, float weight) {
    if (weight == 0.f) return;  // an empty part holds anything
    x.x += weight * sums.x;
    x.y += weight * sums.y;
    x.z += weight * sums.z;
    x.w += weight * sums.w;
  }
  // A part of which max is at least the maximum.
  __device__ __forceinline__ void add(SoftmaxState part, const float4& sums) {
    const float weight = weight_of(part, max);
    sum += weight * part.sum;
    add(sums, weight);
  }
};

// Adds the sink, and writes the channels [channel, channel + 4) of out and, with the first ones,
// lse. `wide`: is_wide(out).
template <class Element>
__device__ __forceinline__ void store_row(const ForwardProblem& f, const SequenceSlice& at,
                                          Place place, int channel, bool wide, Joined row) {
  if (f.sink != nullptr) {
    const float sink = f.sink[place.head] * static_cast<float>(kLog2e);
    if (sink != -kInfinity) {
      row.raise(fmaxf(row.max, sink));
      row.sum += ptx::exp2(sink - row.max);
    }
  }
  if (f.lse != nullptr && channel == 0)
    f.lse[lse_index(f, at, place.head, place.row)] =
        row.sum == 0.f ? -kInfinity : (row.max + log2f(row.sum)) * static_cast<float>(kLn2);
  const int channels = static_cast<int>(f.out.head_dim()) - channel;
  if (channels <= 0) return;
  row.scale(row.sum == 0.f ? 0.f : 1.f / row.sum);
  Element* out =
      first_row<Element>(f.out, at.q, place.head) + place.row * f.out.seqlen_stride() + channel;
  const uint2 four{ptx::pack<Element>(row.x.x, row.x.y), ptx::pack<Element>(row.x.z, row.x.w)};
  if (wide)
    *reinterpret_cast<uint2*>(out) = four;
  else
    tile::store_elements(out, {four.x, four.y, 0, 0}, channels < 4 ? channels : 4);
}

}  // namespace heed::cuda
