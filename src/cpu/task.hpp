// Addresses and per-row facts of a problem that every CPU kernel needs; compiled for the baseline.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/half.hpp"
#include "core/mask.hpp"
#include "core/philox.hpp"
#include "core/sequence.hpp"
#include "core/softmax_state.hpp"
#include "heed/problem.hpp"

namespace heed::cpu {

inline float scale_of(const ForwardProblem& p) {
  return p.score.scale.value_or(1.f / std::sqrt(static_cast<float>(p.q.head_dim())));
}

inline std::int64_t group_of(const ForwardProblem& p) {
  return p.k.heads() == 0 ? 1 : p.q.heads() / p.k.heads();
}

// Query rows, or keys, of the longest entry.
inline int longest(const ForwardProblem& p, SideSlice SequenceSlice::* side) {
  int length = 0;
  for (int entry = 0; entry < batch_entries(p); ++entry)
    length = std::max(length, (slice_of(p, entry).*side).length);
  return length;
}

// Element (row, 0) of one head of one entry, in a tensor laid out as q, out, dout, dq ...
template <class Element, class View>
auto* row_of(const View& x, const SideSlice& at, std::int64_t head, std::int64_t row) {
  using Byte = decltype(x.data);
  using Pointer = std::conditional_t<std::is_same_v<Byte, void*>, Element*, const Element*>;
  return static_cast<Pointer>(x.data) + at.batch * x.batch_stride() +
         (at.token + row) * x.seqlen_stride() + head * x.head_stride();
}

// Element (key, 0) of one head of k or v; nullptr when its page is unmapped or its validity bit is
// clear, so that nothing of such a key is ever read.
template <class Element>
const Element* key_row(const ForwardProblem& p, const ConstTensorView& x, const SequenceSlice& at,
                       std::int64_t head, int key) {
  if (!key_valid(p.intervals, at, key)) return nullptr;
  if (p.paged.page_table == nullptr) return row_of<Element>(x, at.k, head, key);
  const std::int64_t page_size = x.shape[1];
  const std::int64_t page = p.paged.page_table[at.entry * p.paged.max_pages + key / page_size];
  if (page < 0 || page >= x.shape[0]) return nullptr;
  return static_cast<const Element*>(x.data) + page * x.stride[0] +
         key % page_size * x.stride[1] + head * x.stride[2];
}

// Element index of bias (row, col) of one head; broadcast axes count as stride 0.
struct BiasRow {
  std::int64_t offset = 0;
  std::int64_t column_stride = 0;
};

template <class View>
BiasRow bias_row(const View& bias, const SequenceSlice& at, std::int64_t head, int row) {
  const auto stride = [&](int axis) { return bias.shape[axis] == 1 ? 0 : bias.stride[axis]; };
  return {at.entry * stride(0) + head * stride(1) + (at.q.slot + row) * stride(2) +
              at.k.slot * stride(3),
          stride(3)};
}

// out[i] = what bias adds to the score of key `key + i`, for i in [0, count): -inf where a bool hides.
inline void load_bias(const ConstTensorView& bias, BiasRow at, int key, int count, float* out) {
  const std::int64_t first = at.offset + key * at.column_stride;
  const auto convert = [&](const auto* data) {
    for (int i = 0; i < count; ++i)
      out[i] = static_cast<float>(to_float(data[first + i * at.column_stride]));
  };
  switch (bias.dtype) {
    case DType::f32: return convert(static_cast<const float*>(bias.data));
    case DType::bf16: return convert(static_cast<const bf16*>(bias.data));
    case DType::f16: return convert(static_cast<const f16*>(bias.data));
    case DType::f64: {
      const auto* data = static_cast<const double*>(bias.data);
      for (int i = 0; i < count; ++i)
        out[i] = static_cast<float>(data[first + i * at.column_stride]);
      return;
    }
    case DType::boolean: {
      const auto* data = static_cast<const std::uint8_t*>(bias.data);
      for (int i = 0; i < count; ++i)
        out[i] = data[first + i * at.column_stride] != 0 ? 0.f : -kInfinity;
      return;
    }
  }
}

// What a value that dropout keeps is multiplied by. P itself is only zeroed or left: its largest value, 1,
// would round to the same wrong bf16 in every row.
inline float dropout_scale(const ForwardProblem& p) {
  return 1.f / (1.f - p.dropout.probability);
}

// kept[i] = 1 where dropout keeps key `key + i` of a row, else 0; `key` is a multiple of 4.
inline void dropout_mask(const Dropout& dropout, int entry, std::int64_t head, int row, int key,
                         int count, float* kept) {
  const std::uint32_t threshold = dropout_threshold(dropout.probability);
  for (int i = 0; i < count; i += 4) {
    const PhiloxBlock words =
        dropout_words(*dropout.seed, entry, static_cast<int>(head), row, (key + i) / 4);
    for (std::size_t j = 0; j < 4; ++j)
      kept[i + static_cast<int>(j)] = words[j] >= threshold ? 1.f : 0.f;
  }
}

// Whether some tokens of the tensors may belong to no entry: their results are zeroed.
inline bool has_gaps(const ForwardProblem& p) {
  const Sequences& s = p.sequences;
  return s.cu_seqlens_q != nullptr || s.cu_seqlens_k != nullptr || s.start_q != nullptr ||
         s.start_k != nullptr || s.seqused_q != nullptr || s.seqused_k != nullptr;
}

// Into how many tasks the search for such tokens is cut; none where there can be no such token.
inline std::int64_t gap_tasks(const ForwardProblem& p) {
  return has_gaps(p) ? std::max<std::int64_t>(batch_entries(p), 1) : 0;
}

// Calls body(begin, end) for tokens of one side that belong to no entry, counted through a batch of
// `rows` each: those before and after entry `task` where it has a batch of its own, else those up to
// the next entry.
template <class Body>
void for_gaps(const ForwardProblem& p, std::int64_t task, SideSlice SequenceSlice::* side,
              std::int64_t rows, const Body& body) {
  const std::int64_t entries = batch_entries(p);
  const bool packed = (side == &SequenceSlice::q ? p.q : p.k).rank == 3;
  if (entries == 0) return body(0, packed ? rows : 0);
  const int entry = static_cast<int>(task);
  const SideSlice at = slice_of(p, entry).*side;
  const std::int64_t first = at.batch * rows;
  if (!packed || entry == 0) body(first, first + at.token);
  const std::int64_t next =
      packed && entry + 1 < entries ? (slice_of(p, entry + 1).*side).token : rows;
  body(first + at.token + at.length, first + next);
}

// Zeroes every head of one token; `token` counts through the batch.
template <class Element>
void zero_token(const TensorView& x, std::int64_t token) {
  if (x.heads() == 0) return;  // x.data may be null
  auto* row = static_cast<Element*>(x.data) + token / x.seqlen() * x.batch_stride() +
              token % x.seqlen() * x.seqlen_stride();
  for (std::int64_t head = 0; head < x.heads(); ++head)
    std::fill_n(row + head * x.head_stride(), x.head_dim(), Element{});
}

}  // namespace heed::cpu
