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
  static constexpr int kMaxRows = 16;
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
    Word* q;   // [rows][q_words_], padded to whole vectors
    float* s;  // [rows][kKeys]
    float* o;  // [rows][o_columns_]
    float* kept;  // dropout mask of one row
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
    s.q = layout.add<Word>(std::int64_t{rows_} * q_words_);
    s.s = layout.add<float>(std::int64_t{rows_} * kKeys);
    s.o = layout.add<float>(std::int64_t{rows_} * o_columns_);
    s.kept = layout.add<float>(kKeys);
    return {s, layout.bytes()};
  }
  Scratch scratch(int worker) const {
    return carve(WorkspaceLayout({scratch_ + scratch_bytes_ * static_cast<std::size_t>(worker),
                                  scratch_bytes_}))
        .scratch;
  }

  void run(Executor& executor) {
    const std::int64_t heads = batch_entries(p_) * p_.k.heads();
    if (has_gaps(p_))
      parallel_for(executor, workers_, (p_.q.batch() * p_.q.seqlen() + 63) / 64,
                   [&](std::int64_t block, int) { clear_rows<Element>(p_, block * 64); });
    parallel_for(executor, workers_, heads * splits_, [&](std::int64_t task, int worker) {
      const int split = static_cast<int>(task % splits_);
      const std::int64_t head = task / splits_ % p_.k.heads();
      part(scratch(worker), slice_of(p_, static_cast<int>(task / splits_ / p_.k.heads())), head,
           split);
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

  void part(const Scratch& w, const SequenceSlice& at, std::int64_t head, int split) const {
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
      const auto* q = row_of<Element>(p_.q, at.q, head_of(at, head, r), r % at.q.length);
      for (int word = 0; word < q_words_; word += Isa::kLanes)
        Isa::store(reinterpret_cast<float*>(w.q + r * q_words_ + word),
                   load_words<Operand>(q, word, static_cast<int>(p_.q.head_dim())));
    }
    for (int r = 0; r < rows; ++r)
      if (limits[r].first >= limits[r].end) std::fill_n(w.q + r * q_words_, q_words_, Word{});
    std::fill_n(w.o, std::int64_t{rows} * o_columns_, 0.f);
    SoftmaxState state[kMaxRows];
    for (int key0 = seen.begin / kKeys * kKeys; key0 < seen.end; key0 += kKeys)
      step(w, at, head, rows, limits, {std::max(seen.begin, key0), std::min(seen.end, key0 + kKeys)},
           key0, state);
    for (int r = 0; r < rows; ++r) {
      const float* o = w.o + std::int64_t{r} * o_columns_;
      if (splits_ == 1) {
        store_output<C>(p_, at, head_of(at, head, r), r % at.q.length, o, state[r]);
      } else {
        const std::int64_t i = part_index(at, head, split, r);
        std::copy_n(o, o_columns_, partial_o_ + i * o_columns_);
        partial_state_[i] = state[r];
      }
    }
  }

  void step(const Scratch& w, const SequenceSlice& at, std::int64_t head, int rows,
            const RowLimits* limits, Span keys, int key0, SoftmaxState* state) const {
    const int live_keys = keys.end - keys.begin;
    const Element* k_rows[kKeys];
    const Element* v_rows[kKeys];
    for (int i = 0; i < live_keys; ++i) {
      k_rows[i] = key_row<Element>(p_, p_.k, at, head, keys.begin + i);
      v_rows[i] = key_row<Element>(p_, p_.v, at, head, keys.begin + i);
    }
    const int first = keys.begin - key0;
    for (int r = 0; r < rows; r += 4)
      with_rows(rows - r, [&](auto count) {
        score_rows<decltype(count)::value>(w.q + r * q_words_, k_rows, v_rows, live_keys,
                                           w.s + r * kKeys + first);
      });
    float rescaled[kMaxRows];
    const Span columns{0, kKeys};
    for (int r = 0; r < rows; ++r) {
      float* s = w.s + r * kKeys;
      const Span live = live_columns(limits[r], key0, columns);
      const std::int64_t q_head = head_of(at, head, r);
      const int row = r % at.q.length;
      transform_.apply(s, nullptr, columns, live, at, q_head, row, key0);
      rescaled[r] = softmax_update<Isa>(s, columns, transform_.factor(), state[r]);
      if (p_.dropout.probability > 0.f) {
        dropout_mask(p_.dropout, at.entry, q_head, row, key0, kKeys, w.kept);
        apply_factors<Isa>(s, w.kept, columns);
      }
    }
    for (int r = 0; r < rows; r += 4)
      with_rows(rows - r, [&](auto count) {
        value_rows<decltype(count)::value>(w.s + r * kKeys + first, v_rows, live_keys,
                                           rescaled + r, w.o + std::int64_t{r} * o_columns_);
      });
  }

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

  // s[r][i] = q[r] · k[i]. Asks for the values of each key meanwhile: they are needed next.
  template <int kRows>
  void score_rows(const Word* q, const Element* const* k_rows, const Element* const* v_rows,
                  int keys, float* s) const {
    const int columns = static_cast<int>(p_.q.head_dim());
    for (int i = 0; i < keys; i += kWide) {
      const Element* k[kWide];
      for (int j = 0; j < kWide; ++j) {
        k[j] = i + j < keys ? k_rows[i + j] : nullptr;
        if (i + j < keys) prefetch_row(v_rows[i + j], p_.v.head_dim());
        if (i + j + kAhead < keys) prefetch_row(k_rows[i + j + kAhead], p_.q.head_dim());
      }
      Vec acc[kRows][kWide] = {};
      for (int word = 0; word < q_words_; word += Isa::kLanes) {
        typename Operand::Wide x[kWide];
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) x[j] = wide(load_words<Operand>(k[j], word, columns));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const typename Operand::Wide y = Operand::load(q + r * q_words_ + word);
#pragma GCC unroll 4
          for (int j = 0; j < kWide; ++j) acc[r][j] = Operand::multiply_add(acc[r][j], y, x[j]);
        }
      }
      for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kWide && i + j < keys; ++j)
          s[r * kKeys + i + j] = Isa::reduce_add(acc[r][j]);
    }
  }

  // o[r] = rescaled[r] * o[r] + sum over keys of p[r][i] * v[i].
  template <int kRows>
  void value_rows(const float* p, const Element* const* v_rows, int keys, const float* rescaled,
                  float* o) const {
    using Values = F32Operand<Isa>;
    const int columns = static_cast<int>(p_.v.head_dim());
    for (int col = 0; col < columns; col += kWide * Isa::kLanes) {
      Vec acc[kRows][kWide];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j)
          acc[r][j] = Isa::load(o + std::int64_t{r} * o_columns_ + col + j * Isa::kLanes) *
                      Isa::broadcast(rescaled[r]);
      for (int i = 0; i < keys; ++i) {
        if (v_rows[i] == nullptr) continue;
        Vec v[kWide];
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j)
          v[j] = load_words<Values>(v_rows[i], col + j * Isa::kLanes, columns);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Vec weight = Isa::broadcast(p[r * kKeys + i]);
#pragma GCC unroll 4
          for (int j = 0; j < kWide; ++j) acc[r][j] = Isa::fma(weight, v[j], acc[r][j]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j)
          Isa::store(o + std::int64_t{r} * o_columns_ + col + j * Isa::kLanes, acc[r][j]);
    }
  }

  static typename Operand::Wide wide(Vec x) { return (typename Operand::Wide)x; }

  static void prefetch_row(const Element* row, std::int64_t columns) {
    if (row == nullptr) return;
    const char* line = reinterpret_cast<const char*>(row);
    const std::int64_t bytes = columns * static_cast<std::int64_t>(sizeof(Element));
    for (std::int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at);
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

  static constexpr int kAhead = 8;  // keys between a prefetch and its use

  const ForwardProblem& p_;
  const ScoreTransform<Isa> transform_;
  const int workers_;
  const int splits_;
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
          .backward = nullptr};
}

}  // namespace heed::cpu
