// Few query rows against many keys: keys and values are read where they are, once for all query rows of
// a key head, in parts of the key range that are merged at the end.
#pragma once

#include "cpu/forward.hpp"

namespace heed::cpu {

template <class C>
class DecodeKernel {
  using Isa = typename C::Isa;
  using Vec = typename Isa::Vec;
  using Element = typename C::Element;
  using Word = typename C::Word;
  using Operand = typename C::Operand;

 public:
  static constexpr int kMaxRows = 64;
  static constexpr int kFewRows = 16;  // up to which forward is slower, however few the keys
  static constexpr int kKeys = 64;  // keys of one step
  // 4 rows x kWide accumulators: keys of S at a time, vectors of O at a time.
  static constexpr int kWide = Isa::kMicroRows >= 12 ? 4 : 2;

  static std::size_t bytes(const Plan& plan, const ForwardProblem& p) {
    return DecodeKernel(plan, p, WorkspaceLayout()).bytes_;
  }

  static Status launch(const Plan& plan, const ForwardProblem& p, Workspace workspace,
                       Queue queue) {
    DecodeKernel(plan, p, WorkspaceLayout(workspace)).run(executor_of(queue));
    return {};
  }

 private:
  struct Scratch {
    Word* q;   // [task_heads_][rows][q_words_], padded to whole vectors
    float* s;  // [rows][kKeys]
    float* o;  // [task_heads_][rows][o_columns_]
    float* kept;  // dropout mask of one row
    RowStatistics<Isa, kMaxRows>* statistics;  // [task_heads_]
  };
  struct Carved {
    Scratch scratch;
    std::size_t bytes;
  };

  DecodeKernel(const Plan& plan, const ForwardProblem& problem, WorkspaceLayout layout)
      : p_(problem),
        transform_{problem},
        workers_(plan.workers),
        splits_(plan.splits),
        rows_(static_cast<int>(group_of(problem) * max_seqlen_q(problem))),
        q_words_(round_up(words_of<C>(problem.q.head_dim()), Isa::kLanes)),
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
        splits_ > 1 ? batch_entries(p_) * p_.k.heads() * splits_ * rows_ : 0;
    partial_o_ = layout.add<float>(parts * o_columns_);
    partial_state_ = layout.add<SoftmaxState>(parts);
    scratch_bytes_ = carve(WorkspaceLayout()).bytes;
    scratch_ = layout.add<std::byte>(static_cast<std::int64_t>(scratch_bytes_) * workers_);
    bytes_ = layout.bytes();
  }

  Carved carve(WorkspaceLayout layout) const {
    Scratch s;
    s.q = layout.add<Word>(std::int64_t{task_heads_} * rows_ * q_words_);
    s.s = layout.add<float>(std::int64_t{rows_} * kKeys);
    s.o = layout.add<float>(std::int64_t{task_heads_} * rows_ * o_columns_);
    s.kept = layout.add<float>(kKeys);
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
    clear_gaps<Element>(p_, executor, workers_);
    parallel_for(executor, workers_, batch_entries(p_) * head_tasks_ * splits_,
                 [&](std::int64_t task, int worker) {
                   const int split = static_cast<int>(task % splits_);
                   const std::int64_t head = task / splits_ % head_tasks_ * task_heads_;
                   part(scratch(worker),
                        slice_of(p_, static_cast<int>(task / splits_ / head_tasks_)), head,
                        std::min(head + task_heads_, p_.k.heads()), split);
                 });
    if (splits_ > 1)
      parallel_for(executor, workers_, heads, [&](std::int64_t task, int worker) {
        merge_parts(scratch(worker), slice_of(p_, static_cast<int>(task / p_.k.heads())),
                    task % p_.k.heads());
      });
  }

  // Row r of a key head is query row r % seqlen_q of head r / seqlen_q of its group.
  std::int64_t head_of(const SequenceSlice& at, std::int64_t head, int r) const {
    return head * group_of(p_) + r / at.q.length;
  }

  std::int64_t part_index(const SequenceSlice& at, std::int64_t head, int split, int r) const {
    return ((at.entry * p_.k.heads() + head) * splits_ + split) * rows_ + r;
  }

  // The query rows of key heads [head0, head_end) against one part of the keys.
  void part(const Scratch& w, const SequenceSlice& at, std::int64_t head0, std::int64_t head_end,
            int split) const {
    const int rows = static_cast<int>(group_of(p_)) * at.q.length;
    const int blocks = ceil_div(at.k.length, kKeys);
    const int begin = static_cast<int>(std::int64_t{blocks} * split / splits_) * kKeys;
    const int end = std::min(
        at.k.length, static_cast<int>(std::int64_t{blocks} * (split + 1) / splits_) * kKeys);
    RowLimits limits[kMaxRows];
    Span seen{end, begin};
    for (int r = 0; r < rows; ++r) {
      const RowLimits row = row_limits(p_.band, at, p_.intervals, r % at.q.length);
      limits[r] = {std::max(row.first, begin), std::min(row.end, end)};
      if (limits[r].first >= limits[r].end) continue;
      seen = {std::min(seen.begin, limits[r].first), std::max(seen.end, limits[r].end)};
    }
    for (std::int64_t head = head0; head < head_end; ++head) {
      const Scratch own = of_head(w, head - head0);
      for (int r = 0; r < rows; ++r) load_query(own.q + r * q_words_, limits[r], at, head, r);
      std::fill_n(own.o, std::int64_t{rows} * o_columns_, 0.f);
      *own.statistics = {};
    }
    Block turns[2];
    int now = 0;
    const int first = seen.begin / kKeys * kKeys;
    load(turns[now], at, head0, seen, first);
    for (int key0 = first; key0 < seen.end; key0 += kKeys)
      for (std::int64_t head = head0; head < head_end; ++head, now ^= 1) {
        const bool last = head + 1 == head_end;
        load(turns[now ^ 1], at, last ? head0 : head + 1, seen, last ? key0 + kKeys : key0);
        step(of_head(w, head - head0), at, head, rows, limits, turns[now], turns[now ^ 1], key0);
      }
    for (std::int64_t head = head0; head < head_end; ++head)
      store_part(of_head(w, head - head0), at, head, rows, split);
  }

  Scratch of_head(Scratch w, std::int64_t i) const {
    w.q += i * rows_ * q_words_;
    w.o += i * rows_ * o_columns_;
    w.statistics += i;
    return w;
  }

  // A row that sees nothing is 0: what it is multiplied by is not to be used.
  void load_query(Word* words, RowLimits limits, const SequenceSlice& at, std::int64_t head,
                  int r) const {
    const Element* q = limits.first >= limits.end
                           ? nullptr
                           : row_of<Element>(p_.q, at.q, head_of(at, head, r), r % at.q.length);
    for (int word = 0; word < q_words_; word += Isa::kLanes)
      Isa::store(reinterpret_cast<float*>(words + word),
                 load_words<Operand>(q, word, static_cast<int>(p_.q.head_dim())));
  }

  void store_part(const Scratch& w, const SequenceSlice& at, std::int64_t head, int rows,
                  int split) const {
    for (int r = 0; r < rows; ++r) {
      const float* o = w.o + std::int64_t{r} * o_columns_;
      const SoftmaxState state = (*w.statistics)[r];
      if (splits_ == 1) {
        store_output<C>(p_, at, head_of(at, head, r), r % at.q.length, o, state);
      } else {
        const std::int64_t i = part_index(at, head, split, r);
        std::copy_n(o, o_columns_, partial_o_ + i * o_columns_);
        partial_state_[i] = state;
      }
    }
  }

  // Where the keys and values of one step stand; `first`: of them, the first that some row sees.
  struct Block {
    int first;
    int count;
    const Element* k[kKeys];
    const Element* v[kKeys];
  };
  void load(Block& block, const SequenceSlice& at, std::int64_t head, Span seen, int key0) const {
    const Span keys{std::max(seen.begin, key0), std::min(seen.end, key0 + kKeys)};
    block.first = keys.begin - key0;
    block.count = keys.empty() ? 0 : keys.end - keys.begin;
    for (int i = 0; i < block.count; ++i) {
      block.k[i] = key_row<Element>(p_, p_.k, at, head, keys.begin + i);
      block.v[i] = key_row<Element>(p_, p_.v, at, head, keys.begin + i);
    }
  }

  void step(const Scratch& w, const SequenceSlice& at, std::int64_t head, int rows,
            const RowLimits* limits, const Block& block, const Block& next, int key0) const {
    RowStatistics<Isa, kMaxRows>& statistics = *w.statistics;
    const int turns = ceil_div(rows, 4);
    for (int r = 0; r < rows; r += 4)
      with_rows(rows - r, [&](auto count) {
        score_rows<decltype(count)::value>(w.q + r * q_words_, block, {r / 4, turns},
                                           w.s + r * kKeys + block.first);
      });
    const Span columns{0, kKeys};
    for (int r = 0; r < rows; ++r)
      transform_.apply(w.s + r * kKeys, nullptr, columns, live_columns(limits[r], key0, columns), at,
                       head_of(at, head, r), r % at.q.length, key0);
    for (int r = 0; r < rows; r += Isa::kLanes)
      softmax_rows<F32Operand<Isa>>(w.s + r * kKeys, kKeys, r, std::min(rows - r, Isa::kLanes),
                                    columns, transform_.factor(), statistics, w.s, kKeys);
    if (p_.dropout.probability > 0.f)
      for (int r = 0; r < rows; ++r) {
        dropout_mask(p_.dropout, at.entry, head_of(at, head, r), r % at.q.length, key0, kKeys,
                     w.kept);
        apply_factors<Isa>(w.s + r * kKeys, w.kept, columns);
      }
    const auto values = [&](auto count, auto vectors, Turn turn, int r) {
      value_rows<decltype(count)::value, decltype(vectors)::value>(
          w.s + r * kKeys + block.first, block, turn, next, statistics.rescaled + r,
          w.o + std::int64_t{r} * o_columns_);
    };
    // Where the type has to be widened, twice the rows make use of half the vectors.
    constexpr int kPaired = kWide == 4 && !std::is_same_v<Element, float> ? 8 : 4;
    const int paired = kPaired == 8 ? rows / 8 * 8 : 0;
    const int all = paired / 8 + ceil_div(rows - paired, 4);
    int turn = 0;
    if constexpr (kPaired == 8)
      for (int r = 0; r < paired; r += 8)
        values(std::integral_constant<int, 8>(), std::integral_constant<int, 2>(), {turn++, all},
               r);
    for (int r = paired; r < rows; r += 4)
      with_rows(rows - r, [&](auto count) {
        values(count, std::integral_constant<int, kWide>(), {turn++, all}, r);
      });
  }

  // Memory is asked for evenly while a step computes: turn `index` of `of` asks for its share of the
  // rows, one with each of its keys.
  struct Turn {
    int index;
    int of;
    Span share(int rows) const { return {rows * index / of, rows * (index + 1) / of}; }
  };

  // Calls body with min(rows, 4) as a constant.
  template <class Body>
  static void with_rows(int rows, const Body& body) {
    switch (std::min(rows, 4)) {
      case 1: return body(std::integral_constant<int, 1>());
      case 2: return body(std::integral_constant<int, 2>());
      case 3: return body(std::integral_constant<int, 3>());
      default: return body(std::integral_constant<int, 4>());
    }
  }

  // s[r][i] = q[r] · k[i]. Asks for the values of each key meanwhile, which are needed next.
  template <int kRows>
  void score_rows(const Word* q, const Block& block, Turn turn, float* s) const {
    const int columns = static_cast<int>(p_.q.head_dim());
    Span share = turn.share(block.count);
    for (int i = 0; i < block.count; i += kWide) {
      for (int j = 0; j < kWide && share.begin < share.end; ++j)
        prefetch_row(block.v[share.begin++], p_.v.head_dim());
      const Element* k[kWide];
      for (int j = 0; j < kWide; ++j) k[j] = i + j < block.count ? block.k[i + j] : nullptr;
      Vec acc[round_up(4 * kWide, Isa::kLanes)] = {};
      for (int word = 0; word < q_words_; word += Isa::kLanes) {
        typename Operand::Wide x[kWide];
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) x[j] = wide(load_words<Operand>(k[j], word, columns));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const typename Operand::Wide y = Operand::load(q + r * q_words_ + word);
#pragma GCC unroll 4
          for (int j = 0; j < kWide; ++j)
            acc[r * kWide + j] = Operand::multiply_add(acc[r * kWide + j], y, x[j]);
        }
      }
      float sums[4 * kWide];
#pragma GCC unroll 4
      for (int first = 0; first < 4 * kWide; first += Isa::kLanes) {
        Vec group[Isa::kLanes];
        std::copy_n(acc + first, Isa::kLanes, group);
        Isa::store(sums + first, reduce_rows(group, [](Vec a, Vec b) { return a + b; }));
      }
      for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kWide && i + j < block.count; ++j)
          s[r * kKeys + i + j] = sums[r * kWide + j];
    }
  }

  // o[r] = rescaled[r] * o[r] + sum over keys of p[r][i] * v[i]. Asks for the next step's keys
  // meanwhile.
  template <int kRows, int kVectors>
  void value_rows(const float* p, const Block& block, Turn turn, const Block& next,
                  const float* rescaled, float* o) const {
    using Values = F32Operand<Isa>;
    const int columns = static_cast<int>(p_.v.head_dim());
    for (int col = 0; col < columns; col += kVectors * Isa::kLanes) {
      Vec acc[kRows][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j)
          acc[r][j] = Isa::load(o + std::int64_t{r} * o_columns_ + col + j * Isa::kLanes) *
                      Isa::broadcast(rescaled[r]);
      const int step = kVectors * Isa::kLanes;
      const int steps = ceil_div(columns, step);
      Span share =
          Turn{turn.index * steps + col / step, turn.of * steps}.share(next.count);
      for (int i = 0; i < block.count; ++i) {
        if (share.begin < share.end) prefetch_row(next.k[share.begin++], p_.q.head_dim());
        if (block.v[i] == nullptr) continue;
        Vec v[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j)
          v[j] = load_words<Values>(block.v[i], col + j * Isa::kLanes, columns);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const Vec weight = Isa::broadcast(p[r * kKeys + i]);
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) acc[r][j] = Isa::fma(weight, v[j], acc[r][j]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j)
          Isa::store(o + std::int64_t{r} * o_columns_ + col + j * Isa::kLanes, acc[r][j]);
    }
  }

  static typename Operand::Wide wide(Vec x) { return (typename Operand::Wide)x; }

  static void prefetch_row(const Element* row, std::int64_t columns) {
    if (row == nullptr) return;
    const char* line = reinterpret_cast<const char*>(row);
    const std::int64_t bytes = columns * static_cast<std::int64_t>(sizeof(Element));
    for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at, 0, kLocality);
  }

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
          Isa::store(w.o + c,
                     Isa::fma(Isa::load(partial_o_ + i * o_columns_ + c), weight, Isa::load(w.o + c)));
      }
      store_output<C>(p_, at, head_of(at, head, r), r % at.q.length, w.o, all);
    }
  }

  static constexpr int kLocality = 2;  // prefetches to L2: those to L1 were slower
  static constexpr std::int64_t kTasks = 32;  // enough for any CPU to balance
  static constexpr std::int64_t kLeastWork = 1 << 16;  // multiplications worth a task of their own

  const ForwardProblem& p_;
  const ScoreTransform<Isa> transform_;
  const int workers_;
  const int splits_;
  int task_heads_ = 1;  // key heads of a task
  std::int64_t head_tasks_ = 1;
  const int rows_;       // query rows of one key head, at most
  const int q_words_;    // words of one query row, up to whole vectors
  const int o_columns_;  // head_dim_v, up to whole steps
  float* partial_o_ = nullptr;
  SoftmaxState* partial_state_ = nullptr;
  std::byte* scratch_ = nullptr;
  std::size_t scratch_bytes_ = 0;
  std::size_t bytes_ = 0;
};

template <class C>
constexpr KernelRow decode_row() {
  using Kernel = DecodeKernel<C>;
  return {.arch = C::Isa::kArch,
          .pass = Pass::decode,
          .dtype = C::kDType,
          .operand = DType::f32,
          .tile_m = 4,
          .tile_n = Kernel::kKeys,
          .max_head_dim = 512,
          .max_query_rows = Kernel::kMaxRows,
          .forward_bytes = Kernel::bytes,
          .forward = Kernel::launch,
          .backward_bytes = nullptr,
          .backward = nullptr,
          .few_query_rows = Kernel::kFewRows};
}

}  // namespace heed::cpu
