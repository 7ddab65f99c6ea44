// Decode: few query rows against many keys. The forward kernel on packed rows (all query heads of a
// key head read its keys once), with the keys split among CTAs and the parts joined by
// common/combine.
#pragma once

#include <array>

#include "core/workspace.hpp"
#include "cuda/common/combine.cuh"
#include "cuda/sm80/forward.cuh"

namespace heed::sm80 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::tile.ctas)
    decode(const __grid_constant__ ForwardParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(shared);
  const int heads_k = static_cast<int>(p.problem.k.heads());
  int item = static_cast<int>(blockIdx.x);
  ForwardWork work{};
  work.split = item % p.splits;
  item /= p.splits;
  work.row0 = item % p.m_tiles * C::tile.tile_m;
  item /= p.m_tiles;
  work.at = slice_of(p.problem, item / heads_k);
  work.head_k = item % heads_k;
  work.head = work.head_k * p.group;
  work.rows = work.at.q.length * p.group;
  if (work.row0 >= work.rows) return;
  find_limits<C>(p, smem, work);
  Attention<C> attention(p, work);
  attend_staged<C>(p, smem, work, attention);
  if (p.splits > 1) {
    store_partial<C>(p, work, attention.acc_o, attention.softmax);
  } else {
    store_out<C>(p, smem, work, attention.acc_o, attention.softmax);
  }
}

// ---- host ----

struct DecodeMemory {
  float* out;
  SoftmaxState* states;
};

template <class C>
DecodeMemory carve_decode(WorkspaceLayout& layout, const Plan& plan, const ForwardProblem& f) {
  if (plan.splits <= 1) return {};
  const std::int64_t rows = plan.splits * f.q.batch() * f.q.heads() * f.q.seqlen();
  return {layout.add<float>(rows * C::tile.head_dim), layout.add<SoftmaxState>(rows)};
}

template <class C>
std::size_t decode_bytes(const Plan& plan, const ForwardProblem& f) {
  WorkspaceLayout layout;
  carve_decode<C>(layout, plan, f);
  return layout.bytes();
}

template <class C>
Status launch_decode(const Plan& plan, const ForwardProblem& f, Workspace workspace, Queue queue) {
  if (Status s = cuda::fill_gaps_of_forward(f, queue.stream); !s.ok()) return s;
  if (f.k.heads() == 0) return {};
  WorkspaceLayout layout(workspace);
  const DecodeMemory memory = carve_decode<C>(layout, plan, f);
  ForwardParams params = forward_params<C>(f);
  params.m_tiles =
      static_cast<int>((max_seqlen_q(f) * params.group + C::tile.tile_m - 1) / C::tile.tile_m);
  params.splits = plan.splits > 1 ? plan.splits : 1;
  params.partial_out = memory.out;
  params.partial_states = memory.states;
  const std::int64_t ctas = params.splits * params.m_tiles * f.k.heads() * batch_entries(f);
  if (Status s = cuda::launch(decode<C>,
                              {.grid = dim3(static_cast<unsigned>(ctas)),
                               .block = dim3(C::kThreads),
                               .smem_bytes = sizeof(typename C::Smem)},
                              queue.stream, params);
      !s.ok() || params.splits == 1)
    return s;
  return cuda::combine(f, params.splits, memory.out, C::tile.head_dim, memory.states, queue.stream);
}

template <class C>
constexpr KernelRow decode_row(DType dtype) {
  KernelRow row = forward_row<C>(dtype);
  row.pass = Pass::decode;
  row.max_query_rows = C::tile.tile_m;
  row.forward_bytes = decode_bytes<C>;
  row.forward = launch_decode<C>;
  return row;
}

// The six kernels of one head_dim.
template <ForwardTile kTile>
constexpr std::array<KernelRow, 6> decode_rows() {
  static_assert(kTile.packed && kTile.stages >= 2);
  return {decode_row<ForwardConfig<bf16, kTile, cuda::PlainScore>>(DType::bf16),
          decode_row<ForwardConfig<f16, kTile, cuda::PlainScore>>(DType::f16),
          decode_row<ForwardConfig<bf16, kTile, cuda::SoftcapScore>>(DType::bf16),
          decode_row<ForwardConfig<f16, kTile, cuda::SoftcapScore>>(DType::f16),
          decode_row<ForwardConfig<bf16, kTile, cuda::GeneralScore>>(DType::bf16),
          decode_row<ForwardConfig<f16, kTile, cuda::GeneralScore>>(DType::f16)};
}

}  // namespace heed::sm80
