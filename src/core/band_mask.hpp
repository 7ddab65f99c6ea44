// A band and a padding mask as key intervals and validity bits, as every backend writes them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/sequence.hpp"

namespace heed {

// out is [batch, seqlen_q + bit_rows, 2]: for every row the first and end key slot that it sees,
// then the validity bits of 64 slots a row, if there is a padding mask. The key in slot j stands at
// position j + kv_offset. Pointers are to the memory of the device that writes.
struct BandMask {
  static constexpr std::int64_t kFar = std::int64_t{1} << 30;  // beyond every position
  static constexpr int kSlotsPerRow = 64;

  std::int64_t batch = 0;
  std::int64_t seqlen_q = 0;
  std::int64_t slots = 0;
  std::int64_t kv_offset = 0;

  // Row i stands at position i + q_offset, plus positions[0] or, with per_row, positions[i] - i.
  std::int64_t q_offset = 0;
  const std::int64_t* positions = nullptr;
  bool per_row = false;

  // A row sees keys position - left to position + right of its own chunk; -1: no limit, 0: no
  // chunks.
  std::int64_t left = -1;
  std::int64_t right = -1;
  std::int64_t chunk = 0;
  const std::int64_t* chunk_start = nullptr;  // [batch] position of a chunk's begin; nullptr: 0

  // [batch or 1, known] by key position; keys past its end are not valid. nullptr: all are.
  const bool* padding = nullptr;
  std::int64_t padding_batch_stride = 0;
  std::int64_t padding_stride = 1;
  std::int64_t known = 0;

  // Self-attention: row i is the token of slot i, and where padding hides that slot the row sees
  // nothing.
  bool rows_are_slots = false;

  std::int32_t* out = nullptr;

  constexpr std::int64_t bit_rows() const {
    return padding == nullptr ? 0 : (slots + kSlotsPerRow - 1) / kSlotsPerRow;
  }
  constexpr std::int32_t* rows(std::int64_t entry) const {
    return out + entry * 2 * (seqlen_q + bit_rows());
  }
  constexpr std::int32_t* words(std::int64_t entry) const { return rows(entry) + 2 * seqlen_q; }
};

// Key slots [first, end); none if first >= end.
struct SlotRange {
  std::int64_t first = 0;
  std::int64_t end = 0;
};

constexpr bool slot_valid(const BandMask& m, std::int64_t entry, std::int64_t slot) {
  const std::int64_t position = slot + m.kv_offset;
  return slot < m.slots && position < m.known &&
         m.padding[entry * m.padding_batch_stride + position * m.padding_stride];
}

constexpr bool row_hidden(const BandMask& m, std::int64_t entry, std::int64_t row) {
  return m.rows_are_slots && m.padding != nullptr && !slot_valid(m, entry, row);
}

// What a row sees of the range from the first to the last valid slot.
constexpr SlotRange row_slots(const BandMask& m, std::int64_t entry, std::int64_t row,
                              const SlotRange& valid) {
  std::int64_t position = m.q_offset;
  if (!m.per_row) position += row;
  if (m.positions != nullptr) position += m.positions[m.per_row ? row : 0];
  std::int64_t first = m.left < 0 ? -BandMask::kFar : position - m.left;
  std::int64_t end = m.right < 0 ? BandMask::kFar : position + m.right + 1;
  if (m.chunk > 0) {
    const std::int64_t start = m.chunk_start == nullptr ? 0 : m.chunk_start[entry];
    const std::int64_t in_chunk = (position - start) % m.chunk;
    const std::int64_t chunk = position - (in_chunk < 0 ? in_chunk + m.chunk : in_chunk);
    first = first > chunk ? first : chunk;
    end = end < chunk + m.chunk ? end : chunk + m.chunk;
  }
  first -= m.kv_offset;
  end -= m.kv_offset;
  return {first > valid.first ? first : valid.first, end < valid.end ? end : valid.end};
}

constexpr void write_row(const BandMask& m, std::int64_t entry, std::int64_t row,
                         const SlotRange& valid) {
  const SlotRange range = row_hidden(m, entry, row) ? SlotRange{} : row_slots(m, entry, row, valid);
  std::int32_t* pair = m.rows(entry) + 2 * row;
  pair[0] = static_cast<std::int32_t>(clamp64(range.first, INT32_MIN, INT32_MAX));
  pair[1] = static_cast<std::int32_t>(clamp64(range.end, INT32_MIN, INT32_MAX));
}

}  // namespace heed
