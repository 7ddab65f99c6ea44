// Few query rows against many keys: keys and values are read where they are, once for all query
// rows of a key head, in parts of the key range that are merged at the end.
#pragma once

#include "cpu/forward.hpp"

namespace heed::cpu::inline HEED_ISA {

// Rows of a block have their scores computed without reductions: a row is kSpread lanes, which are
// neighbouring words of depth, and neighbouring keys once these are added up.
template <class C, int kSpread>
class DecodeKernel {
  using Isa = typename C::Isa;
  using Vec = typename Isa::Vec;
  using Element = typename C::Element;
  using Word = typename C::Word;
  using Operand = typename C::Operand;

 public:
  static constexpr int kMaxRows = 64;
  // Up to which forward is slower, however few the keys. With fewer registers forward's products
  // pay sooner; the scalar set widens 16-bit elements one by one besides.
  static constexpr int kFewRows = Isa::kMicroRows >= 12 ? kMaxRows : Isa::kMicroRows > 4 ? 24 : 16;
  static constexpr bool kTiles = ByTiles<Operand>;
  static constexpr int kKeys = 128;      // keys of one step, at most
  static constexpr int kLeastKeys = 32;  // at least
  static_assert(kLeastKeys % C::kPanel == 0);
  static constexpr int kRowsOfShortSteps = kTiles ? 16 : 8;
  static constexpr int kLdp = kKeys / Operand::kDepth;  // words per row of P
  // kTogether rows x kWide accumulators: keys of S at a time, vectors of O at a time.
  static constexpr int kWide = Isa::kMicroRows >= 12 ? 4 : 2;
  static constexpr int kTogether = Isa::kMicroRows == 6 ? 6 : 4;
  // Words of depth, or of keys, of one turn of a product's loop of so many rows. Several of few
  // vectors, because the loop and what it asks memory for are a third of its instructions
  // otherwise; fewer where the rows are few, so that memory is asked for more evenly.
  static constexpr int turn_of(int rows) {
    return kWide > 2 || Operand::kDepth > 1 ? 1 : rows <= 2 ? 2 : 4;
  }
  static constexpr int kKeyGroup = std::max(4, Operand::kDepthStep);  // keys of a product
  // Keys are computed in multiples of it. One key costs less where its rows are few.
  static constexpr int key_group(int rows) {
    return rows <= 2 ? std::max(kWide, Operand::kDepthStep) : kKeyGroup;
  }
  // Rows of a block: two vectors where registers are few, so that a word of a key serves two
  // multiply-adds as in the packed products.
  static constexpr int kBlockVectors = Isa::kMicroRows >= 12 ? 1 : 2;
  static constexpr int kBlock = kBlockVectors * Isa::kLanes / kSpread;
  static_assert(kBlockVectors == 1 || !C::kPairs);  // words of P are zipped a vector at a time
  static_assert(kKeyGroup % kSpread == 0);
  // Where S, and P, of row `lane` of a block stands.
  static constexpr int at_of(int key, int lane) {
    return key / kSpread * kSpread * kBlock + lane * kSpread + key % kSpread;
  }
  // Keys of S, or vectors of O, at a time for so many rows: kWide sums of one or two rows would
  // wait for their own latency. More than four read memory in too many places at once.
  static constexpr int at_once(int rows) { return rows <= 2 ? 4 : kWide; }

  HEED_BASELINE static std::size_t bytes(const Plan& plan, const ForwardProblem& p) {
    return DecodeKernel(plan, p, WorkspaceLayout()).bytes_;
  }

  static void launch(const Plan& plan, const ForwardProblem& p, Workspace workspace, Queue queue) {
    DecodeKernel(plan, p, WorkspaceLayout(workspace)).run(executor_of(queue));
  }

 private:
  struct Scratch {
    Word* q;          // [task_heads_][rows][q_words_], padded to whole vectors
    Word* q_blocks;   // [task_heads_][blocks_][q_depth_ / kSpread][kBlock][kSpread]
    Word* k;          // [kWordKeys or kKeyGroup][q_words_]: keys that are not words in memory
    float* s_blocks;  // [blocks_][kKeys / kSpread][kBlock][kSpread], then their P in words
    Word* v;          // by tiles, [o_columns_ / kPanel][kKeys / 2][kPanel]: pairs of keys
    float* s;         // [rows][kKeys]
    Word* p;          // the words of S; S itself where they are floats
    float* o;         // [task_heads_][rows][o_columns_]
    Element* nothing;  // a row of zeros, which stands for keys and values that no row sees
    float* of_row;     // [kKeys] bias or dropout mask of one row
    RowStatistics<Isa, kMaxRows>* statistics;  // [task_heads_]
  };
  struct Carved {
    Scratch scratch;
    std::size_t bytes;
  };

  HEED_BASELINE DecodeKernel(const Plan& plan, const ForwardProblem& problem,
                             WorkspaceLayout layout)
      : p_(problem),
        transform_{problem},
        workers_(plan.workers),
        splits_(plan.splits),
        rows_(static_cast<int>(group_of(problem) * max_seqlen_q(problem))),
        o_rows_(kTiles ? blocks_of(rows_) * block_rows(rows_) : rows_),
        blocks_(blocks_of(rows_)),
        q_depth_(round_up(words_of<C>(problem.q.head_dim()), kSpread)),
        q_words_(round_up(q_depth_, Isa::kLanes)),
        o_columns_(round_up(static_cast<int>(problem.v.head_dim()), Isa::kLanes * kWide)) {
    const std::int64_t heads = p_.k.heads();
    const std::int64_t multiplications =
        max_seqlen_k(p_) / splits_ * rows_ * (p_.q.head_dim() + p_.v.head_dim());
    std::int64_t together = kLeastWork / std::max<std::int64_t>(multiplications, 1);
    // Where the heads of a token are neighbours in memory, so that whole pages are read.
    if (p_.k.head_stride() < p_.k.seqlen_stride())
      together = std::max(together, batch_entries(p_) * heads * splits_ / kTasks);
    task_heads_ = static_cast<int>(clamp64(together, 1, std::max<std::int64_t>(heads, 1)));
    head_tasks_ = (heads + task_heads_ - 1) / task_heads_;
    const std::int64_t parts =
        splits_ > 1 ? batch_entries(p_) * p_.k.heads() * splits_ * o_rows_ : 0;
    partial_o_ = layout.add<float>(parts * o_columns_);
    partial_state_ = layout.add<SoftmaxState>(parts);
    scratch_bytes_ = carve(WorkspaceLayout()).bytes;
    scratch_ = layout.add<std::byte>(static_cast<std::int64_t>(scratch_bytes_) * workers_);
    bytes_ = layout.bytes();
  }

  // Depends on the entry alone, so that its results do. With few rows short steps, whose keys and
  // values stay in L1 from the first rows to the last. With more rows they are read from L2 as
  // fast, and longer steps cost less.
  int keys_of_step(int rows) const {
    const std::int64_t key_bytes =
        (p_.k.head_dim() + p_.v.head_dim()) * static_cast<std::int64_t>(sizeof(Element));
    const std::int64_t most =
        (rows <= kRowsOfShortSteps ? 16 << 10 : 64 << 10) / std::max<std::int64_t>(key_bytes, 1);
    int step = kKeys;
    while (step > most && step > kLeastKeys) step /= 2;
    return step;
  }

  HEED_BASELINE Carved carve(WorkspaceLayout layout) const {
    Scratch s;
    s.q = layout.add<Word>(std::int64_t{task_heads_} * rows_ * q_words_);
    s.q_blocks = layout.add<Word>(std::int64_t{task_heads_} * block_words() + Isa::kLanes);
    s.k = layout.add<Word>(blocks_ == 0 ? 0 : std::max(kWordKeys, kKeyGroup) * q_words_);
    s.v = layout.add<Word>(kTiles ? kKeys / 2 * std::int64_t{o_columns_} : 0);
    s.s = layout.add<float>(std::int64_t{rows_} * kKeys);
    s.s_blocks = layout.add<float>(std::int64_t{blocks_} * kKeys * kBlock);
    if constexpr (C::kPairs) {
      s.p = layout.add<Word>(std::int64_t{o_rows_} * kLdp);
    } else {
      s.p = s.s;
    }
    s.o = layout.add<float>(std::int64_t{task_heads_} * o_rows_ * o_columns_);
    s.nothing = layout.add<Element>(std::max(p_.q.head_dim(), p_.v.head_dim()));
    s.of_row = layout.add<float>(kKeys);
    s.statistics = layout.add<RowStatistics<Isa, kMaxRows>>(task_heads_);
    return {s, layout.bytes()};
  }
  Scratch scratch(int worker) const {
    return carve(WorkspaceLayout({scratch_ + scratch_bytes_ * static_cast<std::size_t>(worker),
                                  scratch_bytes_}))
        .scratch;
  }

  void run(Executor& executor) {
    const std::int64_t heads = batch_entries(p_) * p_.k.heads();
    const std::int64_t gaps = gap_tasks(p_);
    const Stage parts{gaps + batch_entries(p_) * head_tasks_ * splits_,
                      [&](StageTasks& tasks, int worker) { compute_parts(tasks, gaps, worker); }};
    const Stage merges{splits_ > 1 ? heads : 0, [&](std::int64_t task, int worker) {
                         merge_parts(scratch(worker),
                                     slice_of(p_, static_cast<int>(task / p_.k.heads())),
                                     task % p_.k.heads());
                       }};
    run_stages(executor, workers_, parts, merges);
  }

  // Row r of a key head is query row r % seqlen_q of head r / seqlen_q of its group.
  std::int64_t head_of(const SequenceSlice& at, std::int64_t head, int r) const {
    return head * group_of(p_) + r / at.q.length;
  }

  std::int64_t part_index(const SequenceSlice& at, std::int64_t head, int split, int r) const {
    return ((at.entry * p_.k.heads() + head) * splits_ + split) * o_rows_ + r;
  }

  // A task: the query rows of key heads [head0, head_end) against one part of the keys.
  struct Part {
    SequenceSlice at;
    std::int64_t head0, head_end;
    int split;
    int rows;
    int step_keys;
    int first;  // key of the first step
    Span seen;  // keys
    RowLimits limits[kMaxRows];
    Span common[kMaxRows / kBlock];  // what all rows of a block see
  };
  void find_part(Part& part, std::int64_t task) const {
    part.at = slice_of(p_, static_cast<int>(task / splits_ / head_tasks_));
    part.head0 = task / splits_ % head_tasks_ * task_heads_;
    part.head_end = std::min(part.head0 + task_heads_, p_.k.heads());
    part.split = static_cast<int>(task % splits_);
    part.rows = static_cast<int>(group_of(p_)) * part.at.q.length;
    part.step_keys = keys_of_step(part.rows);
    const int length = part.at.k.length, steps = ceil_div(length, part.step_keys);
    const auto key_of = [&](int split) {
      return static_cast<int>(std::int64_t{steps} * split / splits_) * part.step_keys;
    };
    const int begin = key_of(part.split), end = std::min(length, key_of(part.split + 1));
    std::fill_n(part.common, kMaxRows / kBlock, Span{begin, end});
    part.seen = {end, begin};
    for (int r = 0; r < part.rows; ++r) {
      const RowLimits row = row_limits(p_.band, part.at, p_.intervals, r % part.at.q.length);
      part.limits[r] = {std::max(row.first, begin), std::min(row.end, end)};
      const auto [first_seen, end_seen] = part.limits[r];
      Span& all = part.common[r / kBlock];
      all = {std::max(all.begin, first_seen), std::min(all.end, end_seen)};
      if (first_seen >= end_seen) continue;
      part.seen = {std::min(part.seen.begin, first_seen), std::max(part.seen.end, end_seen)};
    }
    part.first = part.seen.begin / part.step_keys * part.step_keys;
  }

  // The parts that one worker takes. Each asks for the memory of the next one's first step during
  // its last, or the worker would wait for it.
  void compute_parts(StageTasks& tasks, std::int64_t gaps, int worker) const {
    while (tasks.task() < gaps) {
      clear_gap<Element>(p_, tasks.task());
      if (!tasks.finish()) return;
    }
    const Scratch w = scratch(worker);
    std::fill_n(w.nothing, std::max(p_.q.head_dim(), p_.v.head_dim()), Element{});
    Scratch own = w;
    Part parts[2];
    Block blocks[2];
    int part = 0, block = 0;
    find_part(parts[part], tasks.task() - gaps);
    find_rows(blocks[block], w.nothing, parts[part], parts[part].head0, parts[part].first);
    KeysAndValues runs = runs_of(blocks[block]);
    LinesAhead(runs).ask_all();
    do {
      const Part& now = parts[part];
      Part& then = parts[part ^= 1];
      [[maybe_unused]] const Tiles<Isa> tiles(block_rows(now.rows));
      begin_part(own, w, now);
      int key0 = now.first;
      do {
        const bool last_keys = key0 + now.step_keys >= now.seen.end;
        for (std::int64_t head = now.head0; head < now.head_end; ++head) {
          const Block& keys = blocks[block];
          Block& next = blocks[block ^= 1];
          if (head + 1 < now.head_end) {
            find_rows(next, w.nothing, now, head + 1, key0);
          } else if (!last_keys) {
            find_rows(next, w.nothing, now, now.head0, key0 + now.step_keys);
          } else if (tasks.has_next()) {
            find_part(then, tasks.next() - gaps);
            find_rows(next, w.nothing, then, then.head0, then.first);
          } else {
            next.live = next.strided = {};
          }
          take_head(own, w, now, head);
          step(own, now, head, keys, next, key0);
        }
        key0 += now.step_keys;
      } while (key0 < now.seen.end);
      end_part(own, w, now);
    } while (tasks.finish());
  }

  void begin_part(Scratch& own, const Scratch& w, const Part& part) const {
    const int in_blocks = rows_in_blocks(part.rows);
    for (std::int64_t head = part.head0; head < part.head_end; ++head) {
      take_head(own, w, part, head);
      for (int r = in_blocks; r < part.rows; ++r)
        load_words_of(query(part, head, r), own.q + r * q_words_);
      if constexpr (kSpread > 1) {
        pack_spread(own, part, head, in_blocks);
      } else {
        pack_transposed<Operand, kBlock>([&](int r) { return query(part, head, r); }, in_blocks,
                                         static_cast<int>(p_.q.head_dim()), own.q_blocks);
      }
      std::fill_n(own.o, std::int64_t{part.rows} * o_columns_, 0.f);
      *own.statistics = {};
    }
  }

  void pack_spread(const Scratch& w, const Part& part, std::int64_t head, int rows) const {
    for (int r = 0; r < round_up(rows, kBlock); ++r) {
      load_words_of(r < rows ? query(part, head, r) : nullptr, w.q);
      Word* const out =
          w.q_blocks + std::int64_t{r / kBlock} * q_depth_ * kBlock + r % kBlock * kSpread;
      for (int word = 0; word < q_depth_; word += kSpread)
        std::memcpy(out + word * kBlock, w.q + word, kSpread * sizeof(Word));
    }
  }

  void end_part(Scratch& own, const Scratch& w, const Part& part) const {
    for (std::int64_t head = part.head0; head < part.head_end; ++head) {
      take_head(own, w, part, head);
      for (int r = 0; r < part.rows; ++r) {
        const SoftmaxState state = (*own.statistics)[r];
        if (splits_ == 1) {
          store_output<C>(p_, part.at, head_of(part.at, head, r), r % part.at.q.length,
                          own.o + std::int64_t{r} * o_columns_, state);
        } else {
          partial_state_[part_index(part.at, head, part.split, r)] = state;
        }
      }
    }
  }

  // Makes `own` what of the scratch is the head's; where the keys are split, outputs are added up
  // where they are merged.
  void take_head(Scratch& own, const Scratch& w, const Part& part, std::int64_t head) const {
    const std::int64_t i = head - part.head0;
    own.q = w.q + i * rows_ * q_words_;
    own.q_blocks = w.q_blocks + i * block_words();
    own.o = splits_ == 1 ? w.o + i * o_rows_ * o_columns_
                         : partial_o_ + part_index(part.at, head, part.split, 0) * o_columns_;
    own.statistics = w.statistics + i;
  }

  // A row that sees nothing is 0: what it is multiplied by is not to be used.
  const Element* query(const Part& part, std::int64_t head, int r) const {
    const SequenceSlice& at = part.at;
    return part.limits[r].first >= part.limits[r].end
               ? nullptr
               : row_of<Element>(p_.q, at.q, head_of(at, head, r), r % at.q.length);
  }

  void load_words_of(const Element* row, Word* words) const {
    const int columns = static_cast<int>(p_.q.head_dim());
    int word = 0;
    if (row != nullptr)
      for (; (word + Isa::kLanes) * Operand::kDepth <= columns; word += Isa::kLanes)
        Isa::store(reinterpret_cast<float*>(words + word),
                   load_whole<Operand>(row + word * Operand::kDepth));
    for (; word < q_words_; word += Isa::kLanes)
      Isa::store(reinterpret_cast<float*>(words + word), load_words<Operand>(row, word, columns));
  }

  // Where the keys and values of one step stand. `live` are those that some row sees, up to whole
  // groups of keys; what of them cannot be seen is a row of zeros.
  struct Block {
    Span live;
    Span strided;  // keys whose rows are p_.k.seqlen_stride() apart
    const Element* k[kKeys];
    const Element* v[kKeys];
  };
  void find_rows(Block& block, const Element* nothing, const Part& part, std::int64_t head,
                 int key0) const {
    const SequenceSlice& at = part.at;
    const int group = key_group(part.rows);
    const Span keys{std::max(part.seen.begin - key0, 0),
                    std::min(part.seen.end - key0, part.step_keys)};
    block.live =
        keys.empty() ? Span{} : Span{keys.begin / group * group, round_up(keys.end, group)};
    block.strided = {};
    if (keys.empty()) return;
    for (int i = block.live.begin; i < keys.begin; ++i) block.k[i] = block.v[i] = nothing;
    for (int i = keys.end; i < block.live.end; ++i) block.k[i] = block.v[i] = nothing;
    // Looked up one by one, addresses take an eighth to a third of the time of few rows.
    if (p_.intervals.bits == nullptr && p_.paged.page_table == nullptr) {
      block.strided = keys;
      const Element* k = row_of<Element>(p_.k, at.k, head, key0 + keys.begin);
      const Element* v = row_of<Element>(p_.v, at.k, head, key0 + keys.begin);
      const std::int64_t k_stride = p_.k.seqlen_stride(), v_stride = p_.v.seqlen_stride();
      for (int i = keys.begin; i < keys.end; ++i) {
        block.k[i] = k + (i - keys.begin) * k_stride;
        block.v[i] = v + (i - keys.begin) * v_stride;
      }
      return;
    }
    for (int i = keys.begin; i < keys.end; ++i) {
      const Element* k = key_row<Element>(p_, p_.k, at, head, key0 + i);
      const Element* v = key_row<Element>(p_, p_.v, at, head, key0 + i);
      block.k[i] = k == nullptr ? nothing : k;
      block.v[i] = v == nullptr ? nothing : v;
    }
  }

  // Runs of bytes of a step: rows, or all rows where they are neighbours in memory.
  struct Runs {
    Runs(const Element* const* rows, const Block& block, std::int64_t columns, std::int64_t stride)
        : bytes(columns * static_cast<std::int64_t>(sizeof(Element))) {
      const Span span = block.strided.empty() ? block.live : block.strided;
      row = rows + span.begin;
      count = span.end - span.begin;
      if (!block.strided.empty() && stride == columns) {
        bytes *= count;
        count = 1;
      }
      if (count > 0) begin();
    }
    void begin() {
      line = reinterpret_cast<const char*>(*row);
      end = line + bytes;
    }
    // After the last run it begins again.
    void move_on(std::int64_t some) {
      line += some;
      if (line < end) return;
      if (count > 1) {
        --count;
        ++row;
      }
      begin();
    }

    const Element* const* row;
    std::int64_t bytes;
    const char* line = nullptr;
    const char* end = nullptr;
    int count;  // from here on
  };
  struct KeysAndValues {
    Runs keys, values;
  };
  KeysAndValues runs_of(const Block& block) const {
    return {{block.k, block, p_.k.head_dim(), p_.k.seqlen_stride()},
            {block.v, block, p_.v.head_dim(), p_.v.seqlen_stride()}};
  }

  // The lines of a step's keys and values, asked for a step before they are needed: in the order of
  // memory, one of keys and one of values by turns, and evenly over the turns that the products
  // take. Memory then works while the products do. In bursts the prefetches fill the queue of
  // misses, and the product stands still; in any other order the hardware does not see a stream.
  // They go to L2, which has room for more misses than L1.
  class LinesAhead {
   public:
    explicit LinesAhead(KeysAndValues& runs) : runs_(&runs), asks_(asks_of(runs)) {
      if (asks_ > 0) begin();
    }
    // Half of them, rounded up, over a product of so many turns.
    void spread(int turns) {
      due_ = 2 * std::max(turns, 1);
      left_ = due_ / 2;
    }
    // What takes the time of several turns counts as so many.
    [[gnu::always_inline]] void ask(int turns = 1) {
      for (left_ -= asks_ * turns; left_ <= 0; left_ += due_) ask_next();
    }
    void ask_all() {
      for (int i = 0; i < asks_; ++i) ask_next();
    }

   private:
    static constexpr int kLine = 64;
    static constexpr int kIntoL2 = 2;
    // Lines at the end of a step that nobody asks for, as if their misses told the hardware of the
    // stream: 1.07 to 1.11 times as fast from memory (EPYC of family 25 model 1, 1 to 8 rows).
    static constexpr int kLeft = 2;

    static int asks_of(const KeysAndValues& runs) {
      const auto lines = [](const Runs& some) {
        return some.count * static_cast<int>((some.bytes + kLine - 1) / kLine);
      };
      return std::max(std::max(lines(runs.keys), lines(runs.values)) - kLeft, 0);
    }
    [[gnu::always_inline]] void ask_next() {
      __builtin_prefetch(key_, 0, kIntoL2);
      __builtin_prefetch(key_ + to_value_, 0, kIntoL2);
      key_ += kLine;
      if (key_ >= end_) next_run();
    }
    // From here on a line of values is as far from one of keys, up to the end of either's run.
    void begin() {
      key_ = runs_->keys.line;
      to_value_ = runs_->values.line - key_;
      end_ = key_ + std::min(runs_->keys.end - key_, runs_->values.end - runs_->values.line);
    }
    void next_run() {
      asm("" : "+m"(*runs_));  // leaves the registers to the products
      const std::int64_t bytes = key_ - runs_->keys.line;
      runs_->keys.move_on(bytes);
      runs_->values.move_on(bytes);
      begin();
    }

    const char* key_ = nullptr;  // the next line of keys
    const char* end_ = nullptr;
    std::ptrdiff_t to_value_ = 0;
    KeysAndValues* runs_;
    int asks_;      // lines of each to ask for: what a turn pays
    int due_ = 1;   // what a line of each costs: the turns of both products
    int left_ = 1;  // to be paid before the next
  };

  void step(const Scratch& w, const Part& part, std::int64_t head, const Block& block,
            const Block& next, int key0) const {
    const SequenceSlice& at = part.at;
    const int rows = part.rows;
    RowStatistics<Isa, kMaxRows>& statistics = *w.statistics;
    const int keys = block.live.end - block.live.begin;
    const int blocks = blocks_of(rows);
    const int in_blocks = rows_in_blocks(rows);
    const int others = ceil_div(rows - in_blocks, kTogether);  // groups of rows
    KeysAndValues runs = runs_of(next);
    LinesAhead ahead(runs);
    if constexpr (kTiles) {
      score_tiles(w, block, ahead, blocks);
    } else {
      // A turn for each key and kChains words or a vector.
      ahead.spread(keys * (blocks * q_depth_ / (kChains * kSpread) +
                           others * ceil_div(q_words_, Isa::kLanes)));
      if (blocks > 0) score_blocks(w, block, blocks, ahead);
      for_groups(in_blocks, rows, [&](auto count, int r) {
        score_rows<decltype(count)::value>(w.q + r * q_words_, block, ahead, w.s + r * kKeys);
      });
    }
    for (int r = 0; r < in_blocks; r += kBlock)
      softmax_block(w, block, at, head, r, std::min(rows - r, kBlock), part.limits + r,
                    part.common[r / kBlock], key0);
    softmax_others(w, block, at, head, in_blocks, rows, part.limits, key0);
    if constexpr (kTiles) {
      value_tiles(w, block, ahead, rows, statistics.rescaled);
    } else {
      value_groups(w, block, ahead, rows, statistics.rescaled);
    }
  }

  // The scores of rows [first, rows), which stand by rows, become P.
  void softmax_others(const Scratch& w, const Block& block, const SequenceSlice& at,
                      std::int64_t head, int first, int rows, const RowLimits* limits,
                      int key0) const {
    const Span columns{block.live.begin / C::kPanel * C::kPanel,
                       round_up(block.live.end, C::kPanel)};
    const bool dropped = p_.dropout.probability > 0.f;
    for (int r = first; r < rows; ++r) {
      const bool biased{p_.bias};  // heads and rows are divisions
      transform_.apply(w.s + r * kKeys, nullptr, columns, live_columns(limits[r], key0, columns),
                       at, biased ? head_of(at, head, r) : 0, biased ? r % at.q.length : 0, key0);
    }
    for (int r = first; r < rows; r += Isa::kLanes)
      softmax_rows<Operand>(w.s + r * kKeys, kKeys, r, std::min(rows - r, Isa::kLanes), columns,
                            transform_.factor(), *w.statistics, dropped ? nullptr : w.p + r * kLdp,
                            kLdp);
    if (!dropped) return;
    for (int r = first; r < rows; ++r) {
      dropout_mask(p_.dropout, at.entry, head_of(at, head, r), r % at.q.length,
                   key0 + columns.begin, columns.end - columns.begin, w.of_row + columns.begin);
      apply_factors<Isa>(w.s + r * kKeys, w.of_row, columns);
      to_words<Operand>(w.s + r * kKeys, w.p + r * kLdp, columns);
    }
  }

  // The same for the block of `rows` rows from `first` on, with a lane for each.
  void softmax_block(const Scratch& w, const Block& block, const SequenceSlice& at,
                     std::int64_t head, int first, int rows, const RowLimits* limits, Span common,
                     int key0) const {
    float* const s = w.s_blocks + first * kKeys;
    const Span keys = block.live;
    const bool dropped = p_.dropout.probability > 0.f;
    if (!transform_.plain) {
      transform_.scale_and_cap(s, nullptr, {keys.begin * kBlock, keys.end * kBlock});
      if (p_.bias)
        for (int lane = 0; lane < rows; ++lane) {
          const int r = first + lane;
          std::fill(w.of_row + keys.begin, w.of_row + keys.end, 0.f);
          transform_.add_bias(w.of_row, live_columns(limits[lane], key0, keys), at,
                              head_of(at, head, r), r % at.q.length, key0);
          for (int i = keys.begin; i < keys.end; ++i) s[at_of(i, lane)] += w.of_row[i];
        }
    }
    hide(s, keys, at, rows, limits, common, key0);
    for (int lane = 0; lane < kBlock; lane += Isa::kLanes)
      softmax_lanes<Operand, kBlock, kSpread>(s + lane, keys, first + lane, transform_.factor(),
                                              *w.statistics, dropped);
    if (dropped) {
      for (int lane = 0; lane < rows; ++lane) {
        const int r = first + lane;
        dropout_mask(p_.dropout, at.entry, head_of(at, head, r), r % at.q.length, key0 + keys.begin,
                     keys.end - keys.begin, w.of_row + keys.begin);
        for (int i = keys.begin; i < keys.end; ++i) s[at_of(i, lane)] *= w.of_row[i];
      }
      if constexpr (C::kPairs)
        for (int i = keys.begin; i < keys.end; i += 2)
          Isa::store_zipped(reinterpret_cast<Word*>(s) + i / 2 * Isa::kLanes,
                            Isa::load(s + i * Isa::kLanes), Isa::load(s + (i + 1) * Isa::kLanes));
    }
    if constexpr (kTiles)
      transpose_words(reinterpret_cast<const Word*>(s), keys, rows, w.p + first * kLdp);
  }

  // s[key][lane] = -inf where the row does not see the key.
  void hide(float* s, Span keys, const SequenceSlice& at, int rows, const RowLimits* limits,
            Span common, int key0) const {
    const Vec hidden = Isa::broadcast(-kInfinity);
    const Span all{std::max(common.begin - key0, keys.begin),
                   std::min(common.end - key0, keys.end)};
    if (all.begin > keys.begin || all.end < keys.end) {
      using Ints [[gnu::vector_size(sizeof(Vec))]] = int;
      constexpr int kAll = kBlock * kSpread;
      int firsts[kAll], ends[kAll];  // from the first key of a vector on
      for (int lane = 0; lane < kAll; ++lane) {
        const RowLimits row = limits[std::min(lane / kSpread, rows - 1)];
        firsts[lane] = row.first - key0 - lane % kSpread;
        ends[lane] = row.end - key0 - lane % kSpread;
      }
      Ints first[kBlockVectors], end[kBlockVectors];
      std::memcpy(first, firsts, sizeof first);
      std::memcpy(end, ends, sizeof end);
      for (int i = keys.begin; i < keys.end; i += kSpread) {
        if (all.begin <= i && i + kSpread <= all.end) continue;
        for (int v = 0; v < kBlockVectors; ++v) {
          float* const scores = s + i * kBlock + v * Isa::kLanes;
          const Ints sees = (first[v] <= Ints{} + i) & (Ints{} + i < end[v]);
          Isa::store(scores, sees ? Isa::load(scores) : hidden);
        }
      }
    }
    const int last = std::min(keys.end, at.k.length - key0);
    if (!all_keys_valid(p_.intervals, at, key0 + keys.begin, key0 + last))
      for (int i = keys.begin; i < last; ++i)
        if (!key_valid(p_.intervals, at, key0 + i))
          for (int lane = 0; lane < kBlock; ++lane) s[at_of(i, lane)] = -kInfinity;
  }

  // o[r] = rescaled[r] * o[r] + sum over keys of p[r][i] * v[i], a few rows at a time.
  void value_groups(const Scratch& w, const Block& block, LinesAhead& ahead, int rows,
                    const float* rescaled) const {
    const int keys = block.live.end - block.live.begin;
    const int in_blocks = rows_in_blocks(rows);
    // Where the type has to be widened, twice the rows make use of half the vectors.
    constexpr bool kPaired = kWide == 4 && !std::is_same_v<Element, float>;
    const int paired = kPaired ? rows / 8 * 8 : 0;
    const auto turns = [&](int groups, int vectors) {
      return groups * (keys / Operand::kDepth) *
             ceil_div(static_cast<int>(p_.v.head_dim()), vectors * Isa::kLanes);
    };
    ahead.spread(turns(paired / 8, 2) + turns(ceil_div(rows - paired, kTogether), at_once(rows)));
    const auto values = [&](auto count, auto vectors, auto lanes, int r) {
      constexpr bool kLanesP = decltype(lanes)::value;
      const Word* p = kLanesP ? reinterpret_cast<const Word*>(w.s_blocks) +
                                    r / kBlock * (kKeys * kBlock) + at_of(0, r % kBlock)
                              : w.p + r * kLdp;
      value_rows<decltype(count)::value, decltype(vectors)::value, kLanesP>(
          p, block, ahead, rescaled + r, w.o + std::int64_t{r} * o_columns_, 0);
    };
    const auto pairs = [&](auto lanes, int r, int end) {
      if constexpr (kPaired)
        for (; r + 8 <= end; r += 8)
          values(std::integral_constant<int, 8>(), std::integral_constant<int, 2>(), lanes, r);
      return r;
    };
    const auto groups = [&](auto lanes, int first, int end) {
      for_groups(first, end, [&](auto count, int r) {
        values(count, std::integral_constant<int, at_once(decltype(count)::value)>(), lanes, r);
      });
    };
    // Groups do not begin in one block and end in the next.
    for (int r = pairs(std::true_type(), 0, in_blocks); r < in_blocks; r += kBlock)
      groups(std::true_type(), r, std::min(r + kBlock, in_blocks));
    groups(std::false_type(), pairs(std::false_type(), in_blocks, rows), rows);
  }

  // Rows [first, rows) in as few groups of up to kTogether as there can be, of equal sizes if they
  // can be: body(size as a constant, first row).
  template <class Body>
  static void for_groups(int first, int rows, const Body& body) {
    for (int groups = ceil_div(rows - first, kTogether); groups > 0; --groups) {
      const int size = ceil_div(rows - first, groups);
      with_constant<kTogether>(size, [&](auto count) { body(count, first); });
      first += size;
    }
  }
  // 1 <= value <= kMost
  template <int kMost, class Body>
  static void with_constant(int value, const Body& body) {
    if constexpr (kMost > 1)
      if (value < kMost) return with_constant<kMost - 1>(value, body);
    body(std::integral_constant<int, kMost>());
  }

  // How many blocks have their scores computed without reductions: whole groups of rows, and what
  // is left at the end where it is as many as pay.
  HEED_BASELINE static int blocks_of(int rows) {
    constexpr int kGroup = kSpread > 1 ? kBlock : 16;
    constexpr int kFewest = kSpread > 1 ? 2 : !kSameWords ? 13 : kBlockVectors == 1 ? 10 : 11;
    constexpr int kFewestOfAll = kSpread == 1 ? kFewest : kSameWords ? 5 : 7;
    if (kTiles) return ceil_div(rows, kGroup);
    if (rows < kFewestOfAll) return 0;
    const int groups = (rows + kGroup - kFewest) / kGroup;
    return ceil_div(std::min(rows, groups * kGroup), kBlock);
  }
  static int rows_in_blocks(int rows) { return std::min(blocks_of(rows) * kBlock, rows); }
  // Rows of P and O in a tile: all blocks have as many, so that there may be rows too many at the
  // end.
  HEED_BASELINE static int block_rows(int rows) {
    return ceil_div(std::max(rows, 1), std::max(blocks_of(rows), 1));
  }
  HEED_BASELINE std::int64_t block_words() const {
    return std::int64_t{blocks_} * q_depth_ * kBlock;
  }

  // s[r][i] = q[r] · k[i] for the rows of blocks. Keys that are not words in memory become words a
  // few at a time, so that all rows find them in L1.
  void score_blocks(const Scratch& w, const Block& block, int blocks, LinesAhead& ahead) const {
    const bool in_place = kSameWords && p_.q.head_dim() % (Operand::kDepth * kSpread) == 0;
    const int at_once = in_place ? kKeys : kWordKeys;
    for (int first = block.live.begin; first < block.live.end; first += at_once) {
      const Span some{first, std::min(first + at_once, block.live.end)};
      const void* keys[kKeys];
      for (int i = some.begin; i < some.end; ++i) {
        keys[i] = block.k[i];
        if (in_place) continue;
        Word* const words = w.k + (i - first) * q_words_;
        load_words_of(block.k[i], words);
        keys[i] = words;
      }
      const auto score = [&](auto together, int b) {
        score_lanes<decltype(together)::value>(w.q_blocks + std::int64_t{b} * q_depth_ * kBlock,
                                               keys, some, ahead, w.s_blocks + b * kKeys * kBlock);
      };
      int b = 0;
      if constexpr (kBlockVectors == 1) {
        for (; b + 4 <= blocks; b += 4) score(std::integral_constant<int, 4>(), b);
        for (; b + 2 <= blocks; b += 2) score(std::integral_constant<int, 2>(), b);
      }
      for (; b < blocks; ++b) score(std::integral_constant<int, 1>(), b);
    }
  }

  // P of a block of `rows` rows, [word of keys][lane] -> rows of words.
  void transpose_words(const Word* words, Span keys, int rows, Word* p) const {
    for (int i = keys.begin / 2; i < keys.end / 2; i += Isa::kLanes) {
      Vec square[Isa::kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < Isa::kLanes; ++j)
        square[j] = Isa::load(reinterpret_cast<const float*>(words + (i + j) * Isa::kLanes));
      transpose_steps<1>(square);
      for (int r = 0; r < rows; ++r)
        Isa::store(reinterpret_cast<float*>(p + r * kLdp + i), square[r]);
    }
  }

  // The same by tiles: 32 keys are A, from where they stand if tiles can be read from there.
  void score_tiles(const Scratch& w, const Block& block, LinesAhead& ahead, int blocks) const {
    constexpr int kRows = Isa::kTileRows, kWords = Isa::kTileWords;
    const std::int64_t key_stride = p_.k.seqlen_stride();
    const bool whole_words = p_.q.head_dim() % Operand::kDepthStep == 0 && key_stride % 2 == 0;
    const int groups = (block.live.end - block.live.begin) / kKeyGroup;
    ahead.spread(groups * blocks * q_depth_ / kWords);
    for (int i = block.live.begin; i < block.live.end; i += kKeyGroup) {
      const bool in_place =
          whole_words && block.strided.begin <= i && i + kKeyGroup <= block.strided.end;
      const Word* a = w.k;
      if (in_place) {
        a = reinterpret_cast<const Word*>(block.k[i]);
      } else {
        for (int j = 0; j < kKeyGroup; ++j) load_words_of(block.k[i + j], w.k + j * q_words_);
      }
      const std::int64_t stride = in_place ? key_stride / 2 : q_words_;
      for (int b = 0; b < blocks; ++b) {
        const Word* q = w.q_blocks + std::int64_t{b} * q_depth_ * Isa::kLanes;
        float* out = w.s_blocks + (b * kKeys + i) * Isa::kLanes;
        Isa::template zero_tile<0>();
        Isa::template zero_tile<1>();
        for (int k = 0; k < q_depth_; k += kWords) {
          Isa::template load_tile<6>(q + k * Isa::kLanes, Isa::kLanes);
          Isa::template load_tile<2>(a + k, stride);
          Isa::template multiply_tiles<0, 2, 6>();
          Isa::template load_tile<2>(a + kRows * stride + k, stride);
          Isa::template multiply_tiles<1, 2, 6>();
          ahead.ask();
        }
        Isa::template store_tile<0>(out, Isa::kLanes);
        Isa::template store_tile<1>(out + kRows * Isa::kLanes, Isa::kLanes);
      }
    }
  }

  // The same by tiles: the pairs of keys are B.
  void value_tiles(const Scratch& w, const Block& block, LinesAhead& ahead, int rows,
                   const float* rescaled) const {
    constexpr int kWords = Isa::kTileWords, kStep = C::kPanel;
    constexpr int kZipTurns = 2, kTileTurns = 16;
    const int columns = static_cast<int>(p_.v.head_dim());
    const int keys = block.live.end - block.live.begin;
    const int blocks = blocks_of(rows), rows_of_block = block_rows(rows);
    ahead.spread(keys / 2 * kZipTurns +
                 ceil_div(columns, kStep) * blocks * keys / kKeyGroup * kTileTurns);
    scale_rows<Isa>(w.o, o_columns_, rows, o_columns_, rescaled);
    for (int i = block.live.begin; i < block.live.end; i += 2) {
      ahead.ask(kZipTurns);
      const auto zip_columns = [&](int col, auto whole) __attribute__((always_inline)) {
        typename Operand::Wide words[2];
        Word* line = w.v + col * (kKeys / 2) + i / 2 * kStep;
        load_values(block.v + i, col, columns, whole, words);
        Isa::store(reinterpret_cast<float*>(line), (Vec)words[0]);
        Isa::store(reinterpret_cast<float*>(line + Isa::kLanes), (Vec)words[1]);
      };
      int col = 0;
      for (; col + kStep <= columns; col += kStep) zip_columns(col, std::true_type());
      if (col < columns) zip_columns(col, std::false_type());
    }
    for (int col = 0; col < columns; col += kStep)
      for (int b = 0; b < blocks; ++b) {
        float* o = w.o + std::int64_t{b} * rows_of_block * o_columns_ + col;
        const Word* p = w.p + b * rows_of_block * kLdp;
        Isa::template load_tile<3>(o, o_columns_);
        Isa::template load_tile<4>(o + kWords, o_columns_);
        for (int i = block.live.begin / 2; i < block.live.end / 2; i += kWords) {
          const Word* v = w.v + col * (kKeys / 2) + i * kStep;
          Isa::template load_tile<5>(p + i, kLdp);
          Isa::template load_tile<6>(v, kStep);
          Isa::template load_tile<7>(v + kWords, kStep);
          Isa::template multiply_tiles<3, 5, 6>();
          Isa::template multiply_tiles<4, 5, 7>();
          ahead.ask(kTileTurns);
        }
        Isa::template store_tile<3>(o, o_columns_);
        Isa::template store_tile<4>(o + kWords, o_columns_);
      }
  }

  // q[r] · k[i] of all keys of `live` and rows of kBlocks blocks, where at_of says. A function of
  // its own, as all that ask for memory are: inlined beside other loops, gcc keeps sums in memory.
  template <int kBlocks>
  [[gnu::noinline]] void score_lanes(const Word* q, const void* const* keys, Span live,
                                     LinesAhead& lines_ahead, float* out) const {
    LinesAhead ahead = lines_ahead;
    // Four vectors of 16 rows' queries do not stay in L1 beside the keys: the more keys share them
    // the better.
    constexpr int kMany =
        kSpread == 1 && (kBlocks == 4 || kBlockVectors == 2) ? kManyKeys : kKeyGroup;
    int i = live.begin;
    for (; (live.end - i) % kMany != 0; i += kKeyGroup)
      score_keys<kBlocks, kKeyGroup>(q, keys + i, ahead, out + i * kBlock);
    for (; i < live.end; i += kMany)
      score_keys<kBlocks, kMany>(q, keys + i, ahead, out + i * kBlock);
    lines_ahead = ahead;
  }

  // The same for the first kCount keys.
  template <int kBlocks, int kCount>
  [[gnu::always_inline]] void score_keys(const Word* q, const void* const* keys, LinesAhead& ahead,
                                         float* out) const {
    constexpr int kVectors = kBlocks * kBlockVectors;
    constexpr int kWords = kChains / kBlocks;  // of a turn; kSpread at a time
    constexpr int kParts =                     // of one sum
        kBlockVectors == 2 ? 1
        : kSpread == 1     ? kWords
                           : std::max(kWords / 2, 1);
    const std::int64_t panel = std::int64_t{q_depth_} * kBlock;
    Vec acc[kParts][kVectors][kCount] = {};
    const auto add = [&](int at, int part) __attribute__((always_inline)) {
      typename Operand::Wide y[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        y[v] = Operand::load(q + v / kBlockVectors * panel + at * kSpread * kBlock +
                             v % kBlockVectors * Isa::kLanes);
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j) {
        const auto* const words =
            static_cast<const std::byte*>(keys[j]) + at * kSpread * sizeof(Word);
        if constexpr (kSpread > 1) {
          const Vec x = Isa::load_repeated(words);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v)
            acc[part][v][j] = Operand::multiply_add(acc[part][v][j], x, y[v]);
        } else {
          Word word;
          std::memcpy(&word, words, sizeof(Word));
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v)
            acc[part][v][j] = Operand::mac(acc[part][v][j], word, y[v]);
        }
      }
    };
    const int depth = q_depth_ / kSpread;
    int at = 0;
    for (; at + kWords <= depth; at += kWords) {
      ahead.ask(kCount);
#pragma GCC unroll 8
      for (int word = 0; word < kWords; ++word) add(at + word, word % kParts);
    }
    for (; at < depth; ++at) add(at, 0);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 8
      for (int j = 0; j < kCount; j += kSpread) {
        Vec sums[kSpread];
#pragma GCC unroll 4
        for (int i = 0; i < kSpread; ++i) {
          sums[i] = acc[0][v][j + i];
#pragma GCC unroll 8
          for (int part = 1; part < kParts; ++part) sums[i] = sums[i] + acc[part][v][j + i];
        }
        Isa::store(out + (v / kBlockVectors * kKeys + j) * kBlock + v % kBlockVectors * Isa::kLanes,
                   reduce_lanes(sums, [](Vec a, Vec b) { return a + b; }));
      }
  }

  // s[r][i] = q[r] · k[i], vectors of depth at a time. Asks for the next step's lines meanwhile.
  template <int kRows>
  [[gnu::noinline]] void score_rows(const Word* q, const Block& block, LinesAhead& lines_ahead,
                                    float* s) const {
    LinesAhead ahead = lines_ahead;
    int i = block.live.begin;
    for (; i + at_once(kRows) <= block.live.end; i += at_once(kRows))
      score_some<kRows, at_once(kRows)>(q, block.k + i, ahead, s + i);
    if constexpr (at_once(kRows) > kWide)
      for (; i < block.live.end; i += kWide) score_some<kRows, kWide>(q, block.k + i, ahead, s + i);
    lines_ahead = ahead;
  }

  // The same for the first kCount keys.
  template <int kRows, int kCount>
  [[gnu::always_inline]] void score_some(const Word* q, const Element* const* keys,
                                         LinesAhead& ahead, float* s) const {
    const int columns = static_cast<int>(p_.q.head_dim());
    constexpr int kSums = kRows * kCount;
    Vec acc[round_up(kSums, Isa::kLanes)] = {};
    const auto add = [&](int word, auto whole) __attribute__((always_inline)) {
      typename Operand::Wide x[kCount];
#pragma GCC unroll 8
      for (int j = 0; j < kCount; ++j)
        x[j] = wide(load_vector<Operand>(keys[j], word, columns, whole));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        typename Operand::Wide y = Operand::load(q + r * q_words_ + word);
        if constexpr (requires { Isa::keep(y); }) Isa::keep(y);
#pragma GCC unroll 8
        for (int j = 0; j < kCount; ++j)
          acc[r * kCount + j] = Operand::multiply_add(acc[r * kCount + j], y, x[j]);
      }
    };
    constexpr int kTurn = turn_of(kRows), kTurnWords = kTurn * Isa::kLanes;
    int word = 0;
    for (; (word + kTurnWords) * Operand::kDepth <= columns; word += kTurnWords) {
      ahead.ask(kTurn * kCount);
#pragma GCC unroll 4
      for (int part = 0; part < kTurnWords; part += Isa::kLanes) add(word + part, std::true_type());
    }
    for (; word < q_words_; word += Isa::kLanes) {
      ahead.ask(kCount);
      if (kTurn > 1 && (word + Isa::kLanes) * Operand::kDepth <= columns) {
        add(word, std::true_type());
      } else {
        add(word, std::false_type());
      }
    }
    float sums[round_up(kSums, Isa::kLanes)];
#pragma GCC unroll 4
    for (int first = 0; first < kSums; first += Isa::kLanes) {
      Vec group[Isa::kLanes];
      std::copy_n(acc + first, Isa::kLanes, group);
      Isa::store(sums + first, reduce_rows(group, [](Vec a, Vec b) { return a + b; }));
    }
    for (int r = 0; r < kRows; ++r) std::copy_n(sums + r * kCount, kCount, s + r * kKeys);
  }

  // kRows of them, from column `first` on. Asks for the next step's lines meanwhile.
  template <int kRows, int kVectors, bool kLanesP>
  [[gnu::noinline]] void value_rows(const Word* p, const Block& block, LinesAhead& lines_ahead,
                                    const float* rescaled, float* o, int first) const {
    // P of row r and a word of keys, by rows or by blocks.
    const auto weight_of = [&](int r, int i, int turn) __attribute__((always_inline)) {
      if constexpr (kLanesP)
        return p[r / kBlock * (kKeys * kBlock) + at_of(turn, r % kBlock) + i * kBlock];
      return p[r * kLdp + i + turn];
    };
    LinesAhead ahead = lines_ahead;
    const int columns = static_cast<int>(p_.v.head_dim());
    constexpr int kStep = kVectors * Isa::kLanes;
    constexpr int kTurn = kLanesP ? std::max(turn_of(kRows), kSpread) : turn_of(kRows);
    const auto panel = [&](int col, auto whole) __attribute__((always_inline)) {
      Vec acc[kRows][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j)
          acc[r][j] = Isa::load(o + std::int64_t{r} * o_columns_ + col + j * Isa::kLanes) *
                      Isa::broadcast(rescaled[r]);
      constexpr int kTurnKeys = kTurn * Operand::kDepth;
      for (int i = block.live.begin; i < block.live.end; i += kTurnKeys) {
        ahead.ask(kTurn);
#pragma GCC unroll 4
        for (int turn = 0; turn < kTurn; ++turn) {
          typename Operand::Wide v[kVectors];
          load_values(block.v + i + turn * Operand::kDepth, col, columns, whole, v);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const Word weight = weight_of(r, i / Operand::kDepth, turn);
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) acc[r][j] = multiply<kRows>(acc[r][j], weight, v[j]);
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j)
          Isa::store(o + std::int64_t{r} * o_columns_ + col + j * Isa::kLanes, acc[r][j]);
    };
    int col = first;
    for (; col + kStep <= columns; col += kStep) panel(col, std::true_type());
    if constexpr (kVectors <= kWide)
      if (col < columns) panel(col, std::false_type());
    lines_ahead = ahead;
    if constexpr (kVectors > kWide)
      value_rows<kRows, kWide, kLanesP>(p, block, lines_ahead, rescaled, o, col);
  }

  // acc + weight * v, where kRows sums take v: for one it can stay in memory.
  template <int kRows>
  [[gnu::always_inline]] static Vec multiply(Vec acc, Word weight, typename Operand::Wide v) {
    if constexpr (kRows == 1 && Operand::kDepth == 1) {
      return Operand::multiply_add(acc, Isa::broadcast(weight), v);
    } else {
      return Operand::mac(acc, weight, v);
    }
  }

  // kLanes words of a row; `whole`: it has as many from there on.
  template <class Words, bool kWhole>
  [[gnu::always_inline]] static Vec load_vector(const Element* row, int word, int columns,
                                                std::bool_constant<kWhole>) {
    if constexpr (kWhole) {
      return load_whole<Words>(row + word * Words::kDepth);
    } else {
      return load_words<Words>(row, word, columns);
    }
  }

  // Words of kDepth rows, which are neighbours along depth, from column `col` on.
  template <bool kWhole, int kVectors>
  [[gnu::always_inline]] static void load_values(const Element* const* rows, int col, int columns,
                                                 std::bool_constant<kWhole> whole,
                                                 typename Operand::Wide (&words)[kVectors]) {
    if constexpr (Operand::kDepth == 1) {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j)
        words[j] = load_vector<Operand>(rows[0], col + j * Isa::kLanes, columns, whole);
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; j += 2) {
        const int word = (col + j * Isa::kLanes) / 2;
        const Vec even = load_vector<Operand>(rows[0], word, columns, whole);
        const Vec odd = load_vector<Operand>(rows[1], word, columns, whole);
        constexpr auto kHalf = std::make_integer_sequence<int, 2 * Isa::kLanes>();
        words[j] = wide(zip<0>(even, odd, kHalf));
        words[j + 1] = wide(zip<Isa::kLanes>(even, odd, kHalf));
      }
    }
  }

  // Words of the 16-bit halves of two vectors, from the half kFirst on: a's in the low half.
  template <int kFirst, int... kHalf>
  [[gnu::always_inline]] static Vec zip(Vec a, Vec b, std::integer_sequence<int, kHalf...>) {
    using Halves [[gnu::vector_size(sizeof(Vec))]] = short;
    constexpr int kHalves = sizeof...(kHalf);
    return (Vec)__builtin_shufflevector((Halves)a, (Halves)b,
                                        (kFirst + kHalf / 2 + kHalf % 2 * kHalves)...);
  }

  static typename Operand::Wide wide(Vec x) { return (typename Operand::Wide)x; }

  void merge_parts(const Scratch& w, const SequenceSlice& at, std::int64_t head) const {
    const int rows = static_cast<int>(group_of(p_)) * at.q.length;
    for (int r = 0; r < rows; ++r) {
      SoftmaxState all;
      for (int split = 0; split < splits_; ++split)
        all = merge(all, partial_state_[part_index(at, head, split, r)]);
      std::fill_n(w.o, o_columns_, 0.f);
      for (int split = 0; split < splits_; ++split) {
        const std::int64_t i = part_index(at, head, split, r);
        const Vec weight = Isa::broadcast(rescale(partial_state_[i].max, all.max));
        for (int c = 0; c < o_columns_; c += Isa::kLanes)
          Isa::store(w.o + c, Isa::fma(Isa::load(partial_o_ + i * o_columns_ + c), weight,
                                       Isa::load(w.o + c)));
      }
      store_output<C>(p_, at, head_of(at, head, r), r % at.q.length, w.o, all);
    }
  }

  static constexpr bool kSameWords =
      C::kPairs || std::is_same_v<Element, float>;  // nothing is widened
  static constexpr int kChains =
      4;  // of sums for each key: with kWide keys, enough for the latency
  static constexpr int kManyKeys = 6;
  static constexpr int kWordKeys = 2 * kManyKeys;
  static constexpr std::int64_t kTasks = 32;           // enough for any CPU to balance
  static constexpr std::int64_t kLeastWork = 1 << 16;  // multiplications worth a task of their own

  const ForwardProblem& p_;
  const ScoreTransform<Isa> transform_;
  const int workers_;
  const int splits_;
  int task_heads_ = 1;  // key heads of a task
  std::int64_t head_tasks_ = 1;
  const int rows_;       // query rows of one key head, at most
  const int o_rows_;     // the same, up to whole tiles of O
  const int blocks_;     // of kLanes rows, which have their scores computed a lane each
  const int q_depth_;    // words of one query row
  const int q_words_;    // the same, up to whole vectors
  const int o_columns_;  // head_dim_v, up to whole steps
  float* partial_o_ = nullptr;
  SoftmaxState* partial_state_ = nullptr;
  std::byte* scratch_ = nullptr;
  std::size_t scratch_bytes_ = 0;
  std::size_t bytes_ = 0;
};

// A row is four lanes where an instruction repeats four words in a vector as it loads them: up to
// four vectors of four rows share a load, where a vector of 16 rows needs one for each
// multiply-add. Four such vectors share their loads as well, and have no lanes to be added up.
template <class C>
class Decode {
  static constexpr bool kSpreads = !C::kPairs && requires(const void* p) {
    C::Isa::load_repeated(p);
  };
  static constexpr int kMostSpreadRows = 48;
  HEED_BASELINE static bool spreads(const ForwardProblem& p) {
    return kSpreads && group_of(p) * max_seqlen_q(p) <= kMostSpreadRows;
  }

 public:
  using Few = DecodeKernel<C, kSpreads ? 4 : 1>;
  using Many = DecodeKernel<C, 1>;

  HEED_BASELINE static std::size_t bytes(const Plan& plan, const ForwardProblem& p) {
    return spreads(p) ? Few::bytes(plan, p) : Many::bytes(plan, p);
  }
  static Status launch(const Plan& plan, const ForwardProblem& p, Workspace workspace,
                       Queue queue) {
    (spreads(p) ? Few::launch : Many::launch)(plan, p, workspace, queue);
    return {};
  }
};

template <class C>
constexpr KernelRow decode_row() {
  using Kernel = typename Decode<C>::Few;
  return {.arch = C::Isa::kArch,
          .pass = Pass::decode,
          .dtype = C::kDType,
          .operand = C::kOperandDType,
          .tile_m = Kernel::kTogether,
          .tile_n = Kernel::kKeys,
          .max_head_dim = 512,
          .max_query_rows = Kernel::kMaxRows,
          .forward_bytes = Decode<C>::bytes,
          .forward = Decode<C>::launch,
          .backward_bytes = nullptr,
          .backward = nullptr,
          .few_query_rows = Kernel::kFewRows,
          .least_query_rows = Kernel::kTiles ? kLeastTileRows : 0,
          .least_scores = Kernel::kTiles ? kLeastTileScores : 0};
}

}  // namespace heed::cpu::inline HEED_ISA
