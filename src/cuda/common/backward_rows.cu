// What the backward kernels must know of every query row and of every tile of them, computed first.
#include "cuda/common/backward_rows.cuh"

#include <bit>

#include "core/half.hpp"
#include "core/softmax_state.hpp"
#include "cuda/common/rows.cuh"
#include "cuda/host/launch.hpp"
#include "cuda/ptx/memory.cuh"

namespace heed::cuda {
namespace {

constexpr int kThreads = 128;

struct Params {
  BackwardProblem problem;
  QueryTiles tiles;
  BackwardRow* rows;
  TileLimits* limits;
  BackwardBounds* bounds;
  QuerySums sums;
  bool wide;  // rows of out and dout can be read 16 bytes at a time
};

// For numbers >= 0, whose bits order as integers. A NaN stays where it is: it must not scale the
// gradients of other rows.
__device__ void raise(float* target, float x) {
  if (x == x) atomicMax(reinterpret_cast<int*>(target), __float_as_int(x));
}

// Over groups of `lanes` lanes, a power of two.
__device__ float sum_lanes(float x, int lanes = 32) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

struct alignas(16) Chunk {
  std::uint16_t at[8];
};

// source[0 .. count) and zeros.
template <class Element>
__device__ Chunk load_chunk(const Element* source, int count, bool wide) {
  if (wide)
    return count > 0 ? std::bit_cast<Chunk>(__ldg(reinterpret_cast<const uint4*>(source)))
                     : Chunk{};
  Chunk chunk{};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) chunk.at[i] = reinterpret_cast<const std::uint16_t*>(source)[i];
  return chunk;
}

__device__ void find_tile_limits(const Params& p, const SequenceSlice& at, int m_tile) {
  __shared__ TileLimits shared;
  if (threadIdx.x == 0) shared = {INT_MAX, 0, 0, INT_MAX};
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < p.tiles.tile_m; i += kThreads) {
    const int row = m_tile * p.tiles.tile_m + i;
    RowLimits r;
    if (row < at.q.length)
      r = row_limits(p.problem.forward.band, at, p.problem.forward.intervals, row);
    if (r.first < r.end) {
      atomicMin(&shared.first, r.first);
      atomicMax(&shared.end, r.end);
    }
    atomicMax(&shared.all_first, r.first);
    atomicMin(&shared.all_end, r.end);
  }
  __syncthreads();
  if (threadIdx.x == 0) p.limits[p.tiles.index(at, m_tile)] = shared;
}

// One block per tile and head; 8, 16 or 32 lanes share a row, 8 channels each.
template <class Element>
__global__ void __launch_bounds__(kThreads) find_rows(const __grid_constant__ Params p) {
  ptx::launch_dependents();
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.sums.counter = 0;
  const ForwardProblem& f = p.problem.forward;
  const int heads = static_cast<int>(f.q.heads());
  const int item = static_cast<int>(blockIdx.x / p.tiles.per_entry);
  const int m_tile = static_cast<int>(blockIdx.x % p.tiles.per_entry);
  const int head = item % heads;
  const SequenceSlice at = slice_of(f, item / heads);
  const int row0 = m_tile * p.tiles.tile_m;
  if (row0 >= at.q.length) return;
  if (head == 0) find_tile_limits(p, at, m_tile);

  const std::int64_t tile = p.tiles.index(at, m_tile) * heads + head;
  auto* sums = reinterpret_cast<float4*>(p.sums.dq + tile * p.sums.floats);
  for (int i = static_cast<int>(threadIdx.x); i < p.sums.floats / 4; i += kThreads) sums[i] = {};
  if (p.sums.turns != nullptr && static_cast<int>(threadIdx.x) < p.sums.writers)
    p.sums.turns[tile * p.sums.writers + threadIdx.x] = 0;

  const auto* out = first_row<const Element>(f.out, at.q, head);
  const auto* dout = first_row<const Element>(p.problem.dout, at.q, head);
  const int channels = static_cast<int>(f.out.head_dim());
  const int lanes = channels <= 64 ? 8 : channels <= 128 ? 16 : 32;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int end = min_of(row0 + p.tiles.tile_m, at.q.length);
  // Whole warps take the same turns.
#pragma unroll 4
  for (int first = row0; first < end; first += kThreads / lanes) {
    const int row = first + static_cast<int>(threadIdx.x) / lanes;
    float sum = 0.f, squares = 0.f;
    for (int c = 8 * lane; c < channels && row < end; c += 8 * lanes) {
      const Chunk o = load_chunk(out + row * f.out.seqlen_stride() + c, channels - c, p.wide);
      const Chunk d =
          load_chunk(dout + row * p.problem.dout.seqlen_stride() + c, channels - c, p.wide);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float y = to_float(std::bit_cast<Element>(o.at[i]));
        const float x = to_float(std::bit_cast<Element>(d.at[i]));
        sum += y * x;
        squares += x * x;
      }
    }
    sum = sum_lanes(sum, lanes);
    if constexpr (std::is_same_v<Element, f16>) squares = sum_lanes(squares, lanes);
    if (lane != 0 || row >= end) continue;
    const std::int64_t i = lse_index(f, at, head, row);
    const float lse = f.lse[i];
    BackwardRow r;
    r.lse_log2 = lse == -kInfinity ? 0.f : lse * static_cast<float>(kLog2e);
    r.delta = p.problem.dlse == nullptr ? sum : sum - p.problem.dlse[i];
    r.limits = row_limits(f.band, at, f.intervals, row);
    p.rows[i] = r;
    if constexpr (std::is_same_v<Element, f16>) {
      raise(&p.bounds->dout, sqrtf(squares));
      raise(&p.bounds->delta, fabsf(r.delta));
    }
  }
}

// One block per entry and 64 keys, all key heads, a warp per row of v.
__global__ void find_v_bound(const __grid_constant__ Params p, int blocks_per_entry) {
  const ForwardProblem& f = p.problem.forward;
  const SequenceSlice at = slice_of(f, static_cast<int>(blockIdx.x) / blocks_per_entry);
  const int key0 = static_cast<int>(blockIdx.x) % blocks_per_entry * 64;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float most = 0.f;
  for (int head = 0; head < f.k.heads(); ++head) {
    const auto* v = first_row<const f16>(f.v, at.k, head);
    for (int key = key0 + static_cast<int>(threadIdx.x) / 32; key < min_of(key0 + 64, at.k.length);
         key += kThreads / 32) {
      if (!key_valid(f.intervals, at, key)) continue;
      float squares = 0.f;
      for (std::int64_t c = lane; c < f.v.head_dim(); c += 32) {
        const float x = to_float(v[key * f.v.seqlen_stride() + c]);
        squares += x * x;
      }
      most = fmaxf(most, sqrtf(sum_lanes(squares)));  // drops NaN
    }
  }
  if (lane == 0) raise(&p.bounds->v, most);
}

// One block per head; every thread adds its rows in order, then the threads are added pairwise.
__global__ void sum_dsink_of_head(const __grid_constant__ BackwardProblem b,
                                  const BackwardRow* rows) {
  __shared__ float parts[1024];
  const ForwardProblem& f = b.forward;
  const int head = static_cast<int>(blockIdx.x);
  const float sink = f.sink[head];
  float sum = 0.f;
  for (int entry = 0; entry < batch_entries(f) && sink != -kInfinity; ++entry) {
    const SequenceSlice at = slice_of(f, entry);
    for (int row = static_cast<int>(threadIdx.x); row < at.q.length; row += 1024) {
      const std::int64_t i = lse_index(f, at, head, row);
      sum -= expf(sink - f.lse[i]) * rows[i].delta;
    }
  }
  parts[threadIdx.x] = sum;
  for (unsigned step = 512; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) parts[threadIdx.x] += parts[threadIdx.x + step];
  }
  if (threadIdx.x == 0) b.dsink[head] = parts[0];
}

}  // namespace

Status find_backward_rows(const BackwardProblem& b, const QueryTiles& tiles, BackwardRow* rows,
                          TileLimits* limits, BackwardBounds* bounds, const QuerySums& sums,
                          cudaStream_t stream) {
  const std::int64_t blocks = tiles.per_entry * b.forward.q.heads() * batch_entries(b.forward);
  if (blocks == 0) {
    const auto error = cudaMemsetAsync(sums.counter, 0, sizeof(int), stream);
    if (Status s = cuda_status(error, "memset"); !s.ok()) return s;
  }
  const LaunchShape shape{.blocks = blocks, .threads = kThreads};
  const Params params{
      b, tiles, rows, limits, bounds, sums, is_wide(b.forward.out) && is_wide(b.dout)};
  if (b.forward.q.dtype == DType::bf16) return launch<find_rows<bf16>>(shape, stream, params);
  if (Status s = cuda_status(cudaMemsetAsync(bounds, 0, sizeof *bounds, stream), "memset"); !s.ok())
    return s;
  if (Status s = launch<find_rows<f16>>(shape, stream, params); !s.ok()) return s;
  const int per_entry = static_cast<int>((max_seqlen_k(b.forward) + 63) / 64);
  return launch<find_v_bound>({.blocks = per_entry * batch_entries(b.forward), .threads = kThreads},
                              stream, params, per_entry);
}

Status sum_dsink(const BackwardProblem& b, const BackwardRow* rows, cudaStream_t stream) {
  if (b.dsink == nullptr) return {};
  return launch<sum_dsink_of_head>({.blocks = b.forward.q.heads(), .threads = 1024}, stream, b,
                                   rows);
}

}  // namespace heed::cuda
