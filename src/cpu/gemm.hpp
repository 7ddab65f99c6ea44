// Register-tiled matrix products on packed operands: the two products of attention and their
// gradients are all C[rows, cols] (+)= A[rows, depth] B[depth, cols].
//
// Operands are 32-bit words: one f32, or two bf16 that are neighbours along depth. B stands in panels
// [panel][depth word][kPanel columns]; A is read word by word at constant strides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace heed::cpu::inline HEED_ISA {

template <class IsaT>
struct F32Operand {
  using Isa = IsaT;
  using Word = float;
  using Vec = typename Isa::Vec;
  using Wide = Vec;
  static constexpr int kDepth = 1;      // elements per word
  static constexpr int kDepthStep = 1;  // elements that a product takes at a time
  static Wide load(const Word* p) { return Isa::load(p); }
  static Vec mac(Vec acc, Word a, Wide b) { return Isa::accumulate(acc, Isa::broadcast(a), b); }
  static Vec multiply_add(Vec acc, Wide a, Wide b) { return Isa::fma(a, b, acc); }
};

template <class IsaT>
struct Bf16Operand {
  using Isa = IsaT;
  using Word = std::uint32_t;
  using Vec = typename Isa::Vec;
  using Wide = typename Isa::Pairs;
  static constexpr int kDepth = 2;
  static constexpr int kDepthStep = 2;
  static Wide load(const Word* p) { return Isa::load_pairs(p); }
  static Vec mac(Vec acc, Word a, Wide b) { return Isa::dot(acc, a, b); }
  static Vec multiply_add(Vec acc, Wide a, Wide b) { return Isa::dot(acc, a, b); }
};

// A by rows, B in panels as ever: what AMX multiplies, 32 x 32 sums and 32 of depth at a time.
template <class IsaT>
struct TileOperand : Bf16Operand<IsaT> {
  static constexpr int kDepthStep = 32;
};

template <class Isa>
concept HasTiles = requires {
  typename Isa::Tiles;
};
// Tiles are padded with zeros and have to be set up: from how many query rows and scores of a key
// head on they are faster than AVX-512's vectors (Xeons of family 6 models 167 and 207).
inline constexpr int kLeastTileRows = 5, kLeastTileScores = 144, kLeastTileScoresBackward = 1024;
template <class Operand>
concept ByTiles = std::is_same_v<Operand, TileOperand<typename Operand::Isa>>;

// What a task does before its first product.
template <class Isa>
struct Tiles {
  explicit Tiles(int = 0) {}
};
template <HasTiles Isa>
struct Tiles<Isa> : Isa::Tiles {
  using Isa::Tiles::Tiles;
};

// Words of so many elements, up to what a product takes at a time.
template <class Operand>
constexpr int depth_words(std::int64_t elements) {
  constexpr int kStep = Operand::kDepthStep;
  return static_cast<int>((elements + kStep - 1) / kStep * (kStep / Operand::kDepth));
}

template <class Isa>
inline constexpr int kPanel = 2 * Isa::kLanes;  // columns of one panel of B

// What a product asks the caches for while it computes: `step` bytes further on with every
// kProductStep words of depth.
struct Ahead {
  const char* at;
  std::ptrdiff_t step;
};

// The part that product `turn` of `turns` asks for, of a panel as deep as theirs: all of it if they
// are enough to ask for a cache line at a time.
template <class Isa, class Word>
Ahead part_of_panel(const Word* panel, int depth, int turn, int turns) {
  constexpr std::ptrdiff_t kLine = kPanel<Isa> * sizeof(Word);
  return {reinterpret_cast<const char*>(panel) + kLine * depth * turn / turns,
          std::min<std::ptrdiff_t>(Isa::kProductStep * kLine / turns, 64)};
}

// Rows in memory that are needed soon. Products ask for one of them every few words of depth, in
// the order of memory, so that it works while they do. In bursts, products stand still behind them.
class RowsAhead {
 public:
  // At least one row, `stride` elements apart.
  template <class Element>
  void add(const Element* row, std::int64_t stride, std::int64_t rows, std::int64_t columns) {
    const auto size = static_cast<std::int64_t>(sizeof(Element));
    lists_[end_++] = {reinterpret_cast<const char*>(row), stride * size, columns * size, rows};
    rows_ += rows;
  }
  // Has them all asked for while products take so many words of depth, where there are enough.
  void spread(std::int64_t words) {
    constexpr std::int64_t kLeast = 8, kMost = 1 << 20;
    every_ = static_cast<int>(std::clamp(words / std::max<std::int64_t>(rows_, 1), kLeast, kMost));
  }
  // Words from one row to the next, for a product of `depth` words.
  int every(int depth) const { return now_ == end_ ? depth : every_; }
  // Asks for those that are due after so many words more.
  [[gnu::always_inline]] void pass(int words) {
    for (passed_ += words; passed_ >= every_; passed_ -= every_) ask();
  }
  [[gnu::always_inline]] void ask() {
    if (now_ == end_) return;
    List& list = lists_[now_];
    for (std::int64_t at = 0; at < list.bytes; at += 64) __builtin_prefetch(list.row + at, 0, 2);
    list.row += list.stride;
    if (--list.rows == 0) ++now_;
  }

 private:
  struct List {
    const char* row;
    std::int64_t stride, bytes, rows;
  };
  List lists_[5];
  int now_ = 0, end_ = 0, every_ = 1, passed_ = 0;
  std::int64_t rows_ = 0;
};

// How C takes the product: C = AB, C += AB, or C = factor[row] * C + AB.
enum class Update { store, add, scale_add };

// C[kMicroRows, kVectors * kLanes] from the first columns of one panel of B. Word (row, depth) of A
// is a[row * kRow + depth * kDepthStride]. A panel of B that comes from beyond L2 is used by a few
// products only: without `ahead` the first of them waits for it, which costs a tenth of the time of
// a long sequence.
template <class Operand, int kRow, int kDepthStride, Update kUpdate, int kVectors = 2>
[[gnu::always_inline]] inline void micro_product(const typename Operand::Word* a,
                                                 const typename Operand::Word* b, int depth,
                                                 float* c, int ldc, const float* factor,
                                                 Ahead ahead, RowsAhead* rows_ahead) {
  using Isa = typename Operand::Isa;
  using Vec = typename Isa::Vec;
  constexpr int kRows = Isa::kMicroRows;
  Vec acc[kRows][kVectors] = {};
  const auto multiply = [&](int at) __attribute__((always_inline)) {
    typename Operand::Wide panel[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j)
      panel[j] = Operand::load(b + at * kPanel<Isa> + j * Isa::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const typename Operand::Word word = a[r * kRow + at * kDepthStride];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) acc[r][j] = Operand::mac(acc[r][j], word, panel[j]);
    }
  };
  constexpr int kStep = Isa::kProductStep;
  const int every =
      rows_ahead == nullptr ? depth : std::max(rows_ahead->every(depth) / kStep * kStep, kStep);
  for (int k = 0; k < depth;) {
    if (rows_ahead != nullptr) rows_ahead->ask();
    const int end = std::min(k + every, depth);
    for (; k + kStep <= end; k += kStep) {
      __builtin_prefetch(ahead.at);
      ahead.at += ahead.step;
#pragma GCC unroll 4
      for (int at = 0; at < kStep; ++at) multiply(at);
      a += kStep * kDepthStride;
      b += kStep * kPanel<Isa>;
    }
    if constexpr (kStep > 1)
      for (; k < end; ++k, a += kDepthStride, b += kPanel<Isa>) multiply(0);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + r * ldc + j * Isa::kLanes;
      if constexpr (kUpdate == Update::add) {
        acc[r][j] = acc[r][j] + Isa::load(to);
      } else if constexpr (kUpdate == Update::scale_add) {
        acc[r][j] = Isa::fma(Isa::broadcast(factor[r]), Isa::load(to), acc[r][j]);
      }
      Isa::store(to, acc[r][j]);
    }
}

// The same for 32 rows of A, `lda` words apart, by tiles.
template <ByTiles Operand, Update kUpdate>
[[gnu::always_inline]] inline void tile_product(const typename Operand::Word* a, int lda,
                                                const typename Operand::Word* b, int depth,
                                                float* c, int ldc, RowsAhead* rows_ahead) {
  using Isa = typename Operand::Isa;
  constexpr int kRows = Isa::kTileRows, kWords = Isa::kTileWords;
  float* const below = c + kRows * ldc;
  if constexpr (kUpdate == Update::store) {
    Isa::template zero_tile<0>();
    Isa::template zero_tile<1>();
    Isa::template zero_tile<2>();
    Isa::template zero_tile<3>();
  } else {
    Isa::template load_tile<0>(c, ldc);
    Isa::template load_tile<1>(c + kWords, ldc);
    Isa::template load_tile<2>(below, ldc);
    Isa::template load_tile<3>(below + kWords, ldc);
  }
  for (int k = 0; k < depth; k += kWords) {
    if (rows_ahead != nullptr) rows_ahead->pass(kWords);
    Isa::template load_tile<6>(b + k * kPanel<Isa>, kPanel<Isa>);
    Isa::template load_tile<4>(a + k, lda);
    Isa::template load_tile<7>(b + k * kPanel<Isa> + kWords, kPanel<Isa>);
    Isa::template load_tile<5>(a + kRows * lda + k, lda);
    Isa::template multiply_tiles<0, 4, 6>();
    Isa::template multiply_tiles<1, 4, 7>();
    Isa::template multiply_tiles<2, 5, 6>();
    Isa::template multiply_tiles<3, 5, 7>();
  }
  Isa::template store_tile<0>(c, ldc);
  Isa::template store_tile<1>(c + kWords, ldc);
  Isa::template store_tile<2>(below, ldc);
  Isa::template store_tile<3>(below + kWords, ldc);
}

// Columns (for S, dP) or depth (for the products with P and dS) that a group of kMicroRows rows needs.
struct Span {
  int begin = 0;
  int end = 0;
  bool empty() const { return begin >= end; }
};

// C[:, span] = A B for every group of rows; spans begin at multiples of kPanel and end at multiples
// of kLanes. A: panels of kMicroRows rows, by tiles rows of `depth` words.
template <class Operand>
void product_columns(const typename Operand::Word* a, const typename Operand::Word* b, int depth,
                     float* c, int ldc, const Span* spans, int groups, int cols,
                     RowsAhead* rows_ahead) {
  using Isa = typename Operand::Isa;
  constexpr int kRows = Isa::kMicroRows;
  for (int col = 0; col < cols; col += kPanel<Isa>, b += std::int64_t{depth} * kPanel<Isa>)
    for (int g = 0; g < groups; ++g) {
      if (col < spans[g].begin || spans[g].end <= col) continue;
      if constexpr (ByTiles<Operand>) {
        tile_product<Operand, Update::store>(a + std::int64_t{g} * depth * kRows, depth, b, depth,
                                             c + g * kRows * ldc + col, ldc, rows_ahead);
      } else {
        const Ahead ahead =
            part_of_panel<Isa>(b + std::int64_t{depth} * kPanel<Isa>, depth, g, groups);
        const auto product = [&](auto vectors) __attribute__((always_inline)) {
          micro_product<Operand, 1, kRows, Update::store, decltype(vectors)::value>(
              a + std::int64_t{g} * depth * kRows, b, depth, c + g * kRows * ldc + col, ldc,
              nullptr, ahead, rows_ahead);
        };
        if (spans[g].end - col > Isa::kLanes) {
          product(std::integral_constant<int, 2>());
        } else {
          product(std::integral_constant<int, 1>());
        }
      }
    }
}

// C (+)= A B over cols / kPanel panels of B, `panel_stride` words apart; each group of rows has its
// own range of depth (elements; multiples of kDepth). A is stored by rows of kLda words.
template <class Operand, int kLda, Update kUpdate>
void product_depth(const typename Operand::Word* a, const typename Operand::Word* b,
                   std::int64_t panel_stride, float* c, int ldc, const Span* spans, int groups,
                   int cols, const float* factor, RowsAhead* rows_ahead) {
  using Isa = typename Operand::Isa;
  constexpr int kRows = Isa::kMicroRows;
  const auto* const first_panel = b;
  for (int col = 0; col < cols; col += kPanel<Isa>, b += panel_stride)
    for (int g = 0; g < groups; ++g) {
      if (spans[g].empty()) continue;
      const int first = spans[g].begin / Operand::kDepth;
      const int depth = spans[g].end / Operand::kDepth - first;
      const auto* const rows = a + g * kRows * kLda + first;
      const auto* const panel = b + std::int64_t{first} * kPanel<Isa>;
      float* const to = c + g * kRows * ldc + col;
      if constexpr (ByTiles<Operand>) {
        static_assert(kUpdate == Update::add);
        tile_product<Operand, kUpdate>(rows, kLda, panel, depth, to, ldc, rows_ahead);
      } else {
        // After the last panel comes the first one again, further down.
        const bool last = col + kPanel<Isa> >= cols;
        const auto* next = last ? first_panel + std::int64_t{first + depth} * kPanel<Isa>
                                : b + panel_stride + std::int64_t{first} * kPanel<Isa>;
        micro_product<Operand, kLda, 1, kUpdate>(
            rows, panel, depth, to, ldc, factor == nullptr ? nullptr : factor + g * kRows,
            part_of_panel<Isa>(next, depth, g, groups), rows_ahead);
      }
    }
}

// C[rows, cols] += Aᵀ B for the rows in `rows` (multiples of kMicroRows) and `depth` elements; word
// (row, depth) of Aᵀ is a[row + depth * kLda].
template <class Operand, int kLda>
void product_transposed(const typename Operand::Word* a, const typename Operand::Word* b,
                        std::int64_t panel_stride, float* c, int ldc, Span rows, Span depth,
                        int cols) {
  using Isa = typename Operand::Isa;
  const int first = depth.begin / Operand::kDepth;
  const int words = depth.end / Operand::kDepth - first;
  for (int col = 0; col < cols; col += kPanel<Isa>, b += panel_stride)
    for (int row = rows.begin; row < rows.end; row += Isa::kMicroRows)
      micro_product<Operand, 1, kLda, Update::add>(
          a + row + first * kLda, b + std::int64_t{first} * kPanel<Isa>, words,
          c + row * ldc + col, ldc, nullptr,
          part_of_panel<Isa>(b + panel_stride + std::int64_t{first} * kPanel<Isa>, words,
                             (row - rows.begin) / Isa::kMicroRows,
                             (rows.end - rows.begin) / Isa::kMicroRows),
          nullptr);
}

}  // namespace heed::cpu::inline HEED_ISA
