// Results of tokens that belong to no entry: zeros, and -inf for lse.
#include "cuda/common/fill_gaps.cuh"

#include "core/layout.hpp"
#include "core/softmax_state.hpp"
#include "cuda/host/launch.hpp"

namespace heed::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kBlocks = 1024;

// One side's tokens, as side_slice takes them.
struct Side {
  const std::int32_t* cu_seqlens;
  const std::int32_t* start;
  const std::int32_t* seqused;
  std::int64_t max_seqlen;
  std::int64_t rows;
  int entries;

  // Some tokens may belong to no entry.
  bool may_have_gaps() const {
    return cu_seqlens != nullptr || start != nullptr || seqused != nullptr;
  }
};

// The entry whose packed tokens `token` would be among: the last one that begins at or before it.
__device__ int find_entry(const Side& side, std::int64_t token) {
  int low = 0, high = side.entries - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (side.cu_seqlens[middle] <= token)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

struct GapTarget {
  TensorView tensor;
  float* lse;  // [batch, heads, rows]; nullptr: none
  bool wide;   // is_wide(tensor)
};

// One warp per token.
__global__ void fill_gaps(const __grid_constant__ Side side,
                          const __grid_constant__ GapTarget target) {
  const TensorView& x = target.tensor;
  const std::int64_t rows = x.seqlen(), tokens = x.batch() * rows;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t first = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  for (std::int64_t i = first; i < tokens; i += std::int64_t{gridDim.x} * kWarps) {
    const std::int64_t batch = i / rows, token = i % rows;
    if (side.entries > 0) {
      const int entry =
          side.cu_seqlens != nullptr ? find_entry(side, token) : static_cast<int>(batch);
      const SideSlice at =
          side_slice(entry, side.rows, side.cu_seqlens, side.start, side.seqused, side.max_seqlen);
      if (at.token <= token && token < at.token + at.length) continue;
    }
    auto* row =
        static_cast<std::uint16_t*>(x.data) + batch * x.batch_stride() + token * x.seqlen_stride();
    const int heads = static_cast<int>(x.heads()), channels = static_cast<int>(x.head_dim());
    if (target.wide) {
      const int chunks = channels / 8;
      for (int c = lane; c < heads * chunks; c += 32)
        *reinterpret_cast<uint4*>(row + c / chunks * x.head_stride() + c % chunks * 8) = {};
    } else {
      for (int head = 0; head < heads; ++head)
        for (int c = lane; c < channels; c += 32) row[head * x.head_stride() + c] = 0;
    }
    if (target.lse == nullptr) continue;
    for (int head = lane; head < heads; head += 32)
      target.lse[(batch * heads + head) * rows + token] = -kInfinity;
  }
}

Side side_of_q(const ForwardProblem& p) {
  const Sequences& s = p.sequences;
  return {s.cu_seqlens_q, s.start_q,    s.seqused_q,
          s.max_seqlen_q, p.q.seqlen(), static_cast<int>(batch_entries(p))};
}

Side side_of_k(const ForwardProblem& p) {
  const Sequences& s = p.sequences;
  return {s.cu_seqlens_k, s.start_k,    s.seqused_k,
          s.max_seqlen_k, p.k.seqlen(), static_cast<int>(batch_entries(p))};
}

Status fill(const Side& side, const TensorView& tensor, float* lse, cudaStream_t stream) {
  const std::int64_t tokens = tensor.batch() * tensor.seqlen();
  if (tokens == 0 || tensor.heads() == 0 || !side.may_have_gaps()) return {};
  const std::int64_t blocks = clamp64((tokens + kWarps - 1) / kWarps, 1, kBlocks);
  return launch<fill_gaps>({.blocks = blocks, .threads = 32 * kWarps}, stream, side,
                           GapTarget{tensor, lse, is_wide(tensor)});
}

}  // namespace

Status fill_gaps_of_forward(const ForwardProblem& p, cudaStream_t stream) {
  return fill(side_of_q(p), p.out, p.lse, stream);
}

Status fill_gaps_of_backward(const BackwardProblem& b, cudaStream_t stream) {
  if (Status s = fill(side_of_q(b.forward), b.dq, nullptr, stream); !s.ok()) return s;
  if (Status s = fill(side_of_k(b.forward), b.dk, nullptr, stream); !s.ok()) return s;
  return fill(side_of_k(b.forward), b.dv, nullptr, stream);
}

}  // namespace heed::cuda
