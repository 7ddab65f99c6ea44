// The mask, complete: every query row sees one interval of keys.
#pragma once

#include <cstdint>

#include "core/sequence.hpp"
#include "heed/problem.hpp"

namespace heed {

constexpr int min_of(int a, int b) { return a < b ? a : b; }
constexpr int max_of(int a, int b) { return a > b ? a : b; }
constexpr int ceil_div(int a, int b) { return a <= 0 ? -(-a / b) : (a - 1) / b + 1; }
constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -ceil_div(-a, b); }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Keys [first, end) of one query row, counted from the entry's first key; empty when first >= end.
struct RowLimits {
  int first = 0;
  int end = 0;
};

// The one place where masks meet: Band arithmetic, the entry's lengths, and the caller's intervals.
constexpr RowLimits row_limits(const Band& band, const SequenceSlice& at,
                               const KeyIntervals& intervals, int row) {
  const int position = row + at.diagonal();
  RowLimits r{max_of(0, position - band.left), min_of(at.k.length, position + band.right + 1)};
  if (band.chunk > 0) r.first = max_of(r.first, floor_div(position, band.chunk) * band.chunk);
  if (intervals.rows != nullptr) {
    const std::int32_t* pair = intervals.rows + at.q.batch * intervals.rows_batch_stride +
                               2 * (at.q.token + row);
    r.first = max_of(r.first, static_cast<int>(clamp64(
                                  std::int64_t{pair[0]} - at.k.slot, 0, at.k.length)));
    r.end = min_of(r.end, static_cast<int>(clamp64(
                              std::int64_t{pair[1]} - at.k.slot, 0, at.k.length)));
  }
  if (r.first >= r.end) return {};
  return r;
}

// Whether the validity bits let key `key` of the entry through.
constexpr bool key_valid(const KeyIntervals& intervals, const SequenceSlice& at, int key) {
  if (intervals.bits == nullptr) return true;
  const std::int64_t slot = std::int64_t{at.k.slot} + key;
  if (slot / 32 >= intervals.bits_words) return false;
  const std::uint32_t word =
      intervals.bits[at.entry * intervals.bits_batch_stride + slot / 32];
  return (word >> (slot % 32) & 1u) != 0;
}

// Whether the validity bits let all keys [first, end) of the entry through; reads a word per 32 keys.
constexpr bool all_keys_valid(const KeyIntervals& intervals, const SequenceSlice& at, int first,
                              int end) {
  if (intervals.bits == nullptr) return true;
  const std::uint32_t* words = intervals.bits + at.entry * intervals.bits_batch_stride;
  const std::int64_t slot_end = std::int64_t{at.k.slot} + end;
  if (slot_end > 32 * intervals.bits_words) return first >= end;
  for (std::int64_t slot = std::int64_t{at.k.slot} + first; slot < slot_end;) {
    const std::int64_t word_end = slot / 32 * 32 + 32;
    const std::int64_t stop = word_end < slot_end ? word_end : slot_end;
    const std::uint32_t wanted = ~0u >> (32 - (stop - slot)) << slot % 32;
    if ((words[slot / 32] & wanted) != wanted) return false;
    slot = stop;
  }
  return true;
}

// What a tile has to visit along the other axis, in closed form for a Band: some row (column) of the
// tile meets [begin, end), every one of them meets [interior_begin, interior_end).
struct TileRange {
  int begin = 0;
  int end = 0;
  int interior_begin = 0;
  int interior_end = 0;

  friend constexpr bool operator==(const TileRange&, const TileRange&) = default;
};

constexpr TileRange normalised(TileRange r) {
  if (r.begin >= r.end) return {};
  r.interior_begin = max_of(r.interior_begin, r.begin);
  r.interior_end = max_of(min_of(r.interior_end, r.end), r.interior_begin);
  return r;
}

// Keys that the query rows [row_begin, row_end) see.
constexpr TileRange kv_range(const Band& band, int row_begin, int row_end, int seqlen_q,
                             int seqlen_k) {
  row_end = min_of(row_end, seqlen_q);
  if (row_begin >= row_end) return {};
  const int top = row_begin + seqlen_k - seqlen_q;
  const int bottom = row_end - 1 + seqlen_k - seqlen_q;
  TileRange r{max_of(0, top - band.left), min_of(seqlen_k, bottom + band.right + 1),
              max_of(0, bottom - band.left), min_of(seqlen_k, top + band.right + 1)};
  if (band.chunk > 0) {
    r.begin = max_of(r.begin, floor_div(top, band.chunk) * band.chunk);
    r.interior_begin = max_of(r.interior_begin, floor_div(bottom, band.chunk) * band.chunk);
  }
  return normalised(r);
}

// Query rows that see the keys [col_begin, col_end): the transpose of kv_range.
constexpr TileRange q_range(const Band& band, int col_begin, int col_end, int seqlen_q,
                            int seqlen_k) {
  col_end = min_of(col_end, seqlen_k);
  if (col_begin >= col_end) return {};
  const int diagonal = seqlen_k - seqlen_q;
  int last = col_end - 1 + band.left;
  int interior_last = col_begin + band.left;
  if (band.chunk > 0) {
    last = min_of(last, ((col_end - 1) / band.chunk + 1) * band.chunk - 1);
    interior_last = min_of(interior_last, (col_begin / band.chunk + 1) * band.chunk - 1);
  }
  return normalised({max_of(0, col_begin - diagonal - band.right),
                     min_of(seqlen_q, last - diagonal + 1),
                     max_of(0, col_end - 1 - diagonal - band.right),
                     min_of(seqlen_q, interior_last - diagonal + 1)});
}

}  // namespace heed
