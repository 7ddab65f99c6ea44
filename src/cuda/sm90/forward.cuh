// Forward attention on Hopper: out = softmax(score(q k^T)) v, and its lse.
//
// One CTA per multiprocessor computes one item after another: tile_m query rows of one head. Its
// first warpgroup brings what the others need, in two warps. The scheduler finds items: rows, the
// limits of each, the tiles of keys that they see. The loader copies tiles of Q, K and V by TMA.
// The other warpgroups consume: 64 rows each, both products by wgmma.
//
//   loader     K(n)  Q  V(n)  K(n-1)  V(n-1)  K(n-2) ...                  K  Q  V of the next item
//   consumer   S(n)  softmax | S(n-1)  O += P(n) V   | S(n-2)  O += P(n-1) V   | ... S  O += P(0) V
//                            |         softmax S(n-1)|         softmax S(n-2)  |       softmax S
//                            |                       |                         |           store O
//
// The next S and this P V are under way together, and the next S's softmax runs under this P V,
// from item to item too. Consumers begin their products one after the other, so that one's softmax
// runs under the other's products as well. tests/python/test_hopper_pipeline.py says who waits for
// whom.
#pragma once

#include <array>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "core/layout.hpp"
#include "core/mask.hpp"
#include "core/schedule.hpp"
#include "core/softmax_state.hpp"
#include "core/workspace.hpp"
#include "cuda/common/combine.cuh"
#include "cuda/common/fill_gaps.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/score.cuh"
#include "cuda/host/launch.hpp"
#include "cuda/host/row.hpp"
#include "cuda/host/tensor_map.hpp"
#include "cuda/sm90/tiles.hpp"
#include "cuda/tile/copy.cuh"
#include "cuda/tile/pipeline.cuh"
#include "cuda/tile/rowwise.cuh"
#include "cuda/tile/warpgroup.cuh"
#include "registry.hpp"

namespace heed::sm90 {

// An item, in shared memory.
template <int kConsumers>
struct ForwardWork {
  SequenceSlice at;
  int head, head_k;
  int split;
  int row0, rows;             // of the tile; may be less than the consumers have
  int begin, end;             // tiles of keys that are copied
  TileRange own[kConsumers];  // those that a consumer's rows see; the interior needs no mask
  RowLimits limits[64 * kConsumers];  // of every row
  // Keys outside may be anything in shared memory, and so may keys between them where there are
  // holes.
  int there_begin, there_end;
  bool holes;
  int whole_begin, whole_end;  // tiles without such keys
  bool last;                   // there is no such item
};

template <class ElementType, ForwardTile kTile, class ScorePolicy>
struct ForwardConfig {
  using Element = ElementType;
  using Score = ScorePolicy;
  static constexpr ForwardTile tile = kTile;
  static constexpr int kTileM = tile.tile_m();
  static constexpr int kThreads = 128 * (tile.consumers + 1);
  // Registers of a thread; 64 Ki in all.
  static constexpr int kProducerRegisters = tile.consumers == 3   ? 32
                                            : tile.head_dim > 192 ? 24
                                                                  : 40;
  static constexpr int kConsumerRegisters = tile.consumers == 3   ? 160
                                            : tile.head_dim > 192 ? 240
                                                                  : 232;
  static constexpr int kSoon = 3;  // tiles of keys, before whose copies the next item is taken

  using Work = ForwardWork<tile.consumers>;
  using QueryTile = tile::PanelTile<Element, 64 * tile.q_slots, tile.head_dim>;
  static constexpr int kQueryBytes = QueryTile::kLoadBytes / tile.q_slots;  // of a slot
  using KeyTile = tile::PanelTile<Element, tile.tile_n, tile.head_dim>;
  using ValueTile = tile::PanelTile<Element, tile.tile_n, tile.head_dim_v>;
  using OutTile = tile::PanelTile<Element, kTileM, tile.head_dim_v>;
  using Scores = tile::Accumulator<1, tile.tile_n / 8>;
  using Weights = tile::Operand<1, tile.tile_n / 16>;
  using Out = tile::Accumulator<1, tile.head_dim_v / 8>;

  struct Nothing {};
  template <int kFound>
  struct SmemOf {
    QueryTile q;
    KeyTile k[tile.stages];
    ValueTile v[tile.stages];
    [[no_unique_address]] std::conditional_t<tile.own_out, OutTile, Nothing> out;
    ptx::Barrier q_full[tile.q_slots], q_empty[tile.q_slots];
    ptx::Barrier k_full[tile.stages], k_empty[tile.stages];
    ptx::Barrier v_full[tile.stages], v_empty[tile.stages];
    ptx::Barrier work_full[kFound], work_soon[kFound], work_empty[kFound];
    Work work[kFound];
  };
  static constexpr std::size_t kMostSmem = 227 * 1024;
  static constexpr int kItems = sizeof(SmemOf<3>) <= kMostSmem ? 3 : 2;  // found and not finished
  using Smem = SmemOf<kItems>;
  static_assert(tile.head_dim_v <= tile.head_dim && tile.tile_n % 16 == 0);
  static_assert(tile.q_slots >= tile.consumers);
  static_assert(sizeof(Smem) <= kMostSmem, "the tile does not fit in shared memory");
};

struct ForwardParams {
  CUtensorMap q, k, v, out;
  ForwardProblem problem;  // pointers are device pointers
  float scale;             // > 0
  int m_tiles;             // per entry; packed: of all entries together
  ItemOrder order;         // items are heads of all entries; packed: heads
  Divisor heads;           // of queries
  Divisor group;           // query heads of one key head
  int boxes;               // copies per tile of keys: more than one with small pages
  bool out_bulk;           // the copy engine may write out
  bool out_wide;           // or threads may, 16 bytes at a time
  // Where CTAs would have nothing to do, keys are split, and each part leaves sums relative to its
  // own maximum.
  Divisor splits;
  cuda::Parts parts;
  int* counter;  // of items that CTAs took after their first; nullptr: no counting
};

// ---- scheduler ----

// Keys that 64 rows see: some row [begin, end), every row the interior.
__device__ __forceinline__ TileRange reduce_limits(const RowLimits* limits, int rows) {
  int first = INT_MAX, end = 0, all_first = 0, all_end = INT_MAX;
  for (int row = tile::lane(); row < min_of(rows, 64); row += 32) {
    const RowLimits r = limits[row];
    if (r.first < r.end) first = min_of(first, r.first);
    end = max_of(end, r.end);
    all_first = max_of(all_first, r.first);
    all_end = min_of(all_end, r.end);
  }
  first = __reduce_min_sync(~0u, first);
  end = __reduce_max_sync(~0u, end);
  all_first = __reduce_max_sync(~0u, all_first);
  all_end = __reduce_min_sync(~0u, all_end);
  return end == 0 ? TileRange{} : TileRange{first, end, all_first, all_end};
}

// Tiles of packed queries are numbered through all entries: those of an entry that begins at token
// t from t / tile_m + entry on. The entry that a number belongs to.
template <class C>
__device__ __forceinline__ int find_entry(const ForwardProblem& f, int m_tile) {
  const int total = static_cast<int>(f.q.seqlen());
  int found = 0;
  for (int entry = tile::lane(); entry < f.sequences.batch; entry += 32) {
    const int token = max_of(0, min_of(f.sequences.cu_seqlens_q[entry], total));
    if (token / C::kTileM + entry <= m_tile) found = entry;
  }
  return __reduce_max_sync(~0u, found);
}

// Item `index` of all; false: it has no rows.
template <class C>
__device__ __forceinline__ bool find_work(const ForwardParams& p, int index,
                                          typename C::Work& work) {
  constexpr int kTileN = C::tile.tile_n, kConsumers = C::tile.consumers;
  const ForwardProblem& f = p.problem;
  const int lane = tile::lane();
  const int unsplit = index / p.splits;
  const ItemTile block = p.order.at(unsplit);
  // The last rows of an entry see the most keys under a causal band: they begin first.
  const int m_tile = p.m_tiles - 1 - block.tile;
  const bool packed = f.q.rank == 3;
  const int entry = packed ? find_entry<C>(f, m_tile) : 0;
  const int row_of_heads = block.item / p.heads;  // packed: 0
  const SequenceSlice at = slice_of(f, packed ? entry : row_of_heads);
  const int before = packed ? static_cast<int>(at.q.token) / C::kTileM + entry : 0;
  // Before the first entry's first tile there is nothing.
  if (m_tile < before) return false;
  // Consumers without rows have none in the first tile, which sees the least keys under a causal
  // band; but not where tiles would then no longer end with tiles of keys.
  const int slabs = ceil_div(at.q.length, 64);
  const int idle = C::kTileM % kTileN == 0 ? 0 : round_up(slabs, kConsumers) - slabs;
  const int row_end = C::kTileM * (m_tile - before + 1) - 64 * idle;
  const int row0 = max_of(0, row_end - C::kTileM);
  const int rows = min_of(row_end, at.q.length) - row0;
  if (rows <= 0) return false;
  const int split = index - unsplit * p.splits.value;
  if (lane == 0) {
    work.at = at;
    work.head = block.item - row_of_heads * p.heads.value;
    work.head_k = work.head / p.group;
    work.split = split;
    work.row0 = row0;
    work.rows = rows;
  }
  for (int i = lane; i < C::kTileM; i += 32)
    work.limits[i] = i < rows ? row_limits(f.band, at, f.intervals, row0 + i) : RowLimits{};
  // Lane c finds what consumer c's rows see.
  TileRange keys;
  if (f.intervals.rows == nullptr) {
    const int first_row = row0 + 64 * lane;
    if (lane < kConsumers)
      keys = kv_range(f.band, first_row, min_of(first_row + 64, row0 + rows), at.q.length,
                      at.k.length);
  } else {
    __syncwarp();
    for (int c = 0; c < kConsumers; ++c) {
      const TileRange found = reduce_limits(work.limits + 64 * c, rows - 64 * c);
      if (lane == c) keys = found;
    }
  }
  const int end = __reduce_max_sync(~0u, keys.end);
  const int begin = end == 0 ? 0 : __reduce_min_sync(~0u, keys.end > 0 ? keys.begin : INT_MAX);
  const bool holes =
      cuda::may_have_holes(f) && __any_sync(~0u, cuda::any_missing(f, at, begin, end, lane, 32));
  const int first = begin / kTileN, steps = ceil_div(end, kTileN) - first;
  const int per_split = (steps + p.splits.value - 1) / p.splits;
  const int begin_tile = first + split * per_split;
  const int end_tile = max_of(begin_tile, min_of(begin_tile + per_split, ceil_div(end, kTileN)));
  if (lane < kConsumers) {
    TileRange own{max_of(begin_tile, keys.begin / kTileN),
                  min_of(end_tile, ceil_div(keys.end, kTileN)),
                  ceil_div(keys.interior_begin, kTileN), keys.interior_end / kTileN};
    if (keys.end == 0 || own.begin >= own.end) own = {begin_tile, begin_tile, 0, 0};
    if (holes) own.interior_end = own.interior_begin;
    work.own[lane] = own;
  }
  if (lane > 0) return true;
  work.begin = begin_tile;
  work.end = end_tile;
  // What intervals and bits hide from every row is not looked at. Behind the tensor's last row the
  // copy engine writes zeros.
  const bool by_row = f.intervals.rows != nullptr || f.intervals.bits != nullptr;
  const bool to_the_end = at.k.token + at.k.length == key_capacity(f);
  work.there_begin = by_row ? begin : 0;
  work.there_end = by_row ? end : at.k.length;
  work.holes = holes;
  work.whole_begin = ceil_div(work.there_begin, kTileN);
  work.whole_end = !by_row && to_the_end ? work.end : work.there_end / kTileN;
  if (holes) work.whole_end = work.whole_begin;
  return true;
}

// The CTA's item of a turn. Without a counter, turns go back and forth through the items, so that
// no CTA has the heaviest of every turn.
__device__ __forceinline__ int item_of(const ForwardParams& p, int turn) {
  const int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
  if (turn == 0 || p.counter == nullptr)
    return turn * ctas + (turn % 2 == 0 ? cta : ctas - 1 - cta);
  int taken = 0;
  if (tile::lane() == 0) taken = atomicAdd(p.counter, 1);
  return ctas + __shfl_sync(~0u, taken, 0);
}

template <class Work>
__device__ __forceinline__ ptx::BoxStart first_query(const Work& work, int consumer) {
  return {0, static_cast<int>(work.at.q.token) + work.row0 + 64 * consumer, work.head,
          static_cast<int>(work.at.q.batch)};
}

template <class C>
__device__ __forceinline__ void schedule(const ForwardParams& p, typename C::Smem& smem) {
  const int count = p.order.items * p.m_tiles * p.splits.value, ctas = static_cast<int>(gridDim.x);
  tile::PipelineState<C::kItems> at, before;
  bool counts = false;
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    smem.work_empty[at.stage].wait(at.phase ^ 1);
    // Who takes items no sooner than it needs them leaves more of them to others.
    if (counts) smem.work_soon[before.stage].wait(before.phase);
    const int item = item_of(p, turn);
    // Without a counter, items of other CTAs may follow one that is behind the last.
    const bool last = p.counter == nullptr ? turn * ctas >= count : item >= count;
    typename C::Work& work = smem.work[at.stage];
    if (!last && (item >= count || !find_work<C>(p, item, work))) continue;
    if (tile::lane() == 0) work.last = last;
    __syncwarp();
    if (tile::lane() == 0) smem.work_full[at.stage].arrive();
    __syncwarp();
    if (last) return;
    counts = p.counter != nullptr;
    // Items that are dealt out are found so early that their Q would only take room in L2.
    if (counts && tile::lane() < C::tile.consumers)
      C::QueryTile::prefetch(p.q, first_query(work, tile::lane()));
    before = at;
    at.advance();
  }
}

// ---- loader ----

// Copies a tile of K or V; every lane brings a box where there are several.
template <class Tile, class Work>
__device__ __forceinline__ void load_keys(const ForwardParams& p, const Work& work, Tile& target,
                                          const CUtensorMap& map, int n_tile, ptx::Barrier& full,
                                          ptx::Barrier& empty, int phase) {
  constexpr int kTileN = Tile::kRows;
  const ForwardProblem& f = p.problem;
  const int lane = tile::lane();
  empty.wait(phase ^ 1);
  if (lane == 0) full.arrive_and_expect(Tile::kLoadBytes);
  __syncwarp();
  if (lane >= p.boxes) return;
  if (f.paged.page_table == nullptr) {
    target.load(0, map,
                {0, static_cast<int>(work.at.k.token) + n_tile * kTileN, work.head_k,
                 static_cast<int>(work.at.k.batch)},
                full);
    return;
  }
  const int rows = kTileN / p.boxes, key = n_tile * kTileN + lane * rows;
  const int page_size = static_cast<int>(f.k.shape[1]), pages = static_cast<int>(f.k.shape[0]);
  int page = pages;  // none: zeros
  if (key < work.at.k.length) {
    page = f.paged.page_table[work.at.entry * f.paged.max_pages + key / page_size];
    if (page < 0 || page > pages) page = pages;
  }
  target.load(lane * rows, map, {0, key % page_size, work.head_k, page}, full);
}

template <class C>
__device__ __forceinline__ void load(const ForwardParams& p, typename C::Smem& smem) {
  tile::PipelineState<C::kItems> item;
  tile::PipelineState<C::tile.stages> at;
  tile::PipelineState<C::tile.q_slots> q_at;
#pragma unroll 1
  for (;; item.advance()) {
    smem.work_full[item.stage].wait(item.phase);
    const typename C::Work& work = smem.work[item.stage];
    if (work.last) return;
    int n = work.end;
    const int soon = min_of(n, work.begin + C::kSoon);
    const auto announce = [&] {
      if (n == soon && tile::lane() == 0) smem.work_soon[item.stage].arrive();
      __syncwarp();
    };
    announce();
    const auto load_k = [&] {
      load_keys(p, work, smem.k[at.stage], p.k, n, smem.k_full[at.stage], smem.k_empty[at.stage],
                at.phase);
    };
    // Stages are free earlier than Q: the first K goes before it.
    if (--n >= work.begin) load_k();
    if (tile::lane() == 0)
      for (int c = 0; c < C::tile.consumers; ++c) {
        smem.q_empty[q_at.stage].wait(q_at.phase ^ 1);
        smem.q_full[q_at.stage].arrive_and_expect(C::kQueryBytes);
        smem.q.load(64 * q_at.stage, p.q, first_query(work, c), smem.q_full[q_at.stage]);
        q_at.advance();
      }
    __syncwarp();
#pragma unroll 1
    while (n >= work.begin) {
      load_keys(p, work, smem.v[at.stage], p.v, n, smem.v_full[at.stage], smem.v_empty[at.stage],
                at.phase);
      at.advance();
      announce();
      if (--n >= work.begin) load_k();
    }
    __syncwarp();
    if (tile::lane() == 0) smem.work_empty[item.stage].arrive();
  }
}

// ---- consumer ----

// Named barriers: 1 to 3 say whose turn it is, 4 to 6 join a warpgroup.
template <int kConsumers>
struct Turns {
  static __device__ __forceinline__ void wait(int consumer) {
    if (consumer == 0) return ptx::named_sync<1, 256>();
    if (kConsumers == 2 || consumer == 1) return ptx::named_sync<2, 256>();
    ptx::named_sync<3, 256>();
  }
  static __device__ __forceinline__ void pass(int consumer) {
    if (consumer == kConsumers - 1) return ptx::named_arrive<1, 256>();
    if (kConsumers == 2 || consumer == 0) return ptx::named_arrive<2, 256>();
    ptx::named_arrive<3, 256>();
  }
};
__device__ __forceinline__ void sync_warpgroup(int consumer) {
  if (consumer == 0) return ptx::named_sync<4, 128>();
  if (consumer == 1) return ptx::named_sync<5, 128>();
  ptx::named_sync<6, 128>();
}

// A warpgroup, and what it keeps from tile to tile and from item to item.
template <class C>
struct Consumer {
  using Smem = typename C::Smem;
  using Work = typename C::Work;
  using Element = typename C::Element;
  static constexpr int kTileN = C::tile.tile_n;
  static constexpr bool kOwnSlot = C::tile.q_slots == C::tile.consumers;  // of queries, always

  const ForwardParams& p;
  Smem& smem;
  int index;                 // among the consumers
  bool first_thread;         // of the warpgroup
  tile::Descriptor q, k, v;  // of the consumer's slot of queries, or slot 0, and of stage 0
  tile::PipelineState<C::tile.stages> k_at, v_at;
  tile::PipelineState<C::kItems> item;        // at hand
  tile::PipelineState<C::tile.q_slots> q_at;  // the item's queries

  __device__ __forceinline__ Consumer(const ForwardParams& params, Smem& shared, int consumer)
      : p(params),
        smem(shared),
        index(consumer),
        first_thread(threadIdx.x % 128 == 0),
        q(shared.q.by_rows(kOwnSlot ? 64 * consumer : 0)),
        k(shared.k[0].by_rows()),
        v(shared.v[0].by_columns()),
        q_at{kOwnSlot ? 0 : consumer, 0} {
    if (index == C::tile.consumers - 1) pass_turn();
  }

  __device__ __forceinline__ void take_turn() { Turns<C::tile.consumers>::wait(index); }
  __device__ __forceinline__ void pass_turn() { Turns<C::tile.consumers>::pass(index); }
  // One thread for all: a product, a turn or sync_warpgroup() must stand between the warps' waiting
  // for what is given back and this. A warp that still waits when the next copy is complete takes
  // its phase for the one before, and waits for ever.
  __device__ __forceinline__ void release(ptx::Barrier& empty) {
    if (first_thread) empty.arrive();
  }
  // First row of the warp within the tile.
  __device__ __forceinline__ int warp_row() const {
    return 64 * index + static_cast<int>(threadIdx.x) % 128 / 32 * 16;
  }

  __device__ __forceinline__ int q_slot() const { return kOwnSlot ? index : q_at.stage; }
  __device__ __forceinline__ void wait_for_queries() { smem.q_full[q_slot()].wait(q_at.phase); }
  // S = Q K^T, by the next tile of keys.
  __device__ __forceinline__ void begin_scores(typename C::Scores& acc_s) {
    smem.k_full[k_at.stage].wait(k_at.phase);
    take_turn();
    tile::begin_matmul_nt<typename C::QueryTile, typename C::KeyTile>(
        acc_s, kOwnSlot ? q : q + q_at.stage * (64 * C::QueryTile::kRowBytes),
        k + k_at.stage * static_cast<int>(sizeof(typename C::KeyTile)));
  }
  __device__ __forceinline__ void end_scores() {
    release(smem.k_empty[k_at.stage]);
    k_at.advance();
  }
  // Behind the last scores of an item.
  __device__ __forceinline__ void end_queries() {
    release(smem.q_empty[q_slot()]);
    q_at.template advance_by<C::tile.consumers>();
  }
  // O += P V
  __device__ __forceinline__ void begin_out(typename C::Out& acc_o,
                                            const typename C::Weights& weights) {
    smem.v_full[v_at.stage].wait(v_at.phase);
    tile::begin_matmul_nn<typename C::ValueTile>(
        acc_o, weights, v + v_at.stage * static_cast<int>(sizeof(typename C::ValueTile)));
  }
  __device__ __forceinline__ void end_out() {
    release(smem.v_empty[v_at.stage]);
    v_at.advance();
  }

  // Lets a tile of keys, or of values, pass that only other consumers' rows see.
  __device__ __forceinline__ void skip_keys() {
    smem.k_full[k_at.stage].wait(k_at.phase);
    take_turn();
    pass_turn();
    end_scores();
  }
  __device__ __forceinline__ void skip_values() {
    smem.v_full[v_at.stage].wait(v_at.phase);
    sync_warpgroup(index);
    end_out();
  }
  __device__ __forceinline__ void skip(int count) {
#pragma unroll 1
    for (; count > 0; --count) {
      skip_keys();
      skip_values();
    }
  }

  __device__ __forceinline__ bool is_there(const Work& work, int key) const {
    if (key < work.there_begin || key >= work.there_end) return false;
    if (!work.holes) return true;
    const auto rows = cuda::key_rows<Element>(p.problem, p.problem.k, work.at, work.head_k);
    return cuda::key_present(p.problem, work.at, rows, key);
  }

  __device__ __forceinline__ void mask_holes(const Work& work, int n,
                                             typename C::Scores& acc_s) const {
    constexpr int kWords = (kTileN + 31) / 32;
    std::uint32_t words[kWords];
#pragma unroll
    for (int word = 0; word < kWords; ++word)
      words[word] = __ballot_sync(~0u, is_there(work, n * kTileN + 32 * word + tile::lane()));
    tile::mask_columns(acc_s, words, 0);
  }

  // Words of shared memory that are asked for behind the beginning of a product wait for it; before
  // it, two consumers would wait for their turns the longer.
  static constexpr bool kAsksFirst = C::tile.consumers == 3;
  __device__ __forceinline__ bool is_whole(const Work& work, int n) const {
    return n >= work.whole_begin && n < work.whole_end;
  }
  // 0 times whatever stands in V for a key that is not there must be 0: clears those rows of tile
  // n.
  __device__ __forceinline__ void clear_missing(const Work& work, int n) {
    if (n >= work.whole_begin && n < work.whole_end) [[likely]]
      return;
    smem.v_full[v_at.stage].wait(v_at.phase);
    typename C::ValueTile& tile = smem.v[v_at.stage];
    for (int row = static_cast<int>(threadIdx.x) % 128; row < kTileN; row += 128) {
      if (is_there(work, n * kTileN + row)) continue;
      for (int chunk = 0; chunk < C::ValueTile::kChunks; ++chunk)
        *reinterpret_cast<uint4*>(tile.chunk(row, chunk)) = uint4{0, 0, 0, 0};
    }
    ptx::fence_async_proxy();
    sync_warpgroup(index);
  }

  // Scores of tile n become weights relative to the rows' maxima. Whether what was summed before is
  // to be multiplied by `factor`.
  __device__ __forceinline__ bool normalise(const Work& work, TileRange tiles, int n,
                                            typename C::Scores& acc_s, tile::RowSoftmax<1>& softmax,
                                            float (&factor)[2]) {
    const typename C::Score score(p.problem, work.at, p.scale);
    float scale = 1.f;
    if constexpr (C::Score::kScaled)
      scale = score.factor;
    else
      tile::for_each(acc_s, [&](int, int, float& x) { x = score.value(x, {}, 0); });
    if (n < tiles.interior_begin || n >= tiles.interior_end) {
      tile::mask_rows(acc_s, work.limits + warp_row(), n * kTileN);
      if (work.holes) [[unlikely]]
        mask_holes(work, n, acc_s);
    }
    const bool raised = softmax.raise(acc_s, scale, factor);
    softmax.exponentiate(acc_s, scale);
    return raised;
  }

  // From here on a row that is not there never grows, so the warp's rescaling does not depend on
  // what it holds.
  __device__ __forceinline__ void freeze_missing_rows(const Work& work,
                                                      tile::RowSoftmax<1>& softmax) const {
#pragma unroll
    for (int slot = 0; slot < 2; ++slot)
      if (warp_row() + tile::slot_row(slot) >= work.rows) softmax.max[slot] = kInfinity;
  }

  // Tiles of keys that the warpgroup lets pass between those that it sees in two items: at most so
  // many, since the copies of the next item wait for them.
  static constexpr int kMostBetween = C::tile.stages - 2;
  // Of the item at hand, behind those that the warpgroup sees.
  __device__ __forceinline__ int tiles_left() const {
    const Work& work = smem.work[item.stage];
    // The same in every lane, and the compiler knows it.
    return __shfl_sync(~0u, work.own[index].begin - work.begin, 0);
  }
  // Of `next`, before those that the warpgroup sees; where it sees none, more than kMostBetween.
  __device__ __forceinline__ int tiles_before(const Work& next) const {
    const TileRange tiles = next.own[index];
    const bool sees = !next.last && tiles.begin < tiles.end;
    return __shfl_sync(~0u, sees ? next.end - tiles.end : kMostBetween + 1, 0);
  }

  // The item at hand, whose rows see keys, and those that follow it: an item's first scores are
  // under way together with the last product of the item before.
  __device__ __forceinline__ void attend() {
    TileRange tiles = smem.work[item.stage].own[index];
    int n = tiles.end - 1;
    typename C::Scores acc_s;
    typename C::Out acc_o;
    tile::RowSoftmax<1> softmax;
    float factor[2];
    acc_o.clear();
    softmax.clear();
    begin_scores(acc_s);
    pass_turn();
    tile::wait_matmul<0>(acc_s);
    end_scores();
    if (n == tiles.begin) end_queries();
    normalise(smem.work[item.stage], tiles, n, acc_s, softmax, factor);
    auto weights = tile::to_operand<Element>(acc_s);
    freeze_missing_rows(smem.work[item.stage], softmax);
#pragma unroll 1
    for (;;) {
#pragma unroll 1
      for (; n > tiles.begin; --n) {
        const bool whole = kAsksFirst && is_whole(smem.work[item.stage], n);
        begin_scores(acc_s);
        if (!whole) clear_missing(smem.work[item.stage], n);
        begin_out(acc_o, weights);
        pass_turn();
        tile::wait_matmul<1>(acc_s);
        end_scores();
        if (n - 1 == tiles.begin) end_queries();
        const bool raised = normalise(smem.work[item.stage], tiles, n - 1, acc_s, softmax, factor);
        tile::wait_matmul<0>(acc_o);
        end_out();
        weights = tile::to_operand<Element>(acc_s);
        if (raised) tile::scale_rows(acc_o, factor);
      }
      clear_missing(smem.work[item.stage], n);
      // The next item may not be found before this one's last tiles are let pass.
      int between = tiles_left();
      if (!C::tile.chained || between > kMostBetween) break;
      auto next = item;
      next.advance();
      smem.work_full[next.stage].wait(next.phase);
      between += tiles_before(smem.work[next.stage]);
      if (between > kMostBetween) break;
      const int stage = item.stage;
      item = next;
      tiles = smem.work[item.stage].own[index];
      n = tiles.end - 1;
      if (kMostBetween > 0 && between > 0) skip_keys();
      wait_for_queries();
      begin_scores(acc_s);
      begin_out(acc_o, weights);
      pass_turn();
      tile::wait_matmul<1>(acc_s);
      end_scores();
      if (n == tiles.begin) end_queries();
      const tile::RowSoftmax<1> before = softmax;
      softmax.clear();
      normalise(smem.work[item.stage], tiles, n, acc_s, softmax, factor);
      tile::wait_matmul<0>(acc_o);
      end_out();
      if (kMostBetween > 0 && between > 0) skip_values();
      weights = tile::to_operand<Element>(acc_s);
      leave(stage, acc_o, before);
      acc_o.clear();
      freeze_missing_rows(smem.work[item.stage], softmax);
    }
    begin_out(acc_o, weights);
    tile::wait_matmul<0>(acc_o);
    end_out();
    skip(tiles.begin - smem.work[item.stage].begin);
    leave(item.stage, acc_o, softmax);
    next_item();
  }

  // Rows of the warpgroup that are all there leave by the copy engine, without a thread waiting.
  __device__ __forceinline__ void store_tile(const Work& work, const typename C::Out& acc_o) {
    if (first_thread) ptx::wait_stores_read();
    sync_warpgroup(index);  // the tile before has left
    tile::store_matrices(smem.out, warp_row(), acc_o);
    ptx::fence_async_proxy();
    sync_warpgroup(index);
    if (first_thread) {
      smem.out.store(64 * index, p.out, first_query(work, index));
      ptx::store_commit();
    }
  }

  // Of a part of the keys: row 0 of the item's entry and head, among those of all parts.
  __device__ __forceinline__ std::int64_t first_part(const Work& work) const {
    const ForwardProblem& f = p.problem;
    return work.split * f.q.batch() * f.q.heads() * f.q.seqlen() +
           lse_index(f, work.at, work.head, 0);
  }

  // Normalises, adds the sink, and writes out and lse.
  __device__ __forceinline__ void store(const Work& work, typename C::Out& acc_o,
                                        const tile::RowSoftmax<1>& softmax) {
    const ForwardProblem& f = p.problem;
    const int rows = work.rows;
    const float sink =
        f.sink == nullptr ? -kInfinity : f.sink[work.head] * static_cast<float>(kLog2e);
    const tile::RowResult result[2] = {tile::finish_row(softmax.state(0), sink),
                                       tile::finish_row(softmax.state(1), sink)};
    tile::scale_rows(acc_o, {result[0].factor, result[1].factor});
    bool stored = false;
    if constexpr (C::tile.own_out) {
      stored = p.out_bulk && 64 * index + 64 <= rows;
      if (stored) store_tile(work, acc_o);
    }
    if (!stored) {
      Element* out = cuda::first_row<Element>(f.out, work.at.q, work.head);
      tile::store_global<Element>(
          acc_o, p.out_wide, static_cast<int>(f.v.head_dim()), [&](int slot) {
            const int row = warp_row() + tile::slot_row(slot);
            return row < rows ? out + (work.row0 + row) * f.out.seqlen_stride() : nullptr;
          });
    }
    if (f.lse == nullptr || tile::lane() % 4 > 0) return;
    for (int slot = 0; slot < 2; ++slot) {
      const int row = warp_row() + tile::slot_row(slot);
      if (row < rows) f.lse[lse_index(f, work.at, work.head, work.row0 + row)] = result[slot].lse;
    }
  }

  __device__ __forceinline__ void next_item() {
    item.advance();
    smem.work_full[item.stage].wait(item.phase);
  }
  __device__ __forceinline__ void end_item(int stage) {
    __syncwarp();
    if (tile::lane() == 0) smem.work_empty[stage].arrive();
  }

  __device__ __forceinline__ void leave(int stage, typename C::Out& acc_o,
                                        const tile::RowSoftmax<1>& softmax) {
    const Work& work = smem.work[stage];
    if (p.splits.value > 1) {
      const std::int64_t first = first_part(work) + work.row0;
      const int rows = work.rows;
      cuda::store_part(p.parts, acc_o, softmax, [&](int slot) {
        const int row = warp_row() + tile::slot_row(slot);
        return row < rows ? first + row : std::int64_t{-1};
      });
    } else {
      store(work, acc_o, softmax);
    }
    end_item(stage);
  }

  // Of rows that see no key. Short code rather than fast: a call of a function here, or another
  // copy of store(), costs every item.
  __device__ __forceinline__ void store_nothing(const Work& work) {
    const ForwardProblem& f = p.problem;
    const int end = min_of(warp_row() + 16, work.rows);
#pragma unroll 1
    for (int row = warp_row(); row < end; ++row) {
      if (p.splits.value > 1) {
        if (tile::lane() == 0) p.parts.states[first_part(work) + work.row0 + row] = {};
        continue;
      }
      Element* out = cuda::first_row<Element>(f.out, work.at.q, work.head) +
                     (work.row0 + row) * f.out.seqlen_stride();
#pragma unroll 1
      for (int col = tile::lane(); col < f.v.head_dim(); col += 32) out[col] = Element{};
      if (f.lse != nullptr && tile::lane() == 0)
        f.lse[lse_index(f, work.at, work.head, work.row0 + row)] =
            f.sink == nullptr ? -kInfinity : f.sink[work.head];
    }
  }

  __device__ __forceinline__ void run() {
    smem.work_full[item.stage].wait(item.phase);
#pragma unroll 1
    while (!smem.work[item.stage].last) {
      const Work& work = smem.work[item.stage];
      const TileRange tiles = work.own[index];
      wait_for_queries();
      skip(work.end - tiles.end);
      if (tiles.begin < tiles.end) {
        attend();
        continue;
      }
      sync_warpgroup(index);  // there may have been no tile to let pass
      end_queries();
      store_nothing(work);
      end_item(item.stage);
      next_item();
    }
    if constexpr (C::tile.own_out)
      if (first_thread) ptx::wait_stores_read();
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) forward(const __grid_constant__ ForwardParams p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& smem = *reinterpret_cast<typename C::Smem*>(shared);
  const int warpgroup = tile::warpgroup();
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&p.q, &p.k, &p.v}) ptx::prefetch(*map);
    for (int slot = 0; slot < C::tile.q_slots; ++slot) {
      smem.q_full[slot].init(1);
      smem.q_empty[slot].init(1);
    }
    for (int s = 0; s < C::tile.stages; ++s) {
      smem.k_full[s].init(1);
      smem.v_full[s].init(1);
      smem.k_empty[s].init(C::tile.consumers);
      smem.v_empty[s].init(C::tile.consumers);
    }
    for (int i = 0; i < C::kItems; ++i) {
      smem.work_full[i].init(1);
      smem.work_soon[i].init(1);
      smem.work_empty[i].init(4 * C::tile.consumers + 1);  // warps of consumers, and the loader
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    ptx::give_registers<C::kProducerRegisters>();
    const int warp = __shfl_sync(~0u, tile::warp(), 0);
    if (warp == 0) schedule<C>(p, smem);
    if (warp == 1) load<C>(p, smem);
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    Consumer<C>(p, smem, warpgroup - 1).run();
  }
}

// ---- host ----

// As ForwardParams.
template <class C>
std::int64_t m_tiles_of(const ForwardProblem& f) {
  if (f.q.rank == 3) return f.q.seqlen() / C::kTileM + batch_entries(f);
  return (f.q.seqlen() + C::kTileM - 1) / C::kTileM;
}
inline std::int64_t heads_of(const ForwardProblem& f) {
  return f.q.rank == 3 ? f.q.heads() : f.q.heads() * batch_entries(f);
}
template <class C>
std::int64_t item_count(const ForwardProblem& f) {
  return f.q.seqlen() == 0 ? 0 : m_tiles_of<C>(f) * heads_of(f);
}

// Where items differ and CTAs have several, who is done first takes the next one.
template <class C>
bool counts_items(const Plan& plan, const ForwardProblem& f) {
  return !items_alike(f) && plan.splits * item_count<C>(f) > plan.workers;
}

// Heads whose items are computed together. Items that are alike need no light ones to end with:
// then a head's are computed at one time, when its keys have just come to L2. So are those of short
// heads, whose heavy items all bring new keys and whose light ones mostly store: mixed, they ask
// memory for as much at any time.
template <class C>
int items_at_once(const Plan& plan, const ForwardProblem& f) {
  constexpr std::int64_t kShort = 4;  // tiles; measured on an H100: 2 to 4 % faster, with 8 slower
  const std::int64_t tiles = m_tiles_of<C>(f), wave = (plan.workers + tiles - 1) / tiles;
  const std::int64_t fit = items_in_l2(f);
  return static_cast<int>((items_alike(f) || tiles <= kShort) && wave < fit ? wave : fit);
}

struct ForwardMemory {
  cuda::Parts parts;
  int* counter;
};

template <class C>
ForwardMemory carve_forward(WorkspaceLayout& layout, const Plan& plan, const ForwardProblem& f) {
  ForwardMemory m{cuda::carve_parts(layout, f, plan.splits, C::tile.head_dim_v), nullptr};
  if (counts_items<C>(plan, f)) m.counter = layout.add<int>(1);
  return m;
}

template <class C>
std::size_t forward_bytes(const Plan& plan, const ForwardProblem& f) {
  WorkspaceLayout layout;
  carve_forward<C>(layout, plan, f);
  return layout.bytes();
}

template <class C>
Status launch_forward(const Plan& plan, const ForwardProblem& f, Workspace workspace, Queue queue) {
  if (!is_bulk(f))
    return {Code::invalid,
            "q, k or v stands elsewhere than the tensor of the plan, at no multiple of 16 bytes: "
            "plan again"};
  if (Status s = cuda::fill_gaps_of_forward(f, queue.stream); !s.ok()) return s;
  const std::int64_t items = item_count<C>(f);
  if (items == 0) return {};
  if (plan.splits * items > INT_MAX)
    return {Code::unsupported, "the problem has " + std::to_string(plan.splits * items) +
                                   " tiles of query rows, a GPU computes at most 2147483647 at "
                                   "once: split its batch"};
  const int page_size = f.paged.page_table == nullptr ? 0 : static_cast<int>(f.k.shape[1]);
  ForwardParams p{};
  p.problem = f;
  p.scale = cuda::scale_of(f).size;
  p.m_tiles = static_cast<int>(m_tiles_of<C>(f));
  p.order = ItemOrder(static_cast<int>(heads_of(f)), items_at_once<C>(plan, f), p.m_tiles,
                      least_last_blocks(f, plan.workers));
  p.heads = Divisor(static_cast<int>(f.q.heads()));
  p.group = Divisor(static_cast<int>(f.q.heads() / f.k.heads()));
  p.boxes = page_size > 0 && page_size < C::tile.tile_n ? C::tile.tile_n / page_size : 1;
  p.out_bulk = is_bulk(f.out);
  p.out_wide = is_wide(f.out);
  if (Status s = cuda::tensor_map(p.q, f.q, 64); !s.ok()) return s;
  if (Status s = cuda::tensor_map(p.k, f.k, C::tile.tile_n / p.boxes); !s.ok()) return s;
  if (Status s = cuda::tensor_map(p.v, f.v, C::tile.tile_n / p.boxes); !s.ok()) return s;
  if (p.out_bulk)
    if (Status s = cuda::tensor_map(p.out, f.out, 64); !s.ok()) return s;
  WorkspaceLayout layout(workspace);
  const ForwardMemory memory = carve_forward<C>(layout, plan, f);
  p.splits = Divisor(plan.splits);
  p.parts = memory.parts;
  p.counter = memory.counter;
  if (p.counter != nullptr) {
    const auto error = cudaMemsetAsync(p.counter, 0, sizeof(int), queue.stream);
    if (Status s = cuda::cuda_status(error, "memset"); !s.ok()) return s;
  }
  const std::int64_t blocks = plan.splits * items;
  if (Status s = cuda::launch<forward<C>>({.blocks = blocks < plan.workers ? blocks : plan.workers,
                                           .threads = C::kThreads,
                                           .smem_bytes = sizeof(typename C::Smem)},
                                          queue.stream, p);
      !s.ok() || plan.splits == 1)
    return s;
  return cuda::combine(f, plan.splits, memory.parts.out, C::tile.head_dim_v, memory.parts.states,
                       queue.stream);
}

template <class C>
constexpr KernelRow forward_row(DType dtype, int max_seqlen_k) {
  KernelRow row = cuda::row_of<C>(Arch::sm90, Pass::forward, dtype, C::kTileM);
  row.forward_bytes = forward_bytes<C>;
  row.forward = launch_forward<C>;
  row.ctas = 1;
  row.bulk = true;
  if (C::tile.head_dim_v < C::tile.head_dim) row.max_head_dim_v = C::tile.head_dim_v;
  row.max_seqlen_k = max_seqlen_k;
  return row;
}

// The kernels of one tile and score policy.
template <ForwardTile kTile, class Score>
constexpr std::array<KernelRow, 2> rows_of_tile(int max_seqlen_k = 0) {
  return {forward_row<ForwardConfig<bf16, kTile, Score>>(DType::bf16, max_seqlen_k),
          forward_row<ForwardConfig<f16, kTile, Score>>(DType::f16, max_seqlen_k)};
}

template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> forward_rows() {
  return rows_of_tile<tile_of(kForwardTiles, kHeadDim), Score>();
}

template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> forward_narrow_rows() {
  return rows_of_tile<tile_of(kNarrowForwardTiles, kHeadDim), Score>();
}

template <int kHeadDim, class Score>
constexpr std::array<KernelRow, 2> forward_short_rows() {
  return rows_of_tile<tile_of(kShortForwardTiles, kHeadDim), Score>(kShortSeqlen);
}

}  // namespace heed::sm90
