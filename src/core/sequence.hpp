// Where one batch entry's tokens are, whatever the layout: the only thing kernels know of layouts.
#pragma once

#include <cstdint>

#include "heed/problem.hpp"

namespace heed {

// One side (q or k) of one batch entry. Token t of the entry is row `token + t` of tensor row `batch`.
struct SideSlice {
  std::int64_t batch = 0;  // index in the tensor's batch axis; 0 when packed
  std::int64_t token = 0;  // first token
  int length = 0;
  int slot = 0;  // slot of the first token: what key intervals, validity bits and bias count in
};

struct SequenceSlice {
  int entry = 0;
  SideSlice q, k;

  // Key position of query row 0: the last row stands at the last key.
  constexpr int diagonal() const { return k.length - q.length; }
};

constexpr std::int64_t clamp64(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// `rows`: the tensor's seqlen axis (packed: total tokens). Contents of the arrays are clamped, so no
// value of theirs leads outside the tensor.
constexpr SideSlice side_slice(int entry, std::int64_t rows, const std::int32_t* cu_seqlens,
                               const std::int32_t* start, const std::int32_t* seqused,
                               std::int64_t max_seqlen) {
  SideSlice at;
  std::int64_t length = rows;
  if (cu_seqlens != nullptr) {
    at.token = clamp64(cu_seqlens[entry], 0, rows);
    length = clamp64(cu_seqlens[entry + 1], at.token, rows) - at.token;
    if (max_seqlen > 0 && length > max_seqlen) length = max_seqlen;
  } else {
    at.batch = entry;
    if (start != nullptr) {
      at.token = clamp64(start[entry], 0, rows);
      length = rows - at.token;
      at.slot = static_cast<int>(at.token);
    }
  }
  if (seqused != nullptr) length = clamp64(seqused[entry], 0, length);
  at.length = static_cast<int>(length);
  return at;
}

// Key slots that one entry can have: the tensor's rows, or all its pages.
constexpr std::int64_t key_capacity(const ForwardProblem& p) {
  return p.paged.page_table != nullptr ? p.paged.max_pages * p.k.shape[1] : p.k.seqlen();
}

constexpr std::int64_t batch_entries(const ForwardProblem& p) {
  return p.q.rank == 4 ? p.q.shape[0] : p.sequences.batch;
}

constexpr std::int64_t max_seqlen_q(const ForwardProblem& p) {
  const std::int64_t bound = p.sequences.max_seqlen_q;
  return p.q.rank == 3 && bound > 0 && bound < p.q.seqlen() ? bound : p.q.seqlen();
}

constexpr std::int64_t max_seqlen_k(const ForwardProblem& p) {
  const std::int64_t bound = p.sequences.max_seqlen_k;
  return p.k.rank == 3 && bound > 0 && bound < p.k.seqlen() ? bound : key_capacity(p);
}

constexpr SequenceSlice slice_of(const ForwardProblem& p, int entry) {
  const Sequences& s = p.sequences;
  return {entry,
          side_slice(entry, p.q.seqlen(), s.cu_seqlens_q, s.start_q, s.seqused_q, s.max_seqlen_q),
          side_slice(entry, key_capacity(p), s.cu_seqlens_k, s.start_k, s.seqused_k,
                     s.max_seqlen_k)};
}

// Element of lse, delta and dlse: [batch, heads_q, seqlen_q], packed [heads_q, total_q].
constexpr std::int64_t lse_index(const ForwardProblem& p, const SequenceSlice& at, int head,
                                 std::int64_t row) {
  return (at.q.batch * p.q.heads() + head) * p.q.seqlen() + at.q.token + row;
}

}  // namespace heed
