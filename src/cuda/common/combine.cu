// Joins the parts of attention over split keys: out, lse and the sink.
#include "cuda/common/combine.cuh"

#include "core/half.hpp"
#include "core/sequence.hpp"
#include "cuda/common/rows.cuh"
#include "cuda/host/launch.hpp"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/mma.cuh"

namespace heed::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxSplits = 1024;

struct Params {
  ForwardProblem problem;
  const float* partial_out;
  const SoftmaxState* states;
  int splits;
  int width;
  int rows_per_entry;
};

template <class Op>
__device__ float reduce(float* scratch, float x, const Op& op) {
  for (int step = 16; step > 0; step /= 2) x = op(x, __shfl_xor_sync(~0u, x, step));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[0];
  for (int w = 1; w < kThreads / 32; ++w) x = op(x, scratch[w]);
  __syncthreads();
  return x;
}

// One block per query row and head; the parts are added in order.
template <class Element>
__global__ void join(const __grid_constant__ Params p) {
  ptx::wait_for_kernel_before();
  const ForwardProblem& f = p.problem;
  const int heads = static_cast<int>(f.q.heads());
  const int row = static_cast<int>(blockIdx.x % p.rows_per_entry);
  const int item = static_cast<int>(blockIdx.x / p.rows_per_entry);
  const int head = item % heads;
  const SequenceSlice at = slice_of(f, item / heads);
  if (row >= at.q.length) return;
  const std::int64_t rows = f.q.batch() * f.q.heads() * f.q.seqlen();
  const std::int64_t i = lse_index(f, at, head, row);

  __shared__ float weights[kMaxSplits];  // of the parts; 0: an empty one, whose sums are not read
  __shared__ float scratch[kThreads / 32];
  const int thread = static_cast<int>(threadIdx.x);
  const float sink = f.sink == nullptr ? -kInfinity : f.sink[head] * static_cast<float>(kLog2e);
  float max = sink;
  for (int s = thread; s < p.splits; s += kThreads) max = fmaxf(max, p.states[s * rows + i].max);
  max = reduce(scratch, max, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0.f;
  for (int s = thread; s < p.splits; s += kThreads) {
    const SoftmaxState part = p.states[s * rows + i];
    const bool empty = part.max == -kInfinity && part.sum == 0.f;
    weights[s] = empty ? 0.f : ptx::exp2(part.max - max);
    sum += empty ? 0.f : part.sum * weights[s];
  }
  sum = reduce(scratch, sum, [](float a, float b) { return a + b; });
  if (sink != -kInfinity) sum += ptx::exp2(sink - max);
  if (f.lse != nullptr && thread == 0)
    f.lse[i] = max == -kInfinity ? -kInfinity : (max + log2f(sum)) * static_cast<float>(kLn2);

  // Groups of threads add every kGroups-th part, four channels a thread; then the groups are added.
  __shared__ float4 sums[kThreads];
  const int vectors = p.width / 4, groups = kThreads / vectors;
  const int group = thread / vectors, vector = thread % vectors;
  float4 x{0.f, 0.f, 0.f, 0.f};
  if (group < groups) {
    const float* first = p.partial_out + i * p.width + 4 * vector;
#pragma unroll 4
    for (int s = group; s < p.splits; s += groups) {
      if (weights[s] == 0.f) continue;
      const float4 part = *reinterpret_cast<const float4*>(first + s * rows * p.width);
      x.x += part.x * weights[s];
      x.y += part.y * weights[s];
      x.z += part.z * weights[s];
      x.w += part.w * weights[s];
    }
  }
  sums[thread] = x;
  __syncthreads();
  Element* out = first_row<Element>(f.out, at.q, head) + row * f.out.seqlen_stride();
  for (int c = thread; c < f.out.head_dim(); c += kThreads) {
    float total = 0.f;
    for (int g = 0; g < groups; ++g)
      total += reinterpret_cast<const float*>(sums)[g * p.width + c];
    total = sum == 0.f ? 0.f : total / sum;
    out[c].bits = static_cast<std::uint16_t>(ptx::pack<Element>(total, 0.f));
  }
}

}  // namespace

Status combine(const ForwardProblem& f, int splits, const float* partial_out, int width,
               const SoftmaxState* states, cudaStream_t stream) {
  const int rows = static_cast<int>(max_seqlen_q(f));
  const Params params{f, partial_out, states, splits, width, rows};
  const LaunchShape shape{.blocks = rows * f.q.heads() * batch_entries(f), .threads = kThreads, .overlap = true};
  if (f.q.dtype == DType::bf16) return launch<join<bf16>>(shape, stream, params);
  return launch<join<f16>>(shape, stream, params);
}

}  // namespace heed::cuda
