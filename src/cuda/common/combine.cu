// Joins the parts of attention over split keys: out, lse and the sink.
#include "cuda/common/combine.cuh"

#include "core/divisor.hpp"
#include "core/half.hpp"
#include "core/layout.hpp"
#include "core/sequence.hpp"
#include "cuda/common/joined.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/host/launch.hpp"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"

namespace heed::cuda {
namespace {

constexpr int kThreads = 128;
// A team of warps joins this many channels of a row of one head, four channels a lane.
constexpr int kVectors = 8, kChannels = 4 * kVectors;

struct Params {
  ForwardProblem problem;
  const float* partial_out;
  const SoftmaxState* states;
  int splits;
  int width;
  bool wide;                    // out takes four channels at a time
  std::int64_t rows_of_part;    // in partial_out and states
  Divisor slices, rows, heads;  // kChannels of a row, rows of an entry's head
  int teams;
};

template <class Op>
__device__ __forceinline__ float reduce_warp(float x, const Op& op) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = op(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// A warp joins 32 parts at a time: lane l has the state of the l-th, and groups of kVectors lanes
// add every kGroups-th part, all of them on their way before their weights are known. Then the
// groups are added, and the warps of a team. So the parts are added in one order.
template <class Element, int kWarps>
__global__ void __launch_bounds__(kThreads, 6) join(const __grid_constant__ Params p) {
  constexpr int kGroups = 32 / kVectors, kTeams = kThreads / 32 / kWarps;
  const ForwardProblem& f = p.problem;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int team = static_cast<int>(blockIdx.x) * kTeams + warp / kWarps;
  const int line = team / p.slices, item = line / p.rows, entry = item / p.heads;
  const int row = line - item * p.rows.value, head = item - entry * p.heads.value;
  const int first = (team - line * p.slices.value) * kChannels + 4 * (lane % kVectors);
  const SequenceSlice at = slice_of(f, team < p.teams ? entry : 0);
  const std::int64_t i = lse_index(f, at, head, row);
  const SoftmaxState* states = p.states + i;
  const float* parts = p.partial_out + i * p.width + first;
  const std::int64_t stride = p.rows_of_part * p.width;
  ptx::wait_for_kernel_before();
  if (team >= p.teams || row >= at.q.length) return;  // the whole team

  Joined joined;
  for (int begin = warp % kWarps * 32; begin < p.splits; begin += 32 * kWarps) {
    SoftmaxState state;
    if (begin + lane < p.splits) state = states[(begin + lane) * p.rows_of_part];
    float4 ahead[32 / kGroups];
#pragma unroll
    for (int j = 0; j < 32 / kGroups; ++j) {
      const int s = begin + lane / kVectors + j * kGroups;
      if (s < p.splits) ahead[j] = *reinterpret_cast<const float4*>(parts + s * stride);
    }
    joined.raise(
        reduce_warp(fmaxf(joined.max, state.max), [](float a, float b) { return fmaxf(a, b); }));
    const float weight = weight_of(state, joined.max);
    joined.sum += weight * state.sum;
#pragma unroll
    for (int j = 0; j < 32 / kGroups; ++j)
      joined.add(ahead[j], __shfl_sync(~0u, weight, lane / kVectors + j * kGroups));
  }
  joined.sum = reduce_warp(joined.sum, [](float a, float b) { return a + b; });
#pragma unroll
  for (int step = kVectors; step < 32; step *= 2) {
    const float4 x = joined.x;
    joined.add({__shfl_xor_sync(~0u, x.x, step), __shfl_xor_sync(~0u, x.y, step),
                __shfl_xor_sync(~0u, x.z, step), __shfl_xor_sync(~0u, x.w, step)},
               1.f);
  }
  if constexpr (kWarps > 1) {
    static_assert(kTeams == 1);
    __shared__ Joined of_warps[kWarps][kVectors];
    if (lane < kVectors) of_warps[warp][lane] = joined;
    __syncthreads();
    joined = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const Joined& other = of_warps[w][lane % kVectors];
      joined.raise(fmaxf(joined.max, other.max));
      joined.add({other.max, other.sum}, other.x);
    }
  }
  if (warp % kWarps == 0 && lane < kVectors)
    store_row<Element>(f, at, {row, head}, first, p.wide, joined);
}

template <int kWarps>
Status join_by(const Params& params, cudaStream_t stream) {
  constexpr int kTeams = kThreads / 32 / kWarps;
  const LaunchShape shape{
      .blocks = (params.teams + kTeams - 1) / kTeams, .threads = kThreads, .overlap = true};
  if (params.problem.q.dtype == DType::bf16)
    return launch<join<bf16, kWarps>>(shape, stream, params);
  return launch<join<f16, kWarps>>(shape, stream, params);
}

}  // namespace

Status combine(const ForwardProblem& f, int splits, const float* partial_out, int width,
               const SoftmaxState* states, cudaStream_t stream) {
  const int rows = static_cast<int>(max_seqlen_q(f)), heads = static_cast<int>(f.q.heads());
  const int slices = width / kChannels;
  // Their parts fit in memory, so int holds their number.
  const auto teams = static_cast<int>(batch_entries(f) * heads * rows * slices);
  if (teams == 0) return {};
  const Params params{.problem = f,
                      .partial_out = partial_out,
                      .states = states,
                      .splits = splits,
                      .width = width,
                      .wide = is_wide(f.out),
                      .rows_of_part = f.q.batch() * f.q.heads() * f.q.seqlen(),
                      .slices = Divisor(slices),
                      .rows = Divisor(rows),
                      .heads = Divisor(heads),
                      .teams = teams};
  constexpr int kFewSplits = 32;  // that a warp joins at once
  return splits <= kFewSplits ? join_by<1>(params, stream) : join_by<4>(params, stream);
}

}  // namespace heed::cuda
