// What happens to one row of scores between the two products: softmax forward, its gradient backward.
#pragma once

#include <cstdint>

#include "cpu/pack.hpp"
#include "cpu/task.hpp"

namespace heed::cpu::inline HEED_ISA {

// 2^f - 1 for |f| <= 0.5, divided by f; minimax on that interval, relative error 8e-9.
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Vec exp2_quotient(typename Isa::Vec f) {
  auto q = Isa::broadcast(1.545316295e-4f);
  q = Isa::fma(q, f, Isa::broadcast(1.339086336e-3f));
  q = Isa::fma(q, f, Isa::broadcast(9.618082557e-3f));
  q = Isa::fma(q, f, Isa::broadcast(5.550357114e-2f));
  q = Isa::fma(q, f, Isa::broadcast(2.402265076e-1f));
  return Isa::fma(q, f, Isa::broadcast(6.931471880e-1f));
}

// 2^x for -125 <= x < 127, 0 below; NaN stays NaN. Within 0.88 ulp, without a fused multiply-add 1.15
// (exp2_test tries every fraction).
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Vec exp2(typename Isa::Vec x) {
  const auto n = Isa::round(x);
  const auto f = x - n;
  const auto p = Isa::fma(exp2_quotient<Isa>(f), f, Isa::broadcast(1.f));
  return Isa::scale_by_power(p, n, x);
}

// tanh(x) = e / (e + 2) with e = expm1(2 |x|), which keeps small x exact; 4 ulp.
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Vec tanh(typename Isa::Vec x) {
  using Vec = typename Isa::Vec;
  const Vec zero = Isa::broadcast(0.f);
  const Vec limit = Isa::broadcast(30.f);
  const Vec magnitude = Isa::max(x, zero - x);
  // min(magnitude, limit) that keeps NaN.
  const Vec z = (zero - Isa::max(zero - limit, zero - magnitude)) *
                Isa::broadcast(static_cast<float>(2 * kLog2e));
  const Vec n = Isa::round(z);
  const Vec f = z - n;
  const Vec power = Isa::scale_by_power(Isa::broadcast(1.f), n, n);
  const Vec e = Isa::fma(exp2_quotient<Isa>(f) * f, power, power - Isa::broadcast(1.f));
  const Vec t = e / (e + Isa::broadcast(2.f));
  // Copies the sign of x: t is even in x so far.
  return t * (x / Isa::max(magnitude, Isa::broadcast(1e-30f)));
}

// Fills s outside `live` but inside `columns`.
inline void fill_outside(float* s, Span columns, Span live, float value) {
  for (int c = columns.begin; c < std::min(live.begin, columns.end); ++c) s[c] = value;
  for (int c = std::max(live.end, columns.begin); c < columns.end; ++c) s[c] = value;
}

// What a row of scores goes through before the softmax: softcap, bias, mask.
template <class Isa>
struct ScoreTransform {
  using Vec = typename Isa::Vec;
  const ForwardProblem& p;
  float scale = scale_of(p);
  // Masked scores are -inf before they are multiplied, which only a positive scale leaves so.
  bool plain = scale > 0.f && p.score.softcap == 0.f && !p.bias;

  // What the softmax still has to multiply a transformed score by: log2 e, with the scale if plain.
  float factor() const {
    return static_cast<float>(plain ? double{scale} * kLog2e : kLog2e);
  }

  // Scores of one row in `columns` (multiples of kLanes), of which its interval lets `live` through;
  // the others become -inf. Column 0 is key `key0`. slope, if any, receives d score / d (scale * qk).
  void apply(float* s, float* slope, Span columns, Span live, const SequenceSlice& at,
             std::int64_t head, int row, int key0) const {
    if (!plain) {
      scale_and_cap(s, slope, columns);
      if (p.bias) add_bias(s, live, at, head, row, key0);
    }
    fill_outside(s, columns, live, -kInfinity);
    if (!all_keys_valid(p.intervals, at, key0 + live.begin, key0 + live.end))
      for (int c = live.begin; c < live.end; ++c)
        if (!key_valid(p.intervals, at, key0 + c)) s[c] = -kInfinity;
  }

  void scale_and_cap(float* s, float* slope, Span columns) const {
    const bool capped = p.score.softcap > 0.f;
    const Vec inner = Isa::broadcast(capped ? scale / p.score.softcap : scale);
    const Vec cap = Isa::broadcast(p.score.softcap);
    const Vec one = Isa::broadcast(1.f);
    for (int c = columns.begin; c < columns.end; c += Isa::kLanes) {
      Vec x = Isa::load(s + c) * inner;
      if (capped) {
        const Vec t = tanh<Isa>(x);
        if (slope != nullptr) Isa::store(slope + c, one - t * t);
        x = t * cap;
      }
      Isa::store(s + c, x);
    }
  }

  void add_bias(float* s, Span live, const SequenceSlice& at, std::int64_t head, int row,
                int key0) const {
    constexpr int kBlock = 64;
    float bias[kBlock];
    const BiasRow from = bias_row(p.bias, at, head, row);
    for (int c = live.begin; c < live.end; c += kBlock) {
      const int count = std::min(kBlock, live.end - c);
      load_bias(p.bias, from, key0 + c, count, bias);
      for (int i = 0; i < count; ++i) s[c + i] += bias[i];
    }
  }
};

// Columns of a row's interval inside a tile whose first key is key0.
inline Span live_columns(RowLimits limits, int key0, Span columns) {
  const Span live{std::max(limits.first - key0, columns.begin),
                  std::min(limits.end - key0, columns.end)};
  return live.empty() ? Span{columns.begin, columns.begin} : live;
}

// The same vector with neighbouring blocks of kBlock lanes exchanged.
template <int kBlock, class Vec, int... kLane>
[[gnu::always_inline]] inline Vec swap_blocks(Vec x, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, x, (kLane ^ kBlock)...);
}

// Lane r of every kRows lanes of the result is what `op` makes of the same kRows lanes of rows[r].
template <int kBlock = 1, class Vec, int kRows, class Op>
[[gnu::always_inline]] inline Vec reduce_lanes(Vec (&rows)[kRows], const Op& op) {
  constexpr int kLanes = sizeof(Vec) / sizeof(float);
  constexpr auto kLane = std::make_integer_sequence<int, kLanes>();
  if constexpr (kBlock < kRows) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; i += 2 * kBlock) {
      exchange_blocks<kBlock>(rows[i], rows[i + kBlock], kLane);
      rows[i] = op(rows[i], rows[i + kBlock]);
    }
    return reduce_lanes<2 * kBlock>(rows, op);
  } else {
    return rows[0];
  }
}

// Every lane of the result is what `op` makes of kBlock, 2 kBlock, ... lanes up to kEnd.
template <int kBlock, int kEnd, class Vec, class Op>
[[gnu::always_inline]] inline Vec reduce_across(Vec x, const Op& op) {
  if constexpr (kBlock < kEnd) {
    constexpr auto kLane = std::make_integer_sequence<int, sizeof(Vec) / sizeof(float)>();
    return reduce_across<2 * kBlock, kEnd>(op(x, swap_blocks<kBlock>(x, kLane)), op);
  } else {
    return x;
  }
}

// Lane r of the result, and every kRows lanes further on, is what `op` makes of all lanes of
// rows[r].
template <class Vec, int kRows, class Op>
[[gnu::always_inline]] inline Vec reduce_rows(Vec (&rows)[kRows], const Op& op) {
  return reduce_across<kRows, sizeof(Vec) / sizeof(float)>(reduce_lanes(rows, op), op);
}

// Lane r is lane r * kSpread of x; those without one are of `rest`.
template <int kSpread, class Vec, int... kLane>
[[gnu::always_inline]] inline Vec gather_lanes(Vec x, Vec rest,
                                               std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  return __builtin_shufflevector(x, rest, (kLane * kSpread < kLanes ? kLane * kSpread : kLanes)...);
}

// Lane l is lane l / kSpread of x.
template <int kSpread, class Vec, int... kLane>
[[gnu::always_inline]] inline Vec spread_lanes(Vec x, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(x, x, (kLane / kSpread)...);
}

// Statistics of the rows of a tile, by field, and the factor for what a row accumulated before its
// last scores. Softmax writes kLanes of each, so there is room for them.
template <class Isa, int kRows>
struct RowStatistics {
  float max[kRows + Isa::kLanes];
  float sum[kRows + Isa::kLanes];
  float rescaled[kRows + Isa::kLanes];
  float shift[kRows + Isa::kLanes];  // what is added to scores before exp2: -max, if it is finite

  RowStatistics() {
    std::fill_n(max, kRows + Isa::kLanes, -kInfinity);
    std::fill_n(sum, kRows + Isa::kLanes, 0.f);
    std::fill_n(shift, kRows + Isa::kLanes, 0.f);
  }
  SoftmaxState operator[](int row) const { return {max[row], sum[row]}; }
};

// The largest score of each lane of a row, -inf without any.
template <class Isa>
[[gnu::always_inline]] inline typename Isa::Vec lane_maxima(const float* s, Span columns) {
  auto even = Isa::broadcast(-kInfinity), odd = even;
  int c = columns.begin;
  for (; c + Isa::kLanes < columns.end; c += 2 * Isa::kLanes) {
    even = Isa::max(Isa::load(s + c), even);
    odd = Isa::max(Isa::load(s + c + Isa::kLanes), odd);
  }
  if (c < columns.end) even = Isa::max(Isa::load(s + c), even);
  return Isa::max(even, odd);
}

// Takes the largest scores of kLanes rows from `first` on, a lane each, into their maxima.
template <class Isa, int kRows>
void take_most(typename Isa::Vec most, int first, float factor, RowStatistics<Isa, kRows>& all) {
  using Vec = typename Isa::Vec;
  const Vec lowest = Isa::broadcast(std::numeric_limits<float>::lowest());
  const Vec before = Isa::load(all.max + first);
  const Vec max = Isa::max(most * Isa::broadcast(factor), before);
  // Without a visible key the maximum is -inf; the lowest number keeps (-inf) - max from being NaN.
  const Vec finite = Isa::max(max, lowest);
  Isa::store(all.max + first, max);
  Isa::store(all.rescaled + first, exp2<Isa>(Isa::max(before, lowest) - finite));
  Isa::store(all.shift + first, Isa::broadcast(0.f) - finite);
}

// Takes the scores [begin, end) of up to kGroup rows from `first` on, `lds` floats apart, into
// their maxima. Reductions and factors of the rows are computed together, a lane each: one by one,
// their latency would take as long as the exponentials. Lanes without a row see no score and keep
// their statistics; where there are at most kGroup rows, they get those of a row.
template <class Isa, int kGroup, int kRows>
void take_maxima(const float* s, int lds, int first, int rows, Span columns, float factor,
                 RowStatistics<Isa, kRows>& all) {
  using Vec = typename Isa::Vec;
  Vec most[kGroup];
  for (int r = 0; r < kGroup; ++r) most[r] = Isa::broadcast(-kInfinity);
  for (int r = 0; r < rows; ++r) most[r] = lane_maxima<Isa>(s + r * lds, columns);
  take_most<Isa>(reduce_rows(most, [](Vec a, Vec b) { return Isa::max(a, b); }), first, factor,
                 all);
}

// Takes the sums of the exponentials of kLanes rows from `first` on.
template <class Isa, int kRows>
void take_sum(typename Isa::Vec sum, int first, RowStatistics<Isa, kRows>& all) {
  Isa::store(all.sum + first, Isa::load(all.sum + first) * Isa::load(all.rescaled + first) + sum);
}

// Takes what the lanes of up to kGroup rows from `first` on add up to into their sums.
template <class Isa, int kGroup, int kRows>
void take_sums(typename Isa::Vec (&sums)[kGroup], int first, RowStatistics<Isa, kRows>& all) {
  using Vec = typename Isa::Vec;
  take_sum<Isa>(reduce_rows(sums, [](Vec a, Vec b) { return a + b; }), first, all);
}

// Turns the scores of one row into unnormalised P: exp2(factor * score + shift). P replaces the
// scores, or becomes words. Returns what each lane adds up to.
template <class Operand>
[[gnu::always_inline]] inline typename Operand::Isa::Vec exponentials(
    float* s, typename Operand::Word* words, Span columns, typename Operand::Isa::Vec factor,
    typename Operand::Isa::Vec shift) {
  using Isa = typename Operand::Isa;
  auto sum = Isa::broadcast(0.f);
  if constexpr (ByTiles<Operand>) {
    if (words != nullptr) {
      auto* const p = reinterpret_cast<bf16*>(words);
#pragma GCC unroll 2
      for (int c = columns.begin; c < columns.end; c += 2 * Isa::kLanes) {
        const auto low = exp2<Isa>(Isa::fma(Isa::load(s + c), factor, shift));
        const auto high = exp2<Isa>(Isa::fma(Isa::load(s + c + Isa::kLanes), factor, shift));
        Isa::store(p + c, low, high);
        sum = sum + (low + high);
      }
      return sum;
    }
  }
  for (int c = columns.begin; c < columns.end; c += Isa::kLanes) {
    const auto e = exp2<Isa>(Isa::fma(Isa::load(s + c), factor, shift));
    sum = sum + e;
    if constexpr (Operand::kDepth == 2) {
      if (words != nullptr) {
        Isa::store(reinterpret_cast<bf16*>(words) + c, e);
        continue;
      }
    }
    Isa::store(s + c, e);
  }
  return sum;
}

// Turns the scores [begin, end) of up to kLanes rows from `first` on into unnormalised P and takes
// them into `all`. Words of P are `ldw` apart.
template <class Operand, int kGroup, int kRows>
void softmax_group(float* s, int lds, int first, int rows, Span columns, float factor,
                   RowStatistics<typename Operand::Isa, kRows>& all, typename Operand::Word* words,
                   int ldw) {
  using Isa = typename Operand::Isa;
  using Vec = typename Isa::Vec;
  take_maxima<Isa, kGroup>(s, lds, first, rows, columns, factor, all);
  const Vec f = Isa::broadcast(factor);
  Vec sums[kGroup];
  for (int r = 0; r < kGroup; ++r) sums[r] = Isa::broadcast(0.f);
  for (int r = 0; r < rows; ++r)
    sums[r] = exponentials<Operand>(s + r * lds, words == nullptr ? nullptr : words + r * ldw,
                                    columns, f, Isa::broadcast(all.shift[first + r]));
  take_sums<Isa>(sums, first, all);
}

// With the statistics of four rows at hand, those of up to four cost a third of those of 16.
template <class Operand, int kRows>
void softmax_rows(float* s, int lds, int first, int rows, Span columns, float factor,
                  RowStatistics<typename Operand::Isa, kRows>& all,
                  typename Operand::Word* words, int ldw) {
  if (rows <= 4) {
    softmax_group<Operand, 4>(s, lds, first, rows, columns, factor, all, words, ldw);
  } else {
    softmax_group<Operand, Operand::Isa::kLanes>(s, lds, first, rows, columns, factor, all, words,
                                                 ldw);
  }
}

// The same for the kLanes / kSpread rows from `first` on of a vector, in a block of kBlock rows:
// s[key / kSpread][row][key % kSpread]. `keys` are whole vectors. P becomes words where the scores
// were, [word of keys][row], or `plain` floats.
template <class Operand, int kBlock, int kSpread, int kRows>
void softmax_lanes(float* s, Span keys, int first, float factor,
                   RowStatistics<typename Operand::Isa, kRows>& all, bool plain) {
  using Isa = typename Operand::Isa;
  using Vec = typename Isa::Vec;
  constexpr auto kLane = std::make_integer_sequence<int, Isa::kLanes>();
  constexpr int kStep = kBlock * kSpread;
  constexpr int kChains = 4;
  const auto of_rows = [&](Vec x, float rest, const auto& op) __attribute__((always_inline)) {
    return kSpread == 1 ? x
                        : gather_lanes<kSpread>(reduce_across<1, kSpread>(x, op),
                                                Isa::broadcast(rest), kLane);
  };
  const auto larger = [](Vec a, Vec b) { return Isa::max(a, b); };
  const auto sum = [](Vec a, Vec b) { return a + b; };
  float* const begin = s + keys.begin * kBlock;
  float* const end = s + keys.end * kBlock;
  Vec most[kChains];
  for (Vec& m : most) m = Isa::broadcast(-kInfinity);
  float* at = begin;
  for (; at + (kChains - 1) * kStep < end; at += kChains * kStep)
#pragma GCC unroll 4
    for (int j = 0; j < kChains; ++j) most[j] = larger(Isa::load(at + j * kStep), most[j]);
  for (; at < end; at += kStep) most[0] = larger(Isa::load(at), most[0]);
  take_most<Isa>(
      of_rows(larger(larger(most[0], most[1]), larger(most[2], most[3])), -kInfinity, larger),
      first, factor, all);
  const Vec f = Isa::broadcast(factor);
  const Vec shift = spread_lanes<kSpread>(Isa::load(all.shift + first), kLane);
  Vec sums[2] = {Isa::broadcast(0.f), Isa::broadcast(0.f)};
  const auto exponential = [&](float* x, Vec& total) __attribute__((always_inline)) {
    const Vec e = exp2<Isa>(Isa::fma(Isa::load(x), f, shift));
    total = total + e;
    return e;
  };
  for (at = begin; at + kStep < end; at += 2 * kStep) {
    const Vec even = exponential(at, sums[0]), odd = exponential(at + kStep, sums[1]);
    if constexpr (Operand::kDepth == 2) {
      if (!plain) {
        Isa::store_zipped(reinterpret_cast<std::uint32_t*>(s) + (at - s) / 2, even, odd);
        continue;
      }
    }
    Isa::store(at, even);
    Isa::store(at + kStep, odd);
  }
  if (at < end) Isa::store(at, exponential(at, sums[0]));
  take_sum<Isa>(of_rows(sums[0] + sums[1], 0.f, sum), first, all);
}

// C *= factor[row], where there is a factor other than 1.
template <class Isa>
void scale_rows(float* c, int ldc, int rows, int cols, const float* factor) {
  for (int r = 0; r < rows; ++r) {
    if (factor[r] == 1.f) continue;
    const auto f = Isa::broadcast(factor[r]);
    for (int col = 0; col < cols; col += Isa::kLanes)
      Isa::store(c + r * ldc + col, Isa::load(c + r * ldc + col) * f);
  }
}

// s *= factors * scale
template <class Isa>
void apply_factors(float* s, const float* factors, Span columns, float scale = 1.f) {
  const auto f = Isa::broadcast(scale);
  for (int c = columns.begin; c < columns.end; c += Isa::kLanes)
    Isa::store(s + c, Isa::load(s + c) * (Isa::load(factors + c) * f));
}

// s: scores -> P; dp: dP -> dS = P (dP - delta). Both in units where dq = scale * dS k.
template <class Isa>
void softmax_gradient(float* s, float* dp, Span columns, float factor, float lse_log2e,
                      float delta) {
  using Vec = typename Isa::Vec;
  const Vec f = Isa::broadcast(factor);
  const Vec shift = Isa::broadcast(-lse_log2e);
  const Vec d = Isa::broadcast(delta);
  for (int c = columns.begin; c < columns.end; c += Isa::kLanes) {
    const Vec e = exp2<Isa>(Isa::fma(Isa::load(s + c), f, shift));
    Isa::store(s + c, e);
    Isa::store(dp + c, e * (Isa::load(dp + c) - d));
  }
}

// One row of words for a product along the row: f32 as it is, or neighbouring pairs of bf16.
template <class Operand>
void to_words(const float* row, typename Operand::Word* words, Span columns) {
  using Isa = typename Operand::Isa;
  if constexpr (Operand::kDepth == 2)
    for (int c = columns.begin; c < columns.end; c += Isa::kLanes)
      Isa::store(reinterpret_cast<bf16*>(words) + c, Isa::load(row + c));
}

// A row of `count` floats times `factor`, stored in the tensor's type.
template <class Isa, class Element>
void store_row(Element* out, const float* row, std::int64_t count, float factor) {
  const auto f = Isa::broadcast(factor);
  std::int64_t c = 0;
  for (; c + Isa::kLanes <= count; c += Isa::kLanes) Isa::store(out + c, Isa::load(row + c) * f);
  for (; c < count; ++c) out[c] = from_float<Element>(row[c] * factor);
}

}  // namespace heed::cpu::inline HEED_ISA
