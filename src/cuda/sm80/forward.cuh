// Forward attention on tensor cores of sm_80 and later: out = softmax(score(q k^T)) v, and its lse.
//
// One CTA owns tile_m query rows of one head of one entry; its warps own 16 kM rows each and share
// nothing but the tiles of keys. Every row's limits are computed once, into shared memory. Which
// tiles are visited and which of those are interior follows from the band in closed form, or where
// there are key intervals from the extremes of the limits.
//
//   copies   Q K(n)        V(n)       K(n-1)            V(n-1)      ...
//   warps          wait  S = Q K^T  wait  softmax, O += P V  wait  S = Q K^T ...
//
// K and V have one stage each: K(n-1) travels while P V(n) is computed, V(n) while S(n) is. Two
// CTAs per multiprocessor cover each other's waits. Registers: acc_o and acc_s, tile_m (head_dim +
// tile_n) / threads floats per thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/divisor.hpp"
#include "core/mask.hpp"
#include "core/schedule.hpp"
#include "core/softmax_state.hpp"
#include "cuda/common/combine.cuh"
#include "cuda/common/fill_gaps.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/score.cuh"
#include "cuda/host/launch.hpp"
#include "cuda/host/row.hpp"
#include "cuda/sm80/tiles.hpp"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/rowwise.cuh"
#include "registry.hpp"

namespace heed::sm80 {

template <class ElementType, ForwardTile kTile, class ScorePolicy>
struct ForwardConfig {
  using Element = ElementType;
  using Score = ScorePolicy;
  static constexpr ForwardTile tile = kTile;
  static constexpr int kThreads = 32 * tile.warps;
  static constexpr int kRowsPerWarp = tile.tile_m / (tile.warps / tile.key_warps);
  static constexpr int kKeysPerWarp = tile.tile_n / tile.key_warps;
  static constexpr int kM = kRowsPerWarp / 16;
  static constexpr int kPresent = tile.stages + 1;
  using Scores = tile::Accumulator<kM, kKeysPerWarp / 8>;
  using Out = tile::Accumulator<kM, tile.head_dim / 8>;

  struct Smem {
    tile::SharedTile<Element, tile.tile_m, tile.head_dim> q;  // later the output tile
    tile::SharedTile<Element, tile.tile_n, tile.head_dim> k[tile.stages];
    tile::SharedTile<Element, tile.tile_n, tile.head_dim> v[tile.stages];
    RowLimits limits[tile.tile_m];
    std::uint32_t present[kPresent]
                         [tile.tile_n / 32];  // which keys of tile n are there, at n % kPresent
    int extremes[4];                          // min first, max end, max first, min end
  };
  static_assert(kRowsPerWarp % 16 == 0 && tile.tile_n % 32 == 0 && kKeysPerWarp % 16 == 0);

  // First row and first key of a tile that the calling warp computes.
  static __device__ int warp_row() { return tile::warp() / tile.key_warps * kRowsPerWarp; }
  static __device__ int warp_key() { return tile::warp() % tile.key_warps * kKeysPerWarp; }
  static_assert(sizeof(Smem) <= 227 * 1024, "the tile does not fit in shared memory");
};

struct ForwardParams {
  ForwardProblem problem;                 // pointers are device pointers
  float scale;                            // > 0
  bool negative;                          // scores are -scale q k
  int m_tiles;                            // per entry
  ItemOrder order;                        // items are heads of all entries
  Divisor group;                          // query heads of one key head
  bool q_wide, k_wide, v_wide, out_wide;  // rows may be copied 16 bytes at a time
  // Packed rows only: keys are split, and each part leaves sums relative to its own maximum.
  Divisor heads_k, packed_tiles, splits;  // packed_tiles: of rows
  bool in_pairs;                          // the two parts are blocks of a cluster
  cuda::Parts parts;
};

// What a CTA computes, and the tiles of keys it visits: [begin, end), of which [interior_begin,
// interior_end) need no mask.
struct ForwardWork {
  SequenceSlice at;
  int head_k;
  int head;  // the first one
  int row0;  // first row of the tile; packed rows count (query row, head of the group)
  int rows;  // of this entry
  int split;
  TileRange tiles;
  // Keys outside are not read: what intervals or validity bits hide from every row may be anything,
  // and 0 times NaN is NaN.
  int load_begin, load_end;
  bool holes;  // keys between them may be missing
};

template <class C>
__device__ __forceinline__ cuda::Place place_of(const ForwardParams& p, const ForwardWork& work,
                                                int row) {
  if constexpr (C::tile.packed) return {row / p.group, work.head + row % p.group};
  return {row, work.head};
}

// Row `row` of the work item in a tensor laid out as q; nullptr: there is none.
template <class C, class Element, class View>
__device__ __forceinline__ Element* query_row(const ForwardParams& p, const ForwardWork& work,
                                              Element* first, const View& x, int row) {
  if (row >= work.rows) return nullptr;
  if constexpr (C::tile.packed) {
    const cuda::Place at = place_of<C>(p, work, row);
    return first + at.row * x.seqlen_stride() + (at.head - work.head) * x.head_stride();
  }
  return first + row * x.seqlen_stride();
}

// Keys that the tile's rows see, by reduction over their limits: some row [begin, end), every row
// the interior.
template <class C>
__device__ __forceinline__ TileRange reduce_limits(const ForwardParams& p, typename C::Smem& smem,
                                                   const ForwardWork& work) {
  if (threadIdx.x < 4) smem.extremes[threadIdx.x] = threadIdx.x % 3 == 0 ? INT_MAX : 0;
  __syncthreads();
  constexpr int kWholeWarps = (C::tile.tile_m + 31) / 32 * 32;
  for (int i = threadIdx.x; i < kWholeWarps; i += C::kThreads) {
    const bool exists = i < C::tile.tile_m && work.row0 + i < work.rows;
    const RowLimits r = exists ? smem.limits[i] : RowLimits{};
    const int first = __reduce_min_sync(~0u, r.first < r.end ? r.first : INT_MAX);
    const int end = __reduce_max_sync(~0u, r.end);
    const int all_first = __reduce_max_sync(~0u, r.first);
    const int all_end = __reduce_min_sync(~0u, exists ? r.end : INT_MAX);
    if (tile::lane() == 0) {
      atomicMin(&smem.extremes[0], first);
      atomicMax(&smem.extremes[1], end);
      atomicMax(&smem.extremes[2], all_first);
      atomicMin(&smem.extremes[3], all_end);
    }
  }
  __syncthreads();
  if (smem.extremes[1] == 0) return {};  // no row sees a key
  return {smem.extremes[0], smem.extremes[1], smem.extremes[2], smem.extremes[3]};
}

// Every row's limits, and from them the tiles to visit. Without intervals these follow from the
// band, and no thread waits for another.
template <class C>
__device__ __forceinline__ void find_limits(const ForwardParams& p, typename C::Smem& smem,
                                            ForwardWork& work) {
  const ForwardProblem& f = p.problem;
  for (int i = threadIdx.x; i < C::tile.tile_m; i += C::kThreads) {
    const int row = work.row0 + i;
    smem.limits[i] = row < work.rows
                         ? row_limits(f.band, work.at, f.intervals, place_of<C>(p, work, row).row)
                         : RowLimits{};
  }
  TileRange keys;
  if (f.intervals.rows == nullptr) {
    const int last = min_of(work.row0 + C::tile.tile_m, work.rows) - 1;
    keys = kv_range(f.band, place_of<C>(p, work, work.row0).row, place_of<C>(p, work, last).row + 1,
                    work.at.q.length, work.at.k.length);
  } else {
    keys = reduce_limits<C>(p, smem, work);
  }
  if (keys.end == 0) return;
  constexpr int kTileN = C::tile.tile_n;
  work.tiles = normalised({keys.begin / kTileN, ceil_div(keys.end, kTileN),
                           ceil_div(keys.interior_begin, kTileN),
                           C::Score::kLocal ? keys.interior_end / kTileN : 0});
  if constexpr (C::tile.packed) {
    const int per_split = (work.tiles.end - work.tiles.begin + p.splits.value - 1) / p.splits;
    const int begin = work.tiles.begin + work.split * per_split;
    work.tiles.end = min_of(begin + per_split, work.tiles.end);
    work.tiles.begin = begin;
  }
  const bool by_row = f.intervals.rows != nullptr || f.intervals.bits != nullptr;
  work.load_begin = by_row ? keys.begin : 0;
  work.load_end = by_row ? keys.end : work.at.k.length;
  work.holes = false;
  if (!cuda::may_have_holes(f)) return;
  work.holes = __syncthreads_or(cuda::any_missing(
      f, work.at, max_of(keys.begin, work.tiles.begin * kTileN),
      min_of(keys.end, work.tiles.end * kTileN), static_cast<int>(threadIdx.x), C::kThreads));
  if (work.holes) work.tiles.interior_end = work.tiles.interior_begin;
}

// Begins to copy one tile of K or V; a key that is not there is a row of zeros.
template <class C, class Tile>
__device__ __forceinline__ void load_keys(const ForwardParams& p, const ForwardWork& work,
                                          Tile& target,
                                          const cuda::KeyRows<typename C::Element>& rows, bool wide,
                                          int channels, int n_tile) {
  const int key0 = n_tile * C::tile.tile_n;
  if (wide && !work.holes && rows.pages == nullptr && key0 >= work.load_begin)
    return tile::load_block<C::kThreads>(target, rows.first + key0 * rows.stride, rows.stride,
                                         work.load_end - key0, channels);
  tile::load_rows<C::kThreads>(target, wide, channels, [&](int r) {
    const int key = key0 + r;
    const bool there = key >= work.load_begin && key < work.load_end &&
                       (!work.holes || key_valid(p.problem.intervals, work.at, key));
    return there ? rows.row(key) : nullptr;
  });
}

// Which keys of a tile are there, a bit each.
template <class C>
__device__ __forceinline__ void find_present(const ForwardParams& p, typename C::Smem& smem,
                                             const ForwardWork& work,
                                             const cuda::KeyRows<typename C::Element>& rows,
                                             int n_tile) {
  for (int word = tile::warp(); word < C::tile.tile_n / 32; word += C::tile.warps) {
    const int key = n_tile * C::tile.tile_n + 32 * word + tile::lane();
    const std::uint32_t bits = __ballot_sync(~0u, cuda::key_present(p.problem, work.at, rows, key));
    if (tile::lane() == 0) smem.present[n_tile % C::kPresent][word] = bits;
  }
}

// Scores of one tile become logits in log2 units (up to the policy's factor), -inf where hidden.
template <class C>
__device__ __forceinline__ void mask_and_transform(const ForwardParams& p, typename C::Smem& smem,
                                                   const ForwardWork& work,
                                                   const typename C::Score& score,
                                                   typename C::Scores& acc_s, int n_tile,
                                                   bool boundary) {
  const int warp_row = C::warp_row(), warp_key = C::warp_key();
  const int col0 = n_tile * C::tile.tile_n + warp_key;
  if (p.negative) tile::for_each(acc_s, [](int, int, float& x) { x = -x; });
  if constexpr (!C::Score::kScaled && C::Score::kLocal)
    tile::for_each(acc_s, [&](int, int, float& x) { x = score.value(x, {}, 0); });
  if (boundary) {
    tile::mask_rows(acc_s, smem.limits + warp_row, col0);
    if (work.holes) tile::mask_columns(acc_s, smem.present[n_tile % C::kPresent], warp_key);
  }
  if constexpr (!C::Score::kLocal)
    tile::for_each(acc_s, [&](int slot, int col, float& x) {
      if (x != -kInfinity)
        x = score.value(x, place_of<C>(p, work, work.row0 + warp_row + tile::slot_row(slot)),
                        col0 + col);
    });
}

// The epilogue: normalises, adds the sink, and writes out and lse of the warp's rows.
template <class C>
__device__ __forceinline__ void store_out(const ForwardParams& p, typename C::Smem& smem,
                                          const ForwardWork& work, typename C::Out& acc_o,
                                          const tile::RowSoftmax<C::kM>& softmax) {
  const ForwardProblem& f = p.problem;
  const int warp_row = C::warp_row();
  float factor[2 * C::kM];
#pragma unroll
  for (int slot = 0; slot < 2 * C::kM; ++slot) {
    const int row = work.row0 + warp_row + tile::slot_row(slot);
    const cuda::Place at = place_of<C>(p, work, row < work.rows ? row : 0);
    const float sink =
        f.sink == nullptr ? -kInfinity : f.sink[at.head] * static_cast<float>(kLog2e);
    const tile::RowResult result = tile::finish_row(softmax.state(slot), sink);
    factor[slot] = result.factor;
    if (f.lse != nullptr && row < work.rows && tile::lane() % 4 == 0)
      f.lse[lse_index(f, work.at, at.head, at.row)] = result.lse;
  }
  tile::scale_rows(acc_o, factor);
  __syncwarp();  // the warp alone read these rows of Q
  tile::store(smem.q, warp_row, acc_o);
  __syncwarp();
  auto* out = cuda::first_row<typename C::Element>(f.out, work.at.q, work.head);
  tile::store_rows(smem.q, warp_row, warp_row + C::kRowsPerWarp, p.out_wide,
                   static_cast<int>(f.v.head_dim()),
                   [&](int r) { return query_row<C>(p, work, out, f.out, work.row0 + r); });
}

// What a warp keeps from tile to tile, and what it needs to know of its keys.
template <class C>
struct Attention {
  using Element = typename C::Element;
  cuda::KeyRows<Element> k, v;
  typename C::Score score;
  bool active;  // packed tiles are mostly empty: warps without rows only copy
  typename C::Out acc_o;
  tile::RowSoftmax<C::kM> softmax;

  __device__ __forceinline__ Attention(const ForwardParams& p, const ForwardWork& work)
      : k(cuda::key_rows<Element>(p.problem, p.problem.k, work.at, work.head_k)),
        v(cuda::key_rows<Element>(p.problem, p.problem.v, work.at, work.head_k)),
        score(p.problem, work.at, p.scale),
        active(!C::tile.packed || work.row0 + C::warp_row() < work.rows) {
    acc_o.clear();
    softmax.clear();
  }

  __device__ __forceinline__ void load_q(const ForwardParams& p, typename C::Smem& smem,
                                         const ForwardWork& work) {
    const ConstTensorView& x = p.problem.q;
    const Element* q = cuda::first_row<const Element>(x, work.at.q, work.head);
    if constexpr (!C::tile.packed)
      if (p.q_wide)
        return tile::load_block<C::kThreads>(smem.q, q + work.row0 * x.seqlen_stride(),
                                             x.seqlen_stride(), work.rows - work.row0,
                                             static_cast<int>(x.head_dim()));
    tile::load_rows<C::kThreads>(smem.q, p.q_wide, static_cast<int>(x.head_dim()),
                                 [&](int r) { return query_row<C>(p, work, q, x, work.row0 + r); });
  }
  __device__ __forceinline__ void load_k(const ForwardParams& p, typename C::Smem& smem,
                                         const ForwardWork& work, int n, int stage) {
    load_keys<C>(p, work, smem.k[stage], k, p.k_wide, static_cast<int>(p.problem.k.head_dim()), n);
    if (work.holes) find_present<C>(p, smem, work, k, n);
  }
  __device__ __forceinline__ void load_v(const ForwardParams& p, typename C::Smem& smem,
                                         const ForwardWork& work, int n, int stage) {
    load_keys<C>(p, work, smem.v[stage], v, p.v_wide, static_cast<int>(p.problem.v.head_dim()), n);
  }

  // What is kept of P counts for what was dropped. P itself is only zeroed: 1 stays 1 in 16 bits.
  __device__ __forceinline__ void finish() {
    if constexpr (C::Score::kDrops) tile::scale(acc_o, score.kept);
  }

  // S becomes P, and acc_o is made relative to the maximum of P.
  __device__ __forceinline__ void normalise(const ForwardParams& p, typename C::Smem& smem,
                                            const ForwardWork& work, typename C::Scores& acc_s,
                                            int n) {
    const bool boundary = n < work.tiles.interior_begin || n >= work.tiles.interior_end;
    mask_and_transform<C>(p, smem, work, score, acc_s, n, boundary);
    if constexpr (C::Score::kScaled) {
      softmax.update(acc_s, score.factor, acc_o);
    } else {
      softmax.update(acc_s, 1.f, acc_o);
    }
    if constexpr (C::Score::kDrops)
      tile::for_each(acc_s, [&](int slot, int col, float& x) {
        const int row = work.row0 + C::warp_row() + tile::slot_row(slot);
        if (!score.keeps(place_of<C>(p, work, row), n * C::tile.tile_n + C::warp_key() + col))
          x = 0.f;
      });
  }
};

// One stage each: K(n - 1) travels while V(n) is used, V(n) while K(n) is.
template <class C>
__device__ __forceinline__ void attend(const ForwardParams& p, typename C::Smem& smem,
                                       const ForwardWork& work, Attention<C>& a) {
  int n = work.tiles.end - 1;
  if (n >= work.tiles.begin) {
    a.load_q(p, smem, work);
    a.load_k(p, smem, work, n, 0);
    ptx::cp_async_commit();
  }
#pragma unroll 1
  for (; n >= work.tiles.begin; --n) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // K(n) is here and V(n + 1) has been used
    a.load_v(p, smem, work, n, 0);
    ptx::cp_async_commit();
    typename C::Scores acc_s;
    acc_s.clear();
    tile::matmul_nt(acc_s, smem.q, C::warp_row(), smem.k[0]);  // S = Q K^T
    ptx::cp_async_wait<0>();
    __syncthreads();  // V(n) is here and K(n) has been used
    if (n > work.tiles.begin) {
      a.load_k(p, smem, work, n - 1, 0);
      ptx::cp_async_commit();
    }
    a.normalise(p, smem, work, acc_s, n);
    tile::matmul_nn<typename C::Element>(a.acc_o, tile::to_operand<typename C::Element>(acc_s),
                                         smem.v[0]);  // O += P V
  }
}

// Several stages: the next tiles travel while one is used.
template <class C>
__device__ __forceinline__ void attend_staged(const ForwardParams& p, typename C::Smem& smem,
                                              const ForwardWork& work, Attention<C>& a) {
  constexpr int kStages = C::tile.stages;
  const int count = work.tiles.end - work.tiles.begin;
  if (count <= 0) return;
  const auto load = [&](int i) {
    if (i < count) {
      a.load_k(p, smem, work, work.tiles.begin + i, i % kStages);
      a.load_v(p, smem, work, work.tiles.begin + i, i % kStages);
    }
    ptx::cp_async_commit();  // also an empty group, so that their number says which have arrived
  };
  a.load_q(p, smem, work);
  for (int i = 0; i < kStages - 1; ++i) load(i);
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // tile i is here and tile i - 1 has been used
    load(i + kStages - 1);
    if (!a.active) continue;
    typename C::Scores acc_s;
    acc_s.clear();
    tile::matmul_nt(acc_s, smem.q, C::warp_row(), smem.k[i % kStages], C::warp_key());
    a.normalise(p, smem, work, acc_s, work.tiles.begin + i);
    tile::matmul_nn<typename C::Element>(a.acc_o, tile::to_operand<typename C::Element>(acc_s),
                                         smem.v[i % kStages], C::warp_key());
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::tile.ctas)
    forward(const __grid_constant__ ForwardParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(shared);
  const int heads = static_cast<int>(p.problem.q.heads());
  const ItemTile block = p.order.at(static_cast<int>(blockIdx.x));
  ForwardWork work{};
  work.at = slice_of(p.problem, block.item / heads);
  work.head = block.item % heads;
  work.head_k = work.head / p.group;
  // The last rows of an entry see the most keys under a causal band: they begin first.
  work.row0 = (p.m_tiles - 1 - block.tile) * C::tile.tile_m;
  work.rows = work.at.q.length;
  if (work.row0 >= work.rows) return;
  find_limits<C>(p, smem, work);
  Attention<C> attention(p, work);
  attend<C>(p, smem, work, attention);
  attention.finish();
  store_out<C>(p, smem, work, attention.acc_o, attention.softmax);
}

// ---- host ----

template <class C>
ForwardParams forward_params(const Plan& plan, const ForwardProblem& f) {
  const cuda::Scale scale = cuda::scale_of(f);
  ForwardParams p{};
  p.problem = f;
  p.scale = scale.size;
  p.negative = scale.negative;
  p.m_tiles = static_cast<int>((max_seqlen_q(f) + C::tile.tile_m - 1) / C::tile.tile_m);
  p.order = ItemOrder(static_cast<int>(f.q.heads() * batch_entries(f)), items_in_l2(f), p.m_tiles,
                      least_last_blocks(f, std::int64_t{plan.workers} * C::tile.ctas));
  p.group = Divisor(f.k.heads() == 0 ? 1 : static_cast<int>(f.q.heads() / f.k.heads()));
  p.q_wide = is_wide(f.q);
  p.k_wide = is_wide(f.k);
  p.v_wide = is_wide(f.v);
  p.out_wide = is_wide(f.out);
  return p;
}

template <class C>
Status launch_forward(const Plan& plan, const ForwardProblem& f, Workspace, Queue queue) {
  if (Status s = cuda::fill_gaps_of_forward(f, queue.stream); !s.ok()) return s;
  const ForwardParams params = forward_params<C>(plan, f);
  return cuda::launch<forward<C>>({.blocks = std::int64_t{params.order.items} * params.m_tiles,
                                   .threads = C::kThreads,
                                   .smem_bytes = sizeof(typename C::Smem)},
                                  queue.stream, params);
}

template <class C>
constexpr KernelRow forward_row(DType dtype) {
  KernelRow row = cuda::row_of<C>(Arch::sm80, Pass::forward, dtype, C::tile.tile_m);
  row.forward_bytes = [](const Plan&, const ForwardProblem&) { return std::size_t{0}; };
  row.forward = launch_forward<C>;
  return row;
}

// The kernels of one head_dim and score policy.
template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> forward_rows() {
  constexpr ForwardTile kTile = tile_of(kForwardTiles, kHeadDim);
  return {forward_row<ForwardConfig<bf16, kTile, Score>>(DType::bf16),
          forward_row<ForwardConfig<f16, kTile, Score>>(DType::f16)};
}

}  // namespace heed::sm80
