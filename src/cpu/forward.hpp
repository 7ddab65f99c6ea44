// Forward, tiled: S = Q Kᵀ for kTileM query rows and kTileN keys, softmax in place, O = factor O + P V.
//
// K and V are packed once per entry and key head, into the workspace (all heads, then all tiles) or,
// when there are enough short heads to keep every worker busy, by the worker that uses them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/workspace.hpp"
#include "cpu/executor.hpp"
#include "cpu/rowwise.hpp"
#include "cpu/schedule.hpp"
#include "registry.hpp"

namespace heed::cpu::inline HEED_ISA {

// What a kernel is made of: instruction set, tensor type, and the words its products take.
template <class IsaT, class ElementT>
struct Config {
  using Isa = IsaT;
  using Element = ElementT;
  static constexpr bool kPairs = Isa::kHasBf16Dot && std::is_same_v<Element, bf16>;
  using Pairs = std::conditional_t<HasTiles<Isa>, TileOperand<Isa>, Bf16Operand<Isa>>;
  using Operand = std::conditional_t<kPairs, Pairs, F32Operand<Isa>>;
  using Word = typename Operand::Word;
  static constexpr int kPanel = cpu::kPanel<Isa>;
  static constexpr int kMicroRows = Isa::kMicroRows;
  static constexpr DType kDType = std::is_same_v<Element, float>  ? DType::f32
                                  : std::is_same_v<Element, bf16> ? DType::bf16
                                                                  : DType::f16;
  static constexpr DType kOperandDType = kPairs ? DType::bf16 : DType::f32;
};

template <class C>
HEED_BASELINE constexpr int words_of(std::int64_t elements) {
  return depth_words<typename C::Operand>(elements);
}

template <class C>
HEED_BASELINE constexpr int padded_columns(std::int64_t columns) {
  return round_up(static_cast<int>(columns), C::kPanel);
}

// A tile's columns that some row of the group from `first` on sees.
template <class C>
Span group_keys(const RowLimits* limits, int first, int rows, int key0, int columns) {
  Span span{columns, 0};
  for (int r = first; r < std::min(first + C::kMicroRows, rows); ++r) {
    const Span live = live_columns(limits[r], key0, {0, columns});
    if (live.empty()) continue;
    span.begin = std::min(span.begin, live.begin);
    span.end = std::max(span.end, live.end);
  }
  return span.empty() ? Span{} : span;
}

// The same from the beginning of a panel to the end of a vector, or of the depth of a tile.
template <class C>
Span group_span(Span keys) {
  constexpr int kStep = std::max(C::Isa::kLanes, C::Operand::kDepthStep);
  return {keys.begin / C::kPanel * C::kPanel, round_up(keys.end, kStep)};
}

// The same up to whole steps of depth.
template <class C>
Span group_depth(Span keys) {
  constexpr int kStep = C::Operand::kDepthStep;
  return {keys.begin / kStep * kStep, round_up(keys.end, kStep)};
}

// Adds rows [begin, end) of one head, as far as the entry has them. A tensor without elements has no
// address that one could add to.
template <class Element, class View>
void add_rows(RowsAhead& ahead, const View& x, const SideSlice& at, std::int64_t head,
              std::int64_t begin, std::int64_t end) {
  const std::int64_t rows = std::min<std::int64_t>(end, at.length) - begin;
  if (rows <= 0 || x.head_dim() == 0) return;
  ahead.add(row_of<Element>(x, at, head, begin), x.seqlen_stride(), rows, x.head_dim());
}

// Out and lse of tokens that belong to no entry, as rows without keys have them; one of gap_tasks.
template <class Element>
void clear_gap(const ForwardProblem& p, std::int64_t task) {
  const std::int64_t seqlen = p.q.seqlen();
  for_gaps(p, task, &SequenceSlice::q, seqlen, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      zero_token<Element>(p.out, token);
      if (p.lse == nullptr) continue;
      for (std::int64_t head = 0; head < p.q.heads(); ++head)
        p.lse[(token / seqlen * p.q.heads() + head) * seqlen + token % seqlen] = -kInfinity;
    }
  });
}

// Normalises an accumulated row, the sink included, and writes it with its lse.
template <class C>
void store_output(const ForwardProblem& p, const SequenceSlice& at, std::int64_t head, int row,
                  const float* o, SoftmaxState state) {
  float weight = dropout_scale(p);
  if (p.sink != nullptr) {
    const SoftmaxState sink{static_cast<float>(double{p.sink[head]} * kLog2e),
                            p.sink[head] == -kInfinity ? 0.f : 1.f};
    const SoftmaxState merged = merge(state, sink);
    weight *= rescale(state.max, merged.max);  // what the row is worth beside the sink
    state = merged;
  }
  store_row<typename C::Isa>(row_of<typename C::Element>(p.out, at.q, head, row), o,
                             p.v.head_dim(), state.sum == 0.f ? 0.f : weight / state.sum);
  if (p.lse != nullptr)
    p.lse[lse_index(p, at, static_cast<int>(head), row)] = natural_lse(state);
}

template <class C>
class ForwardKernel {
  using Isa = typename C::Isa;
  using Element = typename C::Element;
  using Word = typename C::Word;

 public:
  static constexpr bool kTiles = ByTiles<typename C::Operand>;
  static constexpr int kTileM = kTiles ? 192 : 96;
  static constexpr int kTileN = kTiles ? 256 : 192;
  static constexpr int kChunk = kTiles ? 64 : kTileN;  // keys whose scores are computed at a time
  static constexpr int kPackedKeys = 256;              // of one task that packs
  static constexpr int kGroups = kTileM / C::kMicroRows;
  static constexpr int kRowsOfS = kTiles ? C::kMicroRows : kTileM;  // and of P
  static constexpr int kLds = kChunk + 16;  // floats per row of S: an odd number of lines
  static constexpr int kLdp =
      (kTileN + 16 * C::Operand::kDepth) / C::Operand::kDepth;  // words per row of P
  static_assert(kTileM % C::kMicroRows == 0 && kTileN % C::kPanel == 0 &&
                kPackedKeys % C::kPanel == 0);

  HEED_BASELINE static std::size_t bytes(const Plan& plan, const ForwardProblem& p) {
    return ForwardKernel(plan, p, WorkspaceLayout()).bytes_;
  }

  static Status launch(const Plan& plan, const ForwardProblem& p, Workspace workspace,
                       Queue queue) {
    ForwardKernel(plan, p, WorkspaceLayout(workspace)).run(executor_of(queue));
    return {};
  }

 private:
  using Statistics = RowStatistics<Isa, kTileM>;

  struct Scratch {
    Word* q;  // panels of kMicroRows rows
    float* s;
    Word* p;  // the words of S; S itself where they are floats
    float* o;
    float* kept;     // dropout mask of one row
    Word *k, *v;     // one head's panels, when workers pack for themselves
  };

  HEED_BASELINE ForwardKernel(const Plan& plan, const ForwardProblem& problem,
                              WorkspaceLayout layout)
      : p_(problem),
        transform_{problem},
        workers_(plan.workers),
        k_words_(words_of<C>(problem.q.head_dim())),
        v_columns_(padded_columns<C>(problem.v.head_dim())),
        k_capacity_(round_up(static_cast<int>(max_seqlen_k(problem)), C::kPanel)) {
    private_packs_ = forward_by_heads(p_, workers_);
    const std::int64_t per_key = k_words_;
    if (!private_packs_) {
      const std::int64_t keys = p_.k.rank == 3 && p_.sequences.cu_seqlens_k != nullptr
                                    ? p_.k.seqlen() + batch_entries(p_) * C::kPanel
                                    : batch_entries(p_) * k_capacity_;
      packed_k_ = layout.add<Word>(keys * p_.k.heads() * per_key);
      packed_v_ = layout.add<Word>(words_of<C>(keys * p_.k.heads() * v_columns_));
    }
    shares_ = layout.add<Share>(share_count(p_, {.tile = kTileM}));
    scratch_bytes_ = carve(WorkspaceLayout()).bytes;
    scratch_ = layout.add<std::byte>(static_cast<std::int64_t>(scratch_bytes_) * workers_);
    bytes_ = layout.bytes();
  }

  struct Carved {
    Scratch scratch;
    std::size_t bytes;
  };
  HEED_BASELINE Carved carve(WorkspaceLayout layout) const {
    Scratch s;
    s.q = layout.add<Word>(std::int64_t{kTileM} * k_words_ + Isa::kLanes);
    s.s = layout.add<float>(std::int64_t{kRowsOfS} * kLds);
    if constexpr (C::kPairs) {
      s.p = layout.add<Word>(std::int64_t{kRowsOfS} * kLdp);
    } else {
      s.p = s.s;
    }
    s.o = layout.add<float>(std::int64_t{kTileM} * v_columns_);
    s.kept = layout.add<float>(kTileN);
    const std::int64_t keys = private_packs_ ? k_capacity_ : 0;
    s.k = layout.add<Word>(keys * k_words_);
    s.v = layout.add<Word>(words_of<C>(keys * v_columns_));
    return {s, layout.bytes()};
  }
  Scratch scratch(int worker) const {
    return carve(WorkspaceLayout({scratch_ + scratch_bytes_ * static_cast<std::size_t>(worker),
                                  scratch_bytes_}))
        .scratch;
  }

  // First key of an entry's panels in the shared packs; entries never share a panel.
  std::int64_t pack_offset(const SequenceSlice& at, std::int64_t head) const {
    if (p_.sequences.cu_seqlens_k == nullptr)
      return (at.entry * p_.k.heads() + head) * k_capacity_;
    const std::int64_t keys = p_.k.seqlen() + batch_entries(p_) * C::kPanel;
    return head * keys + at.k.token / C::kPanel * C::kPanel + std::int64_t{at.entry} * C::kPanel;
  }

  // Keys of an entry, of one head, into its panels; `keys` begin with a panel.
  void pack(const SequenceSlice& at, std::int64_t head, Span keys, Word* k, Word* v) const {
    const int count = keys.end - keys.begin;
    const std::int64_t first = keys.begin;
    pack_transposed<typename C::Operand, C::kPanel>(
        [&](int i) { return key_row<Element>(p_, p_.k, at, head, keys.begin + i); }, count,
        static_cast<int>(p_.q.head_dim()), k + first * k_words_);
    pack_natural<typename C::Operand>(
        [&](int i) { return key_row<Element>(p_, p_.v, at, head, keys.begin + i); }, count,
        padded_columns<C>(count), static_cast<int>(p_.v.head_dim()),
        v + first / C::Operand::kDepth * C::kPanel,
        std::int64_t{words_of<C>(padded_columns<C>(at.k.length))} * C::kPanel);
  }

  void run(Executor& executor) {
    order_shares(p_, {.tile = kTileM}, shares_);
    if (private_packs_) {
      run_heads(executor);
    } else {
      run_tiles(executor);
    }
  }

  // A task is a key head, whose keys its worker packs for itself.
  void run_heads(Executor& executor) {
    const std::int64_t group = group_of(p_), gaps = gap_tasks(p_);
    const TaskOrder heads{shares_, batch_entries(p_), p_.k.heads()};
    parallel_for(executor, workers_, gaps + heads.tasks(), [&](std::int64_t task, int worker) {
      if (task < gaps) return clear_gap<Element>(p_, task);
      task -= gaps;
      const TaskOrder::Task now = heads.at(task);
      const SequenceSlice at = slice_of(p_, now.share.entry);
      const Scratch s = scratch(worker);
      pack(at, now.head, {0, at.k.length}, s.k, s.v);
      const std::int64_t turns = group * ceil_div(at.q.length, kTileM);
      std::int64_t turn = 0;
      for (std::int64_t h = now.head * group; h < (now.head + 1) * group; ++h)
        for (int row = 0; row < at.q.length; row += kTileM, ++turn) {
          RowsAhead ahead = rows_after(at, h, row, heads, task + workers_, turn, turns);
          tile(s, at, h, row, s.k, s.v, &ahead);
        }
    });
  }

  // A task is a tile of queries of a head, after all keys have been packed.
  void run_tiles(Executor& executor) {
    const std::int64_t group = group_of(p_), gaps = gap_tasks(p_);
    const TaskOrder parts{shares_, batch_entries(p_), p_.k.heads(),
                          ceil_div(longest(p_, &SequenceSlice::k), kPackedKeys)};
    const Stage packs{gaps + parts.tasks(), [&](std::int64_t task, int) {
                        if (task < gaps) return clear_gap<Element>(p_, task);
                        const TaskOrder::Task now = parts.at(task - gaps);
                        const SequenceSlice at = slice_of(p_, now.share.entry);
                        const int key = static_cast<int>(now.tile) * kPackedKeys;
                        const Span keys{key, std::min(key + kPackedKeys, at.k.length)};
                        if (keys.empty()) return;
                        pack(at, now.head, keys, k_panels(at, now.head), v_panels(at, now.head));
                      }};
    const TaskOrder order{shares_, batch_entries(p_), p_.q.heads(),
                          ceil_div(longest(p_, &SequenceSlice::q), kTileM)};
    const Stage tiles{order.tasks(), [&](std::int64_t task, int worker) {
                        const TaskOrder::Task now = order.at(task);
                        const SequenceSlice at = slice_of(p_, now.share.entry);
                        const std::int64_t row = now.tile * kTileM;
                        if (row >= at.q.length) return;
                        RowsAhead ahead;
                        if constexpr (kTiles) ahead = queries_after(order, task + workers_);
                        tile(scratch(worker), at, now.head, static_cast<int>(row),
                             k_panels(at, now.head / group), v_panels(at, now.head / group),
                             kTiles ? &ahead : nullptr);
                      }};
    run_stages(executor, workers_, packs, tiles);
  }

  // The rows of q of the tile that is probably the worker's next one. The vector kernels compute a
  // tile for so long that asking for them costs more than waiting.
  RowsAhead queries_after(const TaskOrder& tiles, std::int64_t next) const {
    RowsAhead ahead;
    if (next >= tiles.tasks()) return ahead;
    const TaskOrder::Task after = tiles.at(next);
    const std::int64_t row = after.tile * kTileM;
    add_rows<Element>(ahead, p_.q, slice_of(p_, after.share.entry).q, after.head, row,
                      row + kTileM);
    return ahead;
  }

  // What a worker that packs for itself needs after a tile: the next rows of q, and a part of the
  // keys and values of the head that is probably its next one.
  RowsAhead rows_after(const SequenceSlice& at, std::int64_t head, int row, const TaskOrder& heads,
                       std::int64_t next, std::int64_t turn, std::int64_t turns) const {
    RowsAhead ahead;
    if (row + kTileM < at.q.length)
      add_rows<Element>(ahead, p_.q, at.q, head, row + kTileM, row + 2 * kTileM);
    if (next >= heads.tasks()) return ahead;
    const TaskOrder::Task after = heads.at(next);
    const SequenceSlice then = slice_of(p_, after.share.entry);
    if (row + kTileM >= at.q.length)
      add_rows<Element>(ahead, p_.q, then.q, after.head * group_of(p_), 0, kTileM);
    if (p_.paged.page_table != nullptr) return ahead;
    const std::int64_t begin = then.k.length * turn / turns;
    const std::int64_t end = then.k.length * (turn + 1) / turns;
    add_rows<Element>(ahead, p_.k, then.k, after.head, begin, end);
    add_rows<Element>(ahead, p_.v, then.k, after.head, begin, end);
    return ahead;
  }

  Word* k_panels(const SequenceSlice& at, std::int64_t head) const {
    return packed_k_ + pack_offset(at, head) * k_words_;
  }
  Word* v_panels(const SequenceSlice& at, std::int64_t head) const {
    return packed_v_ + pack_offset(at, head) / C::Operand::kDepth * v_columns_;
  }

  // Rows of a head, what they see, and the panels of their keys.
  struct Tile {
    const Scratch& w;
    const SequenceSlice& at;
    std::int64_t head;
    int row0, rows, groups;
    const RowLimits* limits;
    RowLimits seen;  // by any of them
    const Word *k, *v;
  };
  // Rows that are needed after it are in `ahead`.
  void tile(const Scratch& w, const SequenceSlice& at, std::int64_t head, int row0, const Word* k,
            const Word* v, RowsAhead* ahead) const {
    [[maybe_unused]] const Tiles<Isa> tiles;
    RowLimits limits[kTileM];
    Tile t{w, at, head, row0, std::min(kTileM, at.q.length - row0), 0, limits, {at.k.length, 0},
           k, v};
    t.groups = ceil_div(t.rows, C::kMicroRows);
    for (int r = 0; r < t.rows; ++r) {
      limits[r] = row_limits(p_.band, at, p_.intervals, row0 + r);
      if (limits[r].first >= limits[r].end) continue;
      t.seen.first = std::min(t.seen.first, limits[r].first);
      t.seen.end = std::max(t.seen.end, limits[r].end);
    }
    pack_rows<typename C::Operand>(
        [&](int r) { return row_of<Element>(p_.q, at.q, head, row0 + r); }, t.rows,
        static_cast<int>(p_.q.head_dim()), w.q);
    std::fill_n(w.o, t.groups * C::kMicroRows * v_columns_, 0.f);

    if (ahead != nullptr) {
      add_rows<Element>(*ahead, p_.out, at.q, head, row0, row0 + t.rows);
      ahead->spread(std::int64_t{t.groups} * std::max(0, t.seen.end - t.seen.first) *
                    (k_words_ + v_columns_ / C::Operand::kDepth) / C::kPanel);
    }
    Statistics statistics;
    if constexpr (kTiles) {
      float sums[kTileM * Isa::kLanes] = {};
      for (int key0 = first_key(t); key0 < t.seen.end; key0 += kTileN)
        for (int g = 0; g < t.groups; ++g)
          group_step(t, g, key0, statistics, sums + g * C::kMicroRows * Isa::kLanes, ahead);
      for (int r = 0; r < t.rows; r += Isa::kLanes)
        add_lanes(sums + r * Isa::kLanes, statistics.sum + r);
    } else {
      for (int key0 = first_key(t); key0 < t.seen.end; key0 += kTileN)
        step(t, key0, statistics, ahead);
    }
    for (int r = 0; r < t.rows; ++r)
      store_output<C>(p_, at, head, row0 + r, w.o + std::int64_t{r} * v_columns_, statistics[r]);
  }

  static int first_key(const Tile& t) { return t.seen.first / C::kPanel * C::kPanel; }

  // All rows against kTileN keys.
  void step(const Tile& t, int key0, Statistics& statistics, RowsAhead* ahead) const {
    const int columns = std::min(kTileN, padded_columns<C>(t.at.k.length) - key0);
    Span spans[kGroups], depths[kGroups];
    for (int g = 0; g < t.groups; ++g) {
      const Span keys = group_keys<C>(t.limits, g * C::kMicroRows, t.rows, key0, columns);
      spans[g] = group_span<C>(keys);
      depths[g] = group_depth<C>(keys);
    }
    product_columns<typename C::Operand>(t.w.q, t.k + std::int64_t{key0} * k_words_, k_words_,
                                         t.w.s, kLds, spans, t.groups, columns, ahead);
    const bool dropped = p_.dropout.probability > 0.f;
    for (int g = 0; g < t.groups; ++g) {
      if (spans[g].empty()) continue;
      const Group group = group_of_rows(t, g);
      float* const s = t.w.s + group.first * kLds;
      Word* const p = t.w.p + group.first * kLdp;
      transform(t, group, spans[g], key0, s);
      for (int r = 0; r < group.rows; r += Isa::kLanes)
        softmax_rows<typename C::Operand>(
            s + r * kLds, kLds, group.first + r, std::min(group.rows - r, Isa::kLanes), spans[g],
            transform_.factor(), statistics, dropped ? nullptr : p + r * kLdp, kLdp);
      if (dropped) drop(t, group, spans[g], key0, s, p);
    }
    add_values<Update::scale_add>(t, key0, t.w.p, t.w.o, depths, t.groups, statistics.rescaled,
                                  ahead);
  }

  // Rows of a tile that products take together.
  struct Group {
    int first, rows;
  };
  static Group group_of_rows(const Tile& t, int g) {
    return {g * C::kMicroRows, std::min(C::kMicroRows, t.rows - g * C::kMicroRows)};
  }

  // One group of rows against kTileN keys, by tiles. Scores are written and read again at once,
  // while they are in L1, kChunk keys at a time. Maxima stay as they are until one has grown by
  // kSlack, which is rare; until then O is read and written once for all chunks. `sums`: of each
  // lane of each row, not yet added up.
  void group_step(const Tile& t, int g, int key0, Statistics& statistics, float* sums,
                  RowsAhead* ahead) const {
    const Group group = group_of_rows(t, g);
    const float factor = transform_.factor();
    const float unit = 1.f / factor;
    bool fresh = key0 == first_key(t);
    float* const s = t.w.s;
    float* const o = t.w.o + std::int64_t{group.first} * v_columns_;
    const bool dropped = p_.dropout.probability > 0.f;
    const int columns = std::min(kTileN, padded_columns<C>(t.at.k.length) - key0);
    const Span seen = group_span<C>(group_keys<C>(t.limits, group.first, t.rows, key0, columns));
    Span ready;  // columns of P that O still lacks
    const auto add_ready = [&] {
      add_values<Update::add>(t, key0, t.w.p, o, &ready, 1, nullptr, ahead);
      ready = {};
    };
    const RowLimits common = common_keys(t, group);
    for (int column = seen.begin; column < seen.end; column += kChunk) {
      const int width = std::min(kChunk, seen.end - column);
      const bool plain =
          transform_.plain && common.first <= key0 + column && key0 + column + width <= common.end;
      const Span span =
          plain ? Span{0, width}
                : group_span<C>(group_keys<C>(t.limits, group.first, t.rows, key0 + column, width));
      if (span.empty()) continue;
      product_columns<typename C::Operand>(t.w.q + std::int64_t{group.first} * k_words_,
                                           t.k + std::int64_t{key0 + column} * k_words_, k_words_,
                                           s, kLds, &span, 1, width, ahead);
      if (!plain) transform(t, group, span, key0 + column, s);
      const Span now{column + span.begin, column + span.end};
      if (ready.end != now.begin) add_ready();
      if (fresh) {
        fresh = false;
        for (int r = 0; r < group.rows; r += Isa::kLanes)
          take_maxima<Isa, Isa::kLanes>(s + r * kLds, kLds, group.first + r,
                                        std::min(group.rows - r, Isa::kLanes), span, factor,
                                        statistics);
      }
      Word* const p = t.w.p + column / C::Operand::kDepth;
      const auto exponentials_of = [&](Span live) __attribute__((always_inline)) {
        for (int r = 0; r < group.rows; ++r) {
          const int row = group.first + r;
          float* const sum = sums + r * Isa::kLanes;
          const auto compute = [&] {
            return exponentials<typename C::Operand>(s + r * kLds, dropped ? nullptr : p + r * kLdp,
                                                     live, Isa::broadcast(factor),
                                                     Isa::broadcast(statistics.shift[row]));
          };
          const auto most = lane_maxima<Isa>(s + r * kLds, live);
          if (Isa::any_greater(most, Isa::broadcast((statistics.max[row] + kSlack) * unit))) {
            if (!ready.empty()) add_ready();
            raise_maximum(statistics, row, most, o + std::int64_t{r} * v_columns_, sum);
          }
          Isa::store(sum, Isa::load(sum) + compute());
        }
      };
      if (plain && width == kChunk) {
        exponentials_of({0, kChunk});
      } else {
        exponentials_of(span);
      }
      if (dropped) drop(t, group, span, key0 + column, s, p);
      ready = {ready.empty() ? now.begin : ready.begin, now.end};
    }
    add_ready();
  }

  // Keys that every row of a group sees, none where validity bits may hide some.
  RowLimits common_keys(const Tile& t, Group group) const {
    if (p_.intervals.bits != nullptr) return {};
    RowLimits common = t.limits[group.first];
    for (int r = group.first; r < group.first + group.rows; ++r)
      common = {std::max(common.first, t.limits[r].first), std::min(common.end, t.limits[r].end)};
    return common;
  }

  // sum[r] = the sum of the lanes of row r, for kLanes rows.
  static void add_lanes(const float* lanes, float* sum) {
    using Vec = typename Isa::Vec;
    Vec rows[Isa::kLanes];
    for (int r = 0; r < Isa::kLanes; ++r) rows[r] = Isa::load(lanes + r * Isa::kLanes);
    Isa::store(sum, reduce_rows(rows, [](Vec a, Vec b) { return a + b; }));
  }

  // Takes the largest scores of a row into its maximum, and what it has accumulated along.
  void raise_maximum(Statistics& statistics, int row, typename Isa::Vec most, float* o,
                     float* sum) const {
    float lanes[Isa::kLanes];
    Isa::store(lanes, most);
    const float before = statistics.max[row];
    const float max =
        std::max(before, *std::max_element(lanes, lanes + Isa::kLanes) * transform_.factor());
    const float rescaled = rescale(before, max);
    statistics.max[row] = max;
    statistics.shift[row] = -max;
    scale_rows<Isa>(o, 0, 1, v_columns_, &rescaled);
    scale_rows<Isa>(sum, 0, 1, Isa::kLanes, &rescaled);
  }

  template <Update kUpdate>
  void add_values(const Tile& t, int key0, const Word* p, float* o, const Span* depths, int groups,
                  const float* factor, RowsAhead* ahead) const {
    const int padded = padded_columns<C>(t.at.k.length);
    product_depth<typename C::Operand, kLdp, kUpdate>(
        p, t.v + std::int64_t{key0} / C::Operand::kDepth * C::kPanel,
        std::int64_t{words_of<C>(padded)} * C::kPanel, o, v_columns_, depths, groups, v_columns_,
        factor, ahead);
  }

  // Scores of a group of rows, of which s is the first -> what the softmax takes.
  void transform(const Tile& t, Group group, Span span, int key0, float* s) const {
    for (int r = 0; r < group.rows; ++r)
      transform_.apply(s + r * kLds, nullptr, span,
                       live_columns(t.limits[group.first + r], key0, span), t.at, t.head,
                       t.row0 + group.first + r, key0);
  }
  void drop(const Tile& t, Group group, Span span, int key0, float* s, Word* p) const {
    for (int r = 0; r < group.rows; ++r, s += kLds, p += kLdp) {
      dropout_mask(p_.dropout, t.at.entry, t.head, t.row0 + group.first + r, key0 + span.begin,
                   span.end - span.begin, t.w.kept + span.begin);
      apply_factors<Isa>(s, t.w.kept, span);
      to_words<typename C::Operand>(s, p, span);
    }
  }

  static constexpr int kSlack = 8;  // powers of two: P stays below 2^8, sums below 2^8 seqlen_k

  const ForwardProblem& p_;
  const ScoreTransform<Isa> transform_;
  const int workers_;
  const int k_words_;     // words of one key
  const int v_columns_;   // head_dim_v, up to whole panels
  const int k_capacity_;  // keys of one entry, up to whole panels
  bool private_packs_ = false;
  Word* packed_k_ = nullptr;
  Word* packed_v_ = nullptr;
  Share* shares_ = nullptr;
  std::byte* scratch_ = nullptr;
  std::size_t scratch_bytes_ = 0;
  std::size_t bytes_ = 0;
};

template <class C>
constexpr KernelRow forward_row() {
  using Kernel = ForwardKernel<C>;
  return {.arch = C::Isa::kArch,
          .pass = Pass::forward,
          .dtype = C::kDType,
          .operand = C::kOperandDType,
          .tile_m = Kernel::kTileM,
          .tile_n = Kernel::kTileN,
          .max_head_dim = 512,
          .max_query_rows = 0,
          .forward_bytes = Kernel::bytes,
          .forward = Kernel::launch,
          .backward_bytes = nullptr,
          .backward = nullptr,
          .least_query_rows = Kernel::kTiles ? kLeastTileRows : 0,
          .least_scores = Kernel::kTiles ? kLeastTileScores : 0};
}

}  // namespace heed::cpu::inline HEED_ISA
