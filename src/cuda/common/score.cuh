// Score policies of the GPU kernels: what touches every score is a type.
#pragma once

#include <cstdint>

#include "core/half.hpp"
#include "core/philox.hpp"
#include "core/score.hpp"
#include "core/sequence.hpp"
#include "cuda/ptx/mma.cuh"
#include "heed/problem.hpp"

namespace heed::cuda {

// A query row of one head, counted within the entry.
struct Place {
  int row, head;
};

// A policy is made once per work item; `key` counts within the entry.
//   kScaled   value() is the identity up to the factor `factor`, so it folds into the exponent
//   kLocal    value() reads nothing but its argument; else it may be called for visible scores only
//   kDrops    keeps() may be false
//   value()   the logit in log2 units (times 1 / factor);   slope()  d value / d (scale_log2e qk)
struct PlainScore {
  static constexpr ScoreKind kKind = ScoreKind::plain;
  static constexpr bool kScaled = true, kLocal = true, kDrops = false;
  float factor;

  __device__ PlainScore(const BackwardProblem& b, const SequenceSlice& at, float scale)
      : PlainScore(b.forward, at, scale) {}
  __device__ PlainScore(const ForwardProblem&, const SequenceSlice&, float scale)
      : factor(scale * static_cast<float>(kLog2e)) {}
  __device__ __forceinline__ float value(float qk, Place, int) const { return qk * factor; }
  __device__ __forceinline__ float slope(float) const { return 1.f; }
};

struct SoftcapScore {
  static constexpr ScoreKind kKind = ScoreKind::softcap;
  static constexpr bool kScaled = false, kLocal = true, kDrops = false;
  Softcap cap;

  __device__ SoftcapScore(const BackwardProblem& b, const SequenceSlice& at, float scale)
      : SoftcapScore(b.forward, at, scale) {}
  __device__ SoftcapScore(const ForwardProblem& p, const SequenceSlice&, float scale)
      : cap(softcap_of(scale, p.score.softcap)) {}
  __device__ __forceinline__ float value(float qk, Place, int) const { return cap.value(qk); }
  __device__ __forceinline__ float slope(float qk) const { return cap.slope(cap.value(qk)); }
};

// Bias and dropout, with or without softcap: warp-uniform branches, since any of them costs more
// than the branch.
struct GeneralScore {
  static constexpr ScoreKind kKind = ScoreKind::general;
  static constexpr bool kScaled = false, kLocal = false, kDrops = true;
  float scale_log2e;
  Softcap cap;  // cap_log2e == 0: none
  const void* bias;
  DType bias_type;
  std::int64_t first, head_stride, row_stride, key_stride;  // elements of bias
  std::uint64_t seed;
  std::uint32_t threshold;  // 0: no dropout
  float kept;
  int entry;
  float* dbias = nullptr;  // backward, where the bias wants its gradient
  std::int64_t dbias_first = 0, dbias_head_stride = 0, dbias_row_stride = 0, dbias_key_stride = 0;

  __device__ GeneralScore(const BackwardProblem& b, const SequenceSlice& at, float scale)
      : GeneralScore(b.forward, at, scale) {
    dbias = static_cast<float*>(b.dbias.data);
    if (dbias == nullptr) return;
    const auto stride = [&](int axis) {
      return b.dbias.shape[axis] == 1 ? 0 : b.dbias.stride[axis];
    };
    dbias_row_stride = stride(2);
    dbias_key_stride = stride(3);
    dbias_head_stride = stride(1);
    dbias_first =
        at.entry * stride(0) + at.q.slot * dbias_row_stride + at.k.slot * dbias_key_stride;
  }
  __device__ GeneralScore(const ForwardProblem& p, const SequenceSlice& at, float scale)
      : scale_log2e(scale * static_cast<float>(kLog2e)),
        cap(p.score.softcap > 0 ? softcap_of(scale, p.score.softcap) : Softcap{0.f, 0.f}),
        bias(p.bias.data),
        bias_type(p.bias.dtype),
        first(0),
        head_stride(0),
        row_stride(0),
        key_stride(0),
        seed(p.dropout.probability > 0 ? *p.dropout.seed : 0),
        threshold(p.dropout.probability > 0 ? dropout_threshold(p.dropout.probability) : 0),
        kept(1.f / (1.f - p.dropout.probability)),
        entry(at.entry) {
    if (bias == nullptr) return;
    const auto stride = [&](int axis) { return p.bias.shape[axis] == 1 ? 0 : p.bias.stride[axis]; };
    row_stride = stride(2);
    key_stride = stride(3);
    head_stride = stride(1);
    first = at.entry * stride(0) + at.q.slot * row_stride + at.k.slot * key_stride;
  }

  static __device__ __noinline__ float load_bias(const void* bias, DType type, std::int64_t i) {
    switch (type) {
      case DType::f32: return static_cast<const float*>(bias)[i];
      case DType::bf16: return to_float(static_cast<const bf16*>(bias)[i]);
      case DType::f16: return to_float(static_cast<const f16*>(bias)[i]);
      case DType::f64: return static_cast<float>(static_cast<const double*>(bias)[i]);
      case DType::boolean: return static_cast<const std::uint8_t*>(bias)[i] != 0 ? 0.f : -kInfinity;
    }
    return 0.f;
  }
  __device__ float value(float qk, Place at, int key) const {
    const float x = cap.cap_log2e > 0 ? cap.value(qk) : qk * scale_log2e;
    if (bias == nullptr) return x;
    const float b = load_bias(
        bias, bias_type, first + at.head * head_stride + at.row * row_stride + key * key_stride);
    return fmaf(b, static_cast<float>(kLog2e), x);
  }
  __device__ float slope(float qk) const {
    return cap.cap_log2e > 0 ? cap.slope(cap.value(qk)) : 1.f;
  }
  // Broadcast axes add up, in any order; without them an element has one writer.
  __device__ __forceinline__ void add_gradient(Place at, int key, float ds) const {
    if (dbias != nullptr)
      atomicAdd(dbias + dbias_first + at.head * dbias_head_stride + at.row * dbias_row_stride +
                    key * dbias_key_stride,
                ds);
  }
  // Whether dropout keeps this entry of P, times `kept`.
  __device__ __forceinline__ bool keeps(Place at, int key) const {
    return threshold == 0 || draw(seed, entry, at.head, at.row, key) >= threshold;
  }

 private:
  // One text for all elements of a tile: ten rounds inlined a hundred times are what a compiler is
  // slow at.
  static __device__ __noinline__ std::uint32_t draw(std::uint64_t seed, int entry, int head,
                                                    int row, int key) {
    const PhiloxBlock words = dropout_words(seed, entry, head, row, key / 4);
    const std::uint32_t low = key % 2 == 0 ? words[0] : words[1];
    const std::uint32_t high = key % 2 == 0 ? words[2] : words[3];
    return key % 4 < 2 ? low : high;
  }
};

// The sign of a scale is taken out of it: a running maximum needs scale > 0. A scale of 0 becomes
// the smallest normal number, which keeps -inf (hidden) times scale from being NaN.
struct Scale {
  float size;
  bool negative;

  float value() const { return size == 1e-37f ? 0.f : negative ? -size : size; }
};
inline Scale scale_of(const ForwardProblem& p) {
  const float scale = p.score.scale.value_or(1.f / std::sqrt(static_cast<float>(p.q.head_dim())));
  const float size = std::fabs(scale);
  return {size < 1e-37f ? 1e-37f : size, scale < 0.f};
}

}  // namespace heed::cuda
