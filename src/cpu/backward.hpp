// Backward, tiled: for a block of keys, dV += Pᵀ dO and dK += dSᵀ Q over all query tiles that see it,
// dQ = dS K for each of them.
//
// A task owns a chunk of keys of one key head, so dk and dv have one writer. dq is summed over a
// chunk's blocks in f32; where there are several blocks every chunk has its own partial dq, and a last
// pass adds the chunks in order. The number of chunks depends on the shape alone, so the sums do not
// depend on the workers.
#pragma once

#include "cpu/forward.hpp"

namespace heed::cpu::inline HEED_ISA {

template <class C>
class BackwardKernel {
  using Isa = typename C::Isa;
  using Element = typename C::Element;
  using Word = typename C::Word;
  using Operand = typename C::Operand;

 public:
  static constexpr bool kTiles = ByTiles<Operand>;
  static constexpr int kTile = kTiles ? 192 : 96;  // queries and keys of one step
  static constexpr int kBlock = 768;               // keys whose panels and gradients stay in cache
  static constexpr int kGroups = kTile / C::kMicroRows;
  static constexpr int kLds = kTile + 16;
  static constexpr int kLdw =
      (kTile + 16 * Operand::kDepth) / Operand::kDepth;  // words of a row of dS
  // Rows whose scores are computed at a time: by tiles, they are read again while they are in L1.
  static constexpr int kRowsOfS = kTiles ? C::kMicroRows : kTile;
  static constexpr int kLdt = kTile / 2 + 16;  // words of a row of Pᵀ or dSᵀ, by tiles
  static_assert(kTile % C::kMicroRows == 0 && kTile % C::kPanel == 0 && kBlock % kTile == 0);

  HEED_BASELINE static std::size_t bytes(const Plan& plan, const BackwardProblem& b) {
    return BackwardKernel(plan, b, WorkspaceLayout()).bytes_;
  }

  static Status launch(const Plan& plan, const BackwardProblem& b, Workspace workspace,
                       Queue queue) {
    BackwardKernel(plan, b, WorkspaceLayout(workspace)).run(executor_of(queue));
    return {};
  }

 private:
  struct Scratch {
    Word *q_rows, *dout_rows;      // A operands: panels of kMicroRows rows
    Word *q_panels, *dout_panels;  // B operands: panels of kPanel columns
    float *s, *dp;                 // scores then P; dP then dS
    Word *p_words, *ds_words;      // pairs along the queries, by tiles transposed, or s and dp
    Word* ds_rows;                 // pairs along the keys, or dp itself
    float *kept, *slope;           // of one row: dropout mask, slope of the softcap
    float* dq;
    Word *k_columns, *v_columns, *k_panels;  // of the block: Kᵀ, Vᵀ and K
    float *dk, *dv;
  };
  struct Carved {
    Scratch scratch;
    std::size_t bytes;
  };

  HEED_BASELINE BackwardKernel(const Plan& plan, const BackwardProblem& problem,
                               WorkspaceLayout layout)
      : b_(problem),
        p_(problem.forward),
        transform_{problem.forward},
        workers_(plan.workers),
        qk_words_(words_of<C>(p_.q.head_dim())),
        v_words_(words_of<C>(p_.v.head_dim())),
        qk_columns_(padded_columns<C>(p_.q.head_dim())),
        v_columns_(padded_columns<C>(p_.v.head_dim())) {
    // A gradient of a broadcast bias has several writers unless one task takes all it is shared by.
    const bool shared_batch = b_.dbias && p_.bias.shape[0] == 1;
    const bool shared_head = b_.dbias && p_.bias.shape[1] == 1;
    const std::int64_t entries = batch_entries(p_);
    task_entries_ = shared_batch ? entries : 1;
    task_heads_ = shared_head ? p_.k.heads() : 1;
    entry_tasks_ = task_entries_ == 0 ? 0 : entries / task_entries_;
    head_tasks_ = task_heads_ == 0 ? 0 : p_.k.heads() / task_heads_;
    const std::int64_t owners = std::max<std::int64_t>(1, entry_tasks_ * head_tasks_);
    cut_ = backward_cut(p_, kTile, owners);
    cut_.together = task_entries_;
    partial_ = cut_.chunks > 1 || cut_.most_keys() > kBlock;

    rows_ = p_.q.batch() * p_.q.heads() * p_.q.seqlen();
    delta_ = layout.add<float>(rows_);
    shares_ = layout.add<Share>(share_count(p_, cut_));
    if (partial_) partial_dq_ = layout.add<float>(cut_.chunks * rows_ * qk_columns_);
    scratch_bytes_ = carve(WorkspaceLayout()).bytes;
    scratch_ = layout.add<std::byte>(static_cast<std::int64_t>(scratch_bytes_) * workers_);
    bytes_ = layout.bytes();
  }

  HEED_BASELINE Carved carve(WorkspaceLayout layout) const {
    Scratch s;
    const std::int64_t tile_words = words_of<C>(kTile);
    const std::int64_t block = std::min(kBlock, cut_.most_keys());
    s.q_rows = layout.add<Word>(std::int64_t{kTile} * qk_words_ + Isa::kLanes);
    s.dout_rows = layout.add<Word>(std::int64_t{kTile} * v_words_ + Isa::kLanes);
    s.q_panels = layout.add<Word>(tile_words * qk_columns_);
    s.dout_panels = layout.add<Word>(tile_words * v_columns_);
    s.s = layout.add<float>(std::int64_t{kRowsOfS} * kLds);
    s.dp = layout.add<float>(std::int64_t{kRowsOfS} * kLds);
    if constexpr (C::kPairs) {
      constexpr std::int64_t kWords = kTiles ? kTile * kLdt : kTile / 2 * kLds;
      s.p_words = layout.add<Word>(kWords);
      s.ds_words = layout.add<Word>(kWords);
      s.ds_rows = layout.add<Word>(std::int64_t{kTile} * kLdw);
    } else {
      s.p_words = s.s;
      s.ds_words = s.ds_rows = s.dp;
    }
    s.kept = layout.add<float>(kTile);
    s.slope = layout.add<float>(kTile);
    s.dq = layout.add<float>(std::int64_t{kTile} * qk_columns_);
    s.k_columns = layout.add<Word>(block * qk_words_);
    s.v_columns = layout.add<Word>(block * v_words_);
    s.k_panels = layout.add<Word>(words_of<C>(block) * std::int64_t{qk_columns_});
    s.dk = layout.add<float>(block * qk_columns_);
    s.dv = layout.add<float>(block * v_columns_);
    return {s, layout.bytes()};
  }
  Scratch scratch(int worker) const {
    return carve(WorkspaceLayout({scratch_ + scratch_bytes_ * static_cast<std::size_t>(worker),
                                  scratch_bytes_}))
        .scratch;
  }

  void run(Executor& executor) {
    const std::int64_t entries = batch_entries(p_);
    order_shares(p_, cut_, shares_);
    const std::int64_t gaps = gap_tasks(p_);
    const std::int64_t lines =
        b_.dbias ? b_.dbias.shape[0] * b_.dbias.shape[1] * b_.dbias.shape[2] : 0;
    const std::int64_t tiles = ceil_div(longest(p_, &SequenceSlice::q), kTile);
    const std::int64_t row_tiles = entries * p_.q.heads() * tiles;
    const Stage before{gaps + lines + row_tiles, [&](std::int64_t task, int) {
                         if (task < gaps) return clear_gap(task);
                         task -= gaps;
                         if (task < lines) return clear_bias_line(task);
                         delta_rows(task - lines, tiles);
                       }};
    const TaskOrder order{shares_, share_count(p_, cut_), head_tasks_};
    const Stage chunks{order.tasks(), [&](std::int64_t task, int worker) {
                         [[maybe_unused]] const Tiles<Isa> unit;
                         const Scratch w = scratch(worker);
                         const TaskOrder::Task now = order.at(task);
                         const std::int64_t head0 = now.head * task_heads_;
                         for (int e = now.share.entry; e < now.share.entry + task_entries_; ++e)
                           for (std::int64_t h = head0; h < head0 + task_heads_; ++h)
                             run_chunk(w, slice_of(p_, e), h, now.share.chunk);
                       }};
    const std::int64_t sinks = b_.dsink != nullptr ? p_.q.heads() : 0;
    const Stage sums{sinks + (partial_ ? row_tiles : 0), [&](std::int64_t task, int worker) {
                       if (task < sinks) return add_sinks(task);
                       add_chunks(task - sinks, worker, tiles);
                     }};
    run_stages(executor, workers_, before, chunks, sums);
  }

  void clear_gap(std::int64_t task) const {
    const auto clear = [&](const TensorView& x, SideSlice SequenceSlice::* side) {
      for_gaps(p_, task, side, x.seqlen(), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t) zero_token<Element>(x, t);
      });
    };
    clear(b_.dq, &SequenceSlice::q);
    clear(b_.dk, &SequenceSlice::k);
    clear(b_.dv, &SequenceSlice::k);
  }

  void clear_bias_line(std::int64_t line) const {
    const TensorView& x = b_.dbias;
    auto* row = static_cast<float*>(x.data) + line / x.shape[2] / x.shape[1] * x.stride[0] +
                line / x.shape[2] % x.shape[1] * x.stride[1] + line % x.shape[2] * x.stride[2];
    for (std::int64_t c = 0; c < x.shape[3]; ++c) row[c * x.stride[3]] = 0.f;
  }

  // Tile `task` of the query rows of all heads of all entries, `tiles` of the longest.
  struct RowTile {
    SequenceSlice at;
    std::int64_t head;
    int row0, end;
  };
  RowTile row_tile(std::int64_t task, std::int64_t tiles) const {
    const std::int64_t entry = task / tiles / p_.q.heads();
    const SequenceSlice at = slice_of(p_, static_cast<int>(entry));
    const int row0 = static_cast<int>(task % tiles) * kTile;
    return {at, task / tiles % p_.q.heads(), row0, std::min(row0 + kTile, at.q.length)};
  }

  // delta = rowsum(dout ∘ out) - dlse
  void delta_rows(std::int64_t task, std::int64_t tiles) const {
    const auto [at, head, row0, end] = row_tile(task, tiles);
    for (int r = row0; r < end; ++r) {
      const auto* out = row_of<Element>(ConstTensorView(p_.out), at.q, head, r);
      const auto* dout = row_of<Element>(b_.dout, at.q, head, r);
      const std::int64_t n = p_.v.head_dim();
      auto sum = Isa::broadcast(0.f);
      std::int64_t c = 0;
      for (; c + Isa::kLanes <= n; c += Isa::kLanes)
        sum = Isa::fma(Isa::load(out + c), Isa::load(dout + c), sum);
      float delta = Isa::reduce_add(sum);
      for (; c < n; ++c) delta += to_float(out[c]) * to_float(dout[c]);
      const std::int64_t i = lse_index(p_, at, static_cast<int>(head), r);
      if (b_.dlse != nullptr) delta -= b_.dlse[i];
      delta_[i] = delta;
    }
  }

  // The sink's gradient: -sum over rows of p_sink * delta.
  void add_sinks(std::int64_t head) const {
    double sum = 0;
    for (int entry = 0; entry < batch_entries(p_); ++entry) {
      const SequenceSlice at = slice_of(p_, entry);
      double of_entry = 0;
      for (int r = 0; r < at.q.length; ++r) {
        const std::int64_t i = lse_index(p_, at, static_cast<int>(head), r);
        if (p_.lse[i] != -kInfinity)
          of_entry -= std::exp(double{p_.sink[head]} - double{p_.lse[i]}) * double{delta_[i]};
      }
      sum += of_entry;
    }
    b_.dsink[head] = static_cast<float>(sum);
  }

  void run_chunk(const Scratch& w, const SequenceSlice& at, std::int64_t head, int chunk) const {
    if (!has_chunk(at, chunk)) return;
    const int begin = cut_.first_key(chunk);
    const int end = std::min(cut_.first_key(chunk + 1), at.k.length);
    const std::int64_t group = group_of(p_);
    int key0 = begin;
    do {
      const Span keys{key0, std::max(key0, std::min(key0 + kBlock, end))};
      if (!keys.empty()) pack_block(w, at, head, keys);
      for (std::int64_t h = head * group; h < (head + 1) * group; ++h)
        for (int row = 0; row < at.q.length; row += kTile)
          query_tile(w, at, h, row, keys, chunk, key0 == begin);
      if (!keys.empty()) store_block(w, at, head, keys);
      key0 += kBlock;
    } while (key0 < end);
  }

  // Whether an entry has keys in a chunk, and so a partial dq; the first one stands for an entry that
  // has none at all.
  bool has_chunk(const SequenceSlice& at, int chunk) const {
    return chunk == 0 || cut_.first_key(chunk) < at.k.length;
  }

  void pack_block(const Scratch& w, const SequenceSlice& at, std::int64_t head, Span keys) const {
    const int count = keys.end - keys.begin;
    const int padded = round_up(count, kTile);
    const auto k = [&](int i) { return key_row<Element>(p_, p_.k, at, head, keys.begin + i); };
    const auto v = [&](int i) { return key_row<Element>(p_, p_.v, at, head, keys.begin + i); };
    pack_transposed<Operand, C::kPanel>(k, count, static_cast<int>(p_.q.head_dim()), w.k_columns);
    pack_transposed<Operand, C::kPanel>(v, count, static_cast<int>(p_.v.head_dim()), w.v_columns);
    pack_natural<Operand>(k, count, padded, static_cast<int>(p_.q.head_dim()), w.k_panels,
                          std::int64_t{words_of<C>(padded)} * C::kPanel);
    std::fill_n(w.dk, std::int64_t{padded} * qk_columns_, 0.f);
    std::fill_n(w.dv, std::int64_t{padded} * v_columns_, 0.f);
  }

  void store_block(const Scratch& w, const SequenceSlice& at, std::int64_t head, Span keys) const {
    const float scale = scale_of(p_);
    for (int key = keys.begin; key < keys.end; ++key) {
      const std::int64_t i = key - keys.begin;
      store_row<Isa>(row_of<Element>(b_.dk, at.k, head, key), w.dk + i * qk_columns_,
                     p_.q.head_dim(), scale);
      store_row<Isa>(row_of<Element>(b_.dv, at.k, head, key), w.dv + i * v_columns_,
                     p_.v.head_dim(), dropout_scale(p_));
    }
  }

  void query_tile(const Scratch& w, const SequenceSlice& at, std::int64_t head, int row0,
                  Span keys, int chunk, bool first_block) const {
    const int rows = std::min(kTile, at.q.length - row0);
    RowLimits limits[kTile];
    Span seen{keys.end, keys.begin};
    for (int r = 0; r < rows; ++r) {
      limits[r] = row_limits(p_.band, at, p_.intervals, row0 + r);
      const Span live{std::max(limits[r].first, keys.begin), std::min(limits[r].end, keys.end)};
      if (live.empty()) continue;
      seen = {std::min(seen.begin, live.begin), std::max(seen.end, live.end)};
    }
    if (seen.empty()) {
      if (first_block) store_dq(w, at, head, row0, rows, chunk, true, /*empty=*/true);
      return;
    }
    const int qk_dim = static_cast<int>(p_.q.head_dim());
    const int v_dim = static_cast<int>(p_.v.head_dim());
    const auto q = [&](int r) { return row_of<Element>(p_.q, at.q, head, row0 + r); };
    const auto dout = [&](int r) { return row_of<Element>(b_.dout, at.q, head, row0 + r); };
    pack_rows<Operand>(q, rows, qk_dim, w.q_rows);
    pack_rows<Operand>(dout, rows, v_dim, w.dout_rows);
    pack_natural<Operand>(q, rows, kTile, qk_dim, w.q_panels, kPanelStride);
    pack_natural<Operand>(dout, rows, kTile, v_dim, w.dout_panels, kPanelStride);
    std::fill_n(w.dq, std::int64_t{kTile} * qk_columns_, 0.f);

    const int first = keys.begin + (seen.begin - keys.begin) / kTile * kTile;
    for (int key0 = first; key0 < seen.end; key0 += kTile)
      step(w, at, head, row0, rows, limits, keys, key0);
    store_dq(w, at, head, row0, rows, chunk, first_block, /*empty=*/false);
  }

  // One tile of queries against one tile of keys.
  void step(const Scratch& w, const SequenceSlice& at, std::int64_t head, int row0, int rows,
            const RowLimits* limits, Span keys, int key0) const {
    const int local = key0 - keys.begin;  // within the block
    const int columns = std::min(kTile, round_up(keys.end - key0, C::kPanel));
    const int groups = (rows + C::kMicroRows - 1) / C::kMicroRows;
    Span spans[kGroups];
    Span used_rows{kTile, 0};
    Span used_columns{kTile, 0};
    for (int g = 0; g < groups; ++g) {
      spans[g] = group_span<C>(group_keys<C>(limits, g * C::kMicroRows, rows, key0, columns));
      if (spans[g].empty()) continue;
      used_rows = {std::min(used_rows.begin, g * C::kMicroRows), (g + 1) * C::kMicroRows};
      used_columns = {std::min(used_columns.begin, spans[g].begin),
                      std::max(used_columns.end, spans[g].end)};
    }
    if (used_rows.empty()) return;
    for (int first = used_rows.begin / kRowsOfS * kRowsOfS; first < used_rows.end;
         first += kRowsOfS) {
      const int g = first / C::kMicroRows;
      const int end = std::min(first + kRowsOfS, used_rows.end);
      const int some = (end - first) / C::kMicroRows;
      product_columns<Operand>(w.q_rows + std::int64_t{first} * qk_words_,
                               w.k_columns + std::int64_t{local} * qk_words_, qk_words_, w.s, kLds,
                               spans + g, some, columns, nullptr);
      product_columns<Operand>(w.dout_rows + std::int64_t{first} * v_words_,
                               w.v_columns + std::int64_t{local} * v_words_, v_words_, w.dp, kLds,
                               spans + g, some, columns, nullptr);
      for (int r = std::max(first, used_rows.begin); r < end; ++r)
        gradient_row(w, at, head, row0, r, r < rows ? limits[r] : RowLimits{},
                     spans[r / C::kMicroRows], key0, w.s + (r - first) * kLds,
                     w.dp + (r - first) * kLds);
      if constexpr (kTiles) {
        transpose_words(w.s, used_columns, w.p_words + first / 2);
        transpose_words(w.dp, used_columns, w.ds_words + first / 2);
      } else if constexpr (C::kPairs) {
        for (int r = used_rows.begin; r < end; r += 2)
          for (int c = 0; c < kTile; c += Isa::kLanes) {
            const int at_row = (r - first) * kLds + c, at_word = r / 2 * kLds + c;
            Isa::store_zipped(w.p_words + at_word, Isa::load(w.s + at_row),
                              Isa::load(w.s + at_row + kLds));
            Isa::store_zipped(w.ds_words + at_word, Isa::load(w.dp + at_row),
                              Isa::load(w.dp + at_row + kLds));
          }
      }
    }
    add_keys(w.p_words, w.dout_panels, spans, groups, used_rows, used_columns,
             w.dv + std::int64_t{local} * v_columns_, v_columns_);
    add_keys(w.ds_words, w.q_panels, spans, groups, used_rows, used_columns,
             w.dk + std::int64_t{local} * qk_columns_, qk_columns_);
    const std::int64_t block_words = words_of<C>(round_up(keys.end - keys.begin, kTile));
    product_depth<Operand, kLdw, Update::add>(
        w.ds_rows, w.k_panels + std::int64_t{local} / Operand::kDepth * C::kPanel,
        block_words * C::kPanel, w.dq, qk_columns_, spans, groups, qk_columns_, nullptr, nullptr);
  }

  // out[keys] += Pᵀ dO, or dSᵀ Q, over the rows and columns of a tile that are used. By tiles, each
  // group of keys over the groups of rows that see it.
  void add_keys(const Word* words, const Word* panels, const Span* spans, int groups, Span rows,
                Span columns, float* out, int out_columns) const {
    if constexpr (kTiles) {
      Span depths[kGroups];
      for (int k = 0; k < kGroups; ++k) {
        Span depth{kTile, 0};
        for (int g = 0; g < groups; ++g)
          if (spans[g].begin <= k * C::kMicroRows && k * C::kMicroRows < spans[g].end)
            depth = {std::min(depth.begin, g * C::kMicroRows), (g + 1) * C::kMicroRows};
        depths[k] = depth;
      }
      product_depth<Operand, kLdt, Update::add>(words, panels, kPanelStride, out, out_columns,
                                                depths, kGroups, out_columns, nullptr, nullptr);
    } else {
      const Span keys{columns.begin / C::kMicroRows * C::kMicroRows,
                      round_up(columns.end, C::kMicroRows)};
      product_transposed<Operand, kLds>(words, panels, kPanelStride, out, out_columns, keys, rows,
                                        out_columns);
    }
  }

  // out[column][pair of rows] for kRowsOfS rows and some columns of floats.
  void transpose_words(const float* rows, Span columns, Word* out) const {
    constexpr int kLanes = Isa::kLanes;
    for (int c = columns.begin; c < columns.end; c += kLanes) {
      typename Isa::Vec square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const float* even = rows + 2 * i * kLds + c;
        square[i] = Isa::zipped(Isa::load(even), Isa::load(even + kLds));
      }
      transpose_steps<1>(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        Isa::store(reinterpret_cast<float*>(out) + (c + j) * kLdt, square[j]);
    }
  }

  // Turns row r of S and dP into P and dS, over the whole width of the tile: 0 where nothing is seen.
  void gradient_row(const Scratch& w, const SequenceSlice& at, std::int64_t head, int row0, int r,
                    RowLimits limits, Span span, int key0, float* s, float* dp) const {
    const int row = row0 + r;
    const Span live = live_columns(limits, key0, span);
    const std::int64_t i = live.empty() ? 0 : lse_index(p_, at, static_cast<int>(head), row);
    if (live.empty() || p_.lse[i] == -kInfinity) {
      span = {};
    } else {
      const bool capped = p_.score.softcap > 0.f;
      transform_.apply(s, capped ? w.slope : nullptr, span, live, at, head, row, key0);
      const bool dropped = p_.dropout.probability > 0.f;
      if (dropped) {
        dropout_mask(p_.dropout, at.entry, head, row, key0 + span.begin, span.end - span.begin,
                     w.kept + span.begin);
        apply_factors<Isa>(dp, w.kept, span, dropout_scale(p_));
      }
      softmax_gradient<Isa>(s, dp, span, transform_.factor(),
                            static_cast<float>(double{p_.lse[i]} * kLog2e), delta_[i]);
      if (dropped) apply_factors<Isa>(s, w.kept, span);
      if (b_.dbias) add_bias_gradient(dp, live, at, head, row, key0);
      if (capped) apply_factors<Isa>(dp, w.slope, span);
    }
    fill_outside(s, {0, kTile}, span, 0.f);
    fill_outside(dp, {0, kTile}, span, 0.f);
    to_words<Operand>(dp, w.ds_rows + r * kLdw, {0, kTile});
  }

  void add_bias_gradient(const float* ds, Span live, const SequenceSlice& at, std::int64_t head,
                         int row, int key0) const {
    const BiasRow to = bias_row(b_.dbias, at, head, row);
    float* out = static_cast<float*>(b_.dbias.data) + to.offset + key0 * to.column_stride;
    for (int c = live.begin; c < live.end; ++c) out[c * to.column_stride] += ds[c];
  }

  float* partial_row(int chunk, const SequenceSlice& at, std::int64_t head, int row) const {
    return partial_dq_ +
           (chunk * rows_ + lse_index(p_, at, static_cast<int>(head), row)) * qk_columns_;
  }

  // Hands on what w.dq holds of a query tile; `empty`: nothing was computed, the rows are 0.
  void store_dq(const Scratch& w, const SequenceSlice& at, std::int64_t head, int row0, int rows,
                int chunk, bool first_block, bool empty) const {
    if (empty) std::fill_n(w.dq, std::int64_t{rows} * qk_columns_, 0.f);
    for (int r = 0; r < rows; ++r) {
      const float* row = w.dq + std::int64_t{r} * qk_columns_;
      if (!partial_) {
        store_row<Isa>(row_of<Element>(b_.dq, at.q, head, row0 + r), row, p_.q.head_dim(),
                       scale_of(p_));
      } else {
        add_row(partial_row(chunk, at, head, row0 + r), row, first_block);
      }
    }
  }

  void add_row(float* to, const float* from, bool replace) const {
    for (int c = 0; c < qk_columns_; c += Isa::kLanes)
      Isa::store(to + c, replace ? Isa::load(from + c) : Isa::load(to + c) + Isa::load(from + c));
  }

  void add_chunks(std::int64_t task, int worker, std::int64_t tiles) const {
    const auto [at, head, row0, end] = row_tile(task, tiles);
    float* sum = scratch(worker).dq;
    for (int row = row0; row < end; ++row) {
      for (int chunk = 0; chunk < cut_.chunks && has_chunk(at, chunk); ++chunk)
        add_row(sum, partial_row(chunk, at, head, row), chunk == 0);
      store_row<Isa>(row_of<Element>(b_.dq, at.q, head, row), sum, p_.q.head_dim(),
                     scale_of(p_));
    }
  }

  static constexpr std::int64_t kPanelStride = std::int64_t{kTile / Operand::kDepth} * C::kPanel;

  const BackwardProblem& b_;
  const ForwardProblem& p_;
  const ScoreTransform<Isa> transform_;
  const int workers_;
  const int qk_words_, v_words_;      // words of one row of q or k, and of v or dout
  const int qk_columns_, v_columns_;  // head dims up to whole panels
  std::int64_t task_entries_ = 1;     // entries and key heads that one task takes in turn
  std::int64_t task_heads_ = 1;
  std::int64_t entry_tasks_ = 0;
  std::int64_t head_tasks_ = 0;
  Cut cut_;
  bool partial_ = false;
  std::int64_t rows_ = 0;  // query rows of all heads
  float* delta_ = nullptr;
  Share* shares_ = nullptr;
  float* partial_dq_ = nullptr;
  std::byte* scratch_ = nullptr;
  std::size_t scratch_bytes_ = 0;
  std::size_t bytes_ = 0;
};

template <class C>
constexpr KernelRow backward_row() {
  using Kernel = BackwardKernel<C>;
  return {.arch = C::Isa::kArch,
          .pass = Pass::backward,
          .dtype = C::kDType,
          .operand = C::kOperandDType,
          .tile_m = Kernel::kTile,
          .tile_n = Kernel::kTile,
          .max_head_dim = 512,
          .max_query_rows = 0,
          .forward_bytes = nullptr,
          .forward = nullptr,
          .backward_bytes = Kernel::bytes,
          .backward = Kernel::launch,
          .least_scores = Kernel::kTiles ? kLeastTileScoresBackward : 0};
}

}  // namespace heed::cpu::inline HEED_ISA
