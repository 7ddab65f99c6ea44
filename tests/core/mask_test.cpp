// Band arithmetic against its definition, on every small problem.
#include "core/mask.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace heed {
namespace {

constexpr int kMost = 9;

// The definition, from the comment on Band.
bool visible(const Band& band, int row, int key, int seqlen_q, int seqlen_k) {
  const int position = row + seqlen_k - seqlen_q;
  if (key < 0 || key >= seqlen_k) return false;
  if (band.left != kUnbounded && key < position - band.left) return false;
  if (band.right != kUnbounded && key > position + band.right) return false;
  if (band.chunk == 0) return true;
  int chunk_begin = 0;  // the largest multiple of chunk up to position
  while (chunk_begin > position) chunk_begin -= band.chunk;
  while (chunk_begin + band.chunk <= position) chunk_begin += band.chunk;
  return key >= chunk_begin;
}

std::vector<Band> bands() {
  std::vector<Band> all;
  for (const int left : {0, 1, 2, 4, 8, kUnbounded})
    for (const int right : {0, 1, 2, 4, 8, kUnbounded})
      for (const int chunk : {0, 1, 2, 3, 5, 16}) all.push_back({left, right, chunk});
  return all;
}

SequenceSlice slice(int seqlen_q, int seqlen_k) {
  return {0, {0, 0, seqlen_q, 0}, {0, 0, seqlen_k, 0}};
}

std::string text(const Band& band, int seqlen_q, int seqlen_k, int begin, int end,
                 const TileRange& r) {
  const auto number = [](int x) { return std::to_string(x); };
  return "left " + number(band.left) + " right " + number(band.right) + " chunk " +
         number(band.chunk) + " seqlen_q " + number(seqlen_q) + " seqlen_k " + number(seqlen_k) +
         " tile [" + number(begin) + ", " + number(end) + "): [" + number(r.begin) + ", " +
         number(r.end) + ") interior [" + number(r.interior_begin) + ", " + number(r.interior_end) +
         ")";
}

// What a tile's range must be, by trying every pair. `sees(line, other)`: line in [begin, end).
template <class Sees>
void expect_exact(const TileRange& got, int begin, int end, int others, const Sees& sees,
                  const std::string& description) {
  int first = others, last = 0;  // hull of what some line sees
  std::vector<bool> by_all(static_cast<std::size_t>(others), begin < end);
  for (int line = begin; line < end; ++line)
    for (int other = 0; other < others; ++other) {
      if (sees(line, other)) {
        first = min_of(first, other);
        last = max_of(last, other + 1);
      } else {
        by_all[static_cast<std::size_t>(other)] = false;
      }
    }
  if (first >= last) {
    EXPECT_EQ(got.begin, got.end) << description;
    return;
  }
  EXPECT_EQ(got.begin, first) << description;
  EXPECT_EQ(got.end, last) << description;
  EXPECT_LE(got.begin, got.interior_begin) << description;
  EXPECT_LE(got.interior_begin, got.interior_end) << description;
  EXPECT_LE(got.interior_end, got.end) << description;
  for (int other = 0; other < others; ++other)
    EXPECT_EQ(by_all[static_cast<std::size_t>(other)],
              got.interior_begin <= other && other < got.interior_end)
        << description << " at " << other;
}

TEST(Mask, RowLimitsAreTheDefinition) {
  for (const Band& band : bands())
    for (int seqlen_q = 1; seqlen_q <= kMost; ++seqlen_q)
      for (int seqlen_k = 0; seqlen_k <= kMost; ++seqlen_k)
        for (int row = 0; row < seqlen_q; ++row) {
          const RowLimits r = row_limits(band, slice(seqlen_q, seqlen_k), {}, row);
          for (int key = 0; key < seqlen_k; ++key)
            ASSERT_EQ(visible(band, row, key, seqlen_q, seqlen_k), r.first <= key && key < r.end);
          ASSERT_TRUE(r.first < r.end || (r.first == 0 && r.end == 0));
        }
}

TEST(Mask, KvRangeMissesNothingAndIsNotLoose) {
  for (const Band& band : bands())
    for (int seqlen_q = 1; seqlen_q <= kMost; ++seqlen_q)
      for (int seqlen_k = 0; seqlen_k <= kMost; ++seqlen_k)
        for (int begin = 0; begin < seqlen_q; ++begin)
          for (int end = begin + 1; end <= seqlen_q + 2; ++end) {
            const TileRange r = kv_range(band, begin, end, seqlen_q, seqlen_k);
            expect_exact(
                r, begin, min_of(end, seqlen_q), seqlen_k,
                [&](int row, int key) { return visible(band, row, key, seqlen_q, seqlen_k); },
                text(band, seqlen_q, seqlen_k, begin, end, r));
            if (HasFailure()) return;
          }
}

TEST(Mask, QRangeIsTheTranspose) {
  for (const Band& band : bands())
    for (int seqlen_q = 1; seqlen_q <= kMost; ++seqlen_q)
      for (int seqlen_k = 1; seqlen_k <= kMost; ++seqlen_k)
        for (int begin = 0; begin < seqlen_k; ++begin)
          for (int end = begin + 1; end <= seqlen_k + 2; ++end) {
            const TileRange r = q_range(band, begin, end, seqlen_q, seqlen_k);
            expect_exact(
                r, begin, min_of(end, seqlen_k), seqlen_q,
                [&](int key, int row) { return visible(band, row, key, seqlen_q, seqlen_k); },
                text(band, seqlen_q, seqlen_k, begin, end, r));
            if (HasFailure()) return;
          }
}

TEST(Mask, IntervalsAreIntersectedInSlots) {
  constexpr int kLengths = 6;
  for (const int slot : {0, 3})
    for (int first = -2; first <= kLengths + 5; ++first)
      for (int end = -2; end <= kLengths + 5; ++end) {
        const std::int32_t rows[] = {-99, 99, first, end};  // of tokens 0 and 1
        const SequenceSlice at{0, {0, 1, 1, 0}, {0, slot, kLengths, slot}};
        const RowLimits r = row_limits(kFull, at, {.rows = rows}, 0);
        for (int key = 0; key < kLengths; ++key)
          ASSERT_EQ(first <= slot + key && slot + key < end, r.first <= key && key < r.end)
              << first << " " << end << " " << slot << " " << key;
      }
}

TEST(Mask, ExtremeIntervalsDoNotOverflow) {
  constexpr std::int32_t kLowest = -2147483647 - 1, kHighest = 2147483647;
  const std::int32_t rows[] = {kLowest, kHighest, kHighest, kLowest};
  const SequenceSlice at{0, {0, 0, 2, 0}, {0, 7, 5, 7}};
  const RowLimits all = row_limits(kFull, at, {.rows = rows}, 0);
  EXPECT_EQ(all.first, 0);
  EXPECT_EQ(all.end, 5);
  const RowLimits none = row_limits(kFull, at, {.rows = rows}, 1);
  EXPECT_EQ(none.first, none.end);
}

TEST(Mask, ValidityBitsCountSlots) {
  const std::uint32_t bits[] = {0xFFFFFFFFu, 0xFFFFFFFFu, 0x80000001u,
                                0x2u};  // two entries, two words
  const KeyIntervals intervals{.bits = bits, .bits_batch_stride = 2, .bits_words = 2};
  const SequenceSlice at{1, {1, 0, 1, 0}, {1, 3, 70, 3}};
  for (int key = 0; key < 70; ++key) {
    const int slot = key + 3;
    EXPECT_EQ(key_valid(intervals, at, key), slot == 31 || slot == 33) << slot;
  }
  EXPECT_TRUE(key_valid({}, at, 5));
}

TEST(Mask, Divisions) {
  for (int a = -20; a <= 20; ++a)
    for (int b = 1; b <= 7; ++b) {
      EXPECT_LE(floor_div(a, b) * b, a);
      EXPECT_GT(floor_div(a, b) * b + b, a);
      EXPECT_GE(ceil_div(a, b) * b, a);
      EXPECT_LT(ceil_div(a, b) * b - b, a);
    }
}

static_assert(row_limits(kCausal, {0, {0, 0, 3, 0}, {0, 0, 5, 0}}, {}, 0).end == 3);
static_assert(kv_range(sliding_window(2), 4, 8, 8, 8) == TileRange{2, 8, 5, 5});

}  // namespace
}  // namespace heed
