// What happens to one row of scores between the two products: softmax forward, its gradient backward.
#pragma once

#include <cstdint>

#include "cpu/pack.hpp"
#include "cpu/task.hpp"

namespace heed::cpu {

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

// 2^x within 1 ulp for -125 <= x < 128; 0 below; NaN stays NaN.
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

// Turns the scores [begin, end) of a row into unnormalised P, in place, and takes them into `state`.
// Returns the factor for what was accumulated before.
template <class Isa>
float softmax_update(float* s, Span columns, float factor, SoftmaxState& state) {
  using Vec = typename Isa::Vec;
  const Vec f = Isa::broadcast(factor);
  Vec most = Isa::broadcast(-kInfinity);
  for (int c = columns.begin; c < columns.end; c += Isa::kLanes)
    most = Isa::max(Isa::load(s + c) * f, most);
  const float tile_max = Isa::reduce_max(most);
  const float max = tile_max > state.max ? tile_max : state.max;
  // Without a visible key the maximum is -inf; 0 keeps (-inf) - max from being NaN, and a NaN score NaN.
  const Vec shift = Isa::broadcast(max == -kInfinity ? 0.f : -max);
  Vec sum = Isa::broadcast(0.f);
  for (int c = columns.begin; c < columns.end; c += Isa::kLanes) {
    const Vec e = exp2<Isa>(Isa::fma(Isa::load(s + c), f, shift));
    sum = sum + e;
    Isa::store(s + c, e);
  }
  float rescaled = 1.f;
  if (max != state.max)
    rescaled = state.max == -kInfinity ? 0.f
                                       : Isa::reduce_max(exp2<Isa>(Isa::broadcast(state.max - max)));
  state = {max, state.sum * rescaled + Isa::reduce_add(sum)};
  return rescaled;
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

}  // namespace heed::cpu
