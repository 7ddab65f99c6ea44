// Rows of a tensor, converted to words and laid out as the products read them; what a row lacks is 0.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/half.hpp"
#include "core/mask.hpp"
#include "cpu/gemm.hpp"

namespace heed::cpu::inline HEED_ISA {

// kLanes words of a row from its element `source` on.
template <class Operand, class Element>
[[gnu::always_inline]] inline typename Operand::Isa::Vec load_whole(const Element* source) {
  using Isa = typename Operand::Isa;
  if constexpr (Operand::kDepth == 1) {
    return Isa::load(source);
  } else {
    return Isa::load(reinterpret_cast<const float*>(source));
  }
}

// Copies up to kLanes words of one row: converted to f32, or raw pairs of bf16. nullptr reads as 0.
template <class Operand, class Element>
[[gnu::always_inline]] inline typename Operand::Isa::Vec load_words(const Element* row, int word,
                                                                    int columns) {
  using Isa = typename Operand::Isa;
  if (row == nullptr) return Isa::broadcast(0.f);
  const int at = word * Operand::kDepth;
  const int rest = columns - at;
  constexpr int kElements = Isa::kLanes * Operand::kDepth;
  const Element* source = row + at;
  Element tail[kElements];
  if (rest < kElements) {
    std::memset(static_cast<void*>(tail), 0, sizeof tail);
    if (rest > 0) std::memcpy(static_cast<void*>(tail), source, sizeof(Element) * rest);
    source = tail;
  }
  return load_whole<Operand>(source);
}

// Exchanges blocks of kBlock lanes between two rows of a square: one step of a transpose.
template <int kBlock, class Vec, int... kLane>
[[gnu::always_inline]] inline void exchange_blocks(Vec& a, Vec& b,
                                                   std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  const Vec low = __builtin_shufflevector(
      a, b, ((kLane / kBlock) % 2 == 0 ? kLane : kLanes + kLane - kBlock)...);
  b = __builtin_shufflevector(
      a, b, ((kLane / kBlock) % 2 == 0 ? kLane + kBlock : kLanes + kLane)...);
  a = low;
}

template <int kBlock, class Vec, int kLanes>
[[gnu::always_inline]] inline void transpose_steps(Vec (&rows)[kLanes]) {
  if constexpr (kBlock < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if ((i & kBlock) == 0)
        exchange_blocks<kBlock>(rows[i], rows[i + kBlock],
                                std::make_integer_sequence<int, kLanes>());
    transpose_steps<2 * kBlock>(rows);
  }
}

// Panels of kWidth rows: out[panel][word][row in panel]. row(i) is row i's first element or nullptr.
// Writes up to kLanes words past the end.
template <class Operand, int kWidth, class RowOf>
void pack_transposed(const RowOf& row, int rows, int columns, typename Operand::Word* out) {
  using Isa = typename Operand::Isa;
  using Vec = typename Isa::Vec;
  constexpr int kLanes = Isa::kLanes;
  const int words = depth_words<Operand>(columns);
  using Element = std::remove_cvref_t<decltype(*row(0))>;
  for (int panel = 0; panel < rows; panel += kWidth, out += std::int64_t{words} * kWidth) {
    const Element* sources[round_up(kWidth, kLanes)] = {};
    for (int i = 0; i < kWidth && panel + i < rows; ++i) sources[i] = row(panel + i);
    for (int word = 0; word < words; word += kLanes) {
      const int live = words - word < kLanes ? words - word : kLanes;
      for (int part = 0; part < kWidth; part += kLanes) {
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          square[i] = load_words<Operand>(sources[part + i], word, columns);
        transpose_steps<1>(square);
        // Ascending: a panel narrower than kLanes spills into the next word, which overwrites it.
        for (int i = 0; i < live; ++i)
          Isa::store(reinterpret_cast<float*>(out) + std::int64_t{word + i} * kWidth + part,
                     square[i]);
      }
    }
  }
}

// Rows as a product takes them for A: panels of kMicroRows of them, or, by tiles, one after the
// other up to whole groups of kMicroRows.
template <class Operand, class RowOf>
void pack_rows(const RowOf& row, int rows, int columns, typename Operand::Word* out) {
  using Isa = typename Operand::Isa;
  using Element = std::remove_cvref_t<decltype(*row(0))>;
  if constexpr (ByTiles<Operand>) {
    const int words = depth_words<Operand>(columns);
    for (int r = 0; r < round_up(rows, Isa::kMicroRows); ++r, out += words) {
      const Element* source = r < rows ? row(r) : nullptr;
      for (int word = 0; word < words; word += Isa::kLanes)
        Isa::store(reinterpret_cast<float*>(out + word),
                   load_words<Operand>(source, word, columns));
    }
  } else {
    pack_transposed<Operand, Isa::kMicroRows>(row, rows, columns, out);
  }
}

// Panels of kPanel columns: out[panel][depth word][column], `panel_stride` words from panel to panel.
// Rows are depth; those in [rows, padded) are 0.
template <class Operand, class RowOf>
void pack_natural(const RowOf& row, int rows, int padded, int columns,
                  typename Operand::Word* out, std::int64_t panel_stride) {
  using Isa = typename Operand::Isa;
  using Element = std::remove_cvref_t<decltype(*row(0))>;
  constexpr int kLanes = Isa::kLanes;
  for (int r = 0; r < padded; r += Operand::kDepth) {
    typename Operand::Word* line = out + std::int64_t{r / Operand::kDepth} * kPanel<Isa>;
    const Element* even = r < rows ? row(r) : nullptr;
    if constexpr (Operand::kDepth == 1) {
      for (int col = 0; col < columns; col += kPanel<Isa>, line += panel_stride)
        for (int part = 0; part < kPanel<Isa>; part += kLanes)
          Isa::store(line + part, load_words<Operand>(even, col + part, columns));
    } else {
      const Element* odd = r + 1 < rows ? row(r + 1) : nullptr;
      for (int col = 0; col < columns; col += kPanel<Isa>, line += panel_stride)
        for (int part = 0; part < kPanel<Isa>; part += kLanes) {
          Element lanes[2][kLanes] = {};
          const int rest = columns - col - part;
          const int count = rest < 0 ? 0 : rest < kLanes ? rest : kLanes;
          const Element* sources[2] = {even, odd};
          for (int i = 0; i < 2; ++i) {
            if (sources[i] == nullptr) {
              sources[i] = lanes[i];
            } else if (count < kLanes) {
              if (count > 0)
                std::memcpy(static_cast<void*>(lanes[i]), sources[i] + col + part,
                            sizeof(Element) * count);
              sources[i] = lanes[i];
            } else {
              sources[i] += col + part;
            }
          }
          Isa::store_zipped(line + part, sources[0], sources[1]);
        }
    }
  }
}

}  // namespace heed::cpu::inline HEED_ISA
