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

struct Params {
  ForwardProblem problem;
  const float* partial_out;
  const SoftmaxState* states;
  int splits;
  int width;
  int rows_per_entry;
  std::int64_t row_count;
};

// kTeam threads join the parts of a row of one head: a warp where there are many rows, else a
// block.
template <int kTeam>
struct Team {
  static constexpr int kTeams = kThreads / kTeam;
  static constexpr int kMostSplits = 1024 / kTeams;

  struct Smem {
    float weights[kMostSplits];  // of the parts; 0: an empty one, whose sums are not read
    float scratch[kTeam / 32];
    float4 sums[kTeam];
  };

  static __device__ void sync() {
    if constexpr (kTeam == 32)
      __syncwarp();
    else
      __syncthreads();
  }
  template <class Op>
  static __device__ float reduce(Smem& smem, int thread, float x, const Op& op) {
    for (int step = 16; step > 0; step /= 2) x = op(x, __shfl_xor_sync(~0u, x, step));
    if constexpr (kTeam > 32) {
      if (thread % 32 == 0) smem.scratch[thread / 32] = x;
      sync();
      x = smem.scratch[0];
      for (int w = 1; w < kTeam / 32; ++w) x = op(x, smem.scratch[w]);
      sync();
    }
    return x;
  }
};

// Some parts of four channels of a row, on their way before their weights are known.
struct Ahead {
  static constexpr int kParts = 8;
  float4 at[kParts];

  // Parts first, first + step, ... below `end`; part s begins at base + s * stride.
  __device__ void load(const float* base, std::int64_t stride, int first, int step, int end) {
#pragma unroll
    for (int i = 0; i < kParts; ++i)
      if (first + i * step < end)
        at[i] = *reinterpret_cast<const float4*>(base + (first + i * step) * stride);
  }
};

__device__ void add_weighted(float4& sum, const float4& part, float weight) {
  if (weight == 0.f) return;  // an empty part holds anything
  sum.x += part.x * weight;
  sum.y += part.y * weight;
  sum.z += part.z * weight;
  sum.w += part.w * weight;
}

// The parts are added in one order.
template <class Element, int kTeam>
__global__ void __launch_bounds__(kThreads) join(const __grid_constant__ Params p) {
  using T = Team<kTeam>;
  __shared__ typename T::Smem shared[T::kTeams];
  const ForwardProblem& f = p.problem;
  const int heads = static_cast<int>(f.q.heads());
  const int thread = static_cast<int>(threadIdx.x) % kTeam;
  typename T::Smem& smem = shared[threadIdx.x / kTeam];
  const std::int64_t team = std::int64_t{blockIdx.x} * T::kTeams + threadIdx.x / kTeam;
  const std::int64_t at_row = team < p.row_count ? team : p.row_count - 1;
  const int row = static_cast<int>(at_row % p.rows_per_entry);
  const int item = static_cast<int>(at_row / p.rows_per_entry);
  const int head = item % heads;
  const SequenceSlice at = slice_of(f, item / heads);
  const std::int64_t rows = f.q.batch() * f.q.heads() * f.q.seqlen();
  const std::int64_t i = lse_index(f, at, head, row);

  const float sink = f.sink == nullptr ? -kInfinity : f.sink[head] * static_cast<float>(kLog2e);
  // Groups of threads add every groups-th part, four channels a thread; then the groups are added.
  const float* parts = p.partial_out + i * p.width;
  const std::int64_t stride = rows * p.width;
  const int vectors = min_of(p.width / 4, kTeam), groups = kTeam / vectors;
  const int group = thread / vectors, vector = thread % vectors;
  const int end = group < groups ? p.splits : 0;
  ptx::wait_for_kernel_before();
  if (team >= p.row_count || row >= at.q.length) return;  // the whole team
  Ahead ahead;
  ahead.load(parts + 4 * vector, stride, group, groups, end);
  float max = sink;
  for (int s = thread; s < p.splits; s += kTeam) max = fmaxf(max, p.states[s * rows + i].max);
  max = T::reduce(smem, thread, max, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0.f;
  for (int s = thread; s < p.splits; s += kTeam) {
    const SoftmaxState part = p.states[s * rows + i];
    const bool empty = part.max == -kInfinity && part.sum == 0.f;
    smem.weights[s] = empty ? 0.f : ptx::exp2(part.max - max);
    sum += empty ? 0.f : part.sum * smem.weights[s];
  }
  sum = T::reduce(smem, thread, sum, [](float a, float b) { return a + b; });
  if (sink != -kInfinity) sum += ptx::exp2(sink - max);
  if (f.lse != nullptr && thread == 0)
    f.lse[i] = sum == 0.f ? -kInfinity : (max + log2f(sum)) * static_cast<float>(kLn2);
  T::sync();  // the weights are there

  Element* out = first_row<Element>(f.out, at.q, head) + row * f.out.seqlen_stride();
  const int channels = static_cast<int>(f.out.head_dim());
  for (int first = 0; first < p.width; first += 4 * vectors) {
    const int width = min_of(p.width - first, 4 * vectors);
    const float* base = parts + first + 4 * vector;
    const int last = 4 * vector < width ? end : 0;
    if (first > 0) ahead.load(base, stride, group, groups, last);
    float4 x{0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int j = 0; j < Ahead::kParts; ++j)
      if (group + j * groups < last) add_weighted(x, ahead.at[j], smem.weights[group + j * groups]);
    for (int s = group + Ahead::kParts * groups; s < last; s += groups)
      add_weighted(x, *reinterpret_cast<const float4*>(base + s * stride), smem.weights[s]);
    T::sync();  // the sums before have been used
    smem.sums[thread] = x;
    T::sync();
    for (int c = thread; c < width && first + c < channels; c += kTeam) {
      float total = 0.f;
      for (int g = 0; g < groups; ++g)
        total += reinterpret_cast<const float*>(smem.sums)[4 * g * vectors + c];
      total = sum == 0.f ? 0.f : total / sum;
      out[first + c].bits = static_cast<std::uint16_t>(ptx::pack<Element>(total, 0.f));
    }
  }
}

template <int kTeam>
Status join_by(const Params& params, cudaStream_t stream) {
  constexpr int kTeams = Team<kTeam>::kTeams;
  const LaunchShape shape{
      .blocks = (params.row_count + kTeams - 1) / kTeams, .threads = kThreads, .overlap = true};
  if (params.problem.q.dtype == DType::bf16)
    return launch<join<bf16, kTeam>>(shape, stream, params);
  return launch<join<f16, kTeam>>(shape, stream, params);
}

}  // namespace

Status combine(const ForwardProblem& f, int splits, const float* partial_out, int width,
               const SoftmaxState* states, cudaStream_t stream) {
  // Blocks of fewer rows than this leave a GPU half empty; a warp is slow at many parts.
  constexpr std::int64_t kManyRows = 512;
  constexpr int kFewSplits = 16;
  const int rows = static_cast<int>(max_seqlen_q(f));
  const Params params{
      f, partial_out, states, splits, width, rows, rows * f.q.heads() * batch_entries(f)};
  static_assert(kFewSplits <= Team<32>::kMostSplits);
  if (params.row_count >= kManyRows && splits <= kFewSplits) return join_by<32>(params, stream);
  return join_by<kThreads>(params, stream);
}

}  // namespace heed::cuda
