// The closed forms of masks against their definition, on every small case.
#include "core/mask.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <functional>

namespace heed {
namespace {

SequenceSlice slice(int seqlen_q, int seqlen_k) {
  SequenceSlice at;
  at.q.length = seqlen_q;
  at.k.length = seqlen_k;
  return at;
}

// The definition in problem.hpp, word by word.
bool sees(const Band& band, int row, int key, int seqlen_q, int seqlen_k) {
  const int position = row + seqlen_k - seqlen_q;
  if (key < 0 || key >= seqlen_k) return false;
  if (key < position - band.left || key > position + band.right) return false;
  if (band.chunk == 0) return true;
  int start = 0;  // of the position's chunk
  while (start > position) start -= band.chunk;
  while (start + band.chunk <= position) start += band.chunk;
  return key >= start;
}

template <class Body>
void for_each_band(const Body& body) {
  for (const int left : {0, 1, 2, 5, kUnbounded})
    for (const int right : {0, 1, 3, kUnbounded})
      for (const int chunk : {0, 1, 2, 3, 7}) body(Band{left, right, chunk});
}

template <class Body>
void for_each_case(const Body& body) {
  for (int seqlen_q = 0; seqlen_q <= 8; ++seqlen_q)
    for (int seqlen_k = 0; seqlen_k <= 9; ++seqlen_k)
      for_each_band([&](const Band& band) { body(band, seqlen_q, seqlen_k); });
}

TEST(RowLimits, AreExactlyTheVisibleKeys) {
  for_each_case([](const Band& band, int seqlen_q, int seqlen_k) {
    for (int row = 0; row < seqlen_q; ++row) {
      const RowLimits r = row_limits(band, slice(seqlen_q, seqlen_k), {}, row);
      for (int key = 0; key < seqlen_k; ++key)
        ASSERT_EQ(r.first <= key && key < r.end, sees(band, row, key, seqlen_q, seqlen_k))
            << "left " << band.left << " right " << band.right << " chunk " << band.chunk
            << " row " << row << " of " << seqlen_q << " key " << key << " of " << seqlen_k;
    }
  });
}

// Visits what some row (column) of the tile needs and not one more; the interior is what all need.
template <class Range, class Sees>
void expect_exact(const Range& range, const Sees& some, const Sees& all, int extent) {
  int begin = extent, end = 0;
  for (int i = 0; i < extent; ++i)
    if (some(i)) {
      begin = min_of(begin, i);
      end = i + 1;
    }
  if (begin >= end) {
    // A closed form may visit an interval that chunks leave empty, but never calls it interior.
    ASSERT_EQ(range.interior_begin, range.interior_end);
    return;
  }
  ASSERT_LE(range.begin, begin);
  ASSERT_GE(range.end, end);
  for (int i = range.interior_begin; i < range.interior_end; ++i) ASSERT_TRUE(all(i)) << i;
}

TEST(KvRange, MissesNoKeyAndHasNoFalseInterior) {
  for_each_case([](const Band& band, int seqlen_q, int seqlen_k) {
    for (const int tile : {1, 2, 3, 4})
      for (int row = 0; row < seqlen_q; row += tile) {
        const int row_end = min_of(row + tile, seqlen_q);
        const std::function<bool(int)> some = [&](int key) {
          for (int r = row; r < row_end; ++r)
            if (sees(band, r, key, seqlen_q, seqlen_k)) return true;
          return false;
        };
        const std::function<bool(int)> all = [&](int key) {
          for (int r = row; r < row_end; ++r)
            if (!sees(band, r, key, seqlen_q, seqlen_k)) return false;
          return true;
        };
        expect_exact(kv_range(band, row, row + tile, seqlen_q, seqlen_k), some, all, seqlen_k);
      }
  });
}

TEST(QRange, MissesNoRowAndHasNoFalseInterior) {
  for_each_case([](const Band& band, int seqlen_q, int seqlen_k) {
    for (const int tile : {1, 2, 3, 4})
      for (int col = 0; col < seqlen_k; col += tile) {
        const int col_end = min_of(col + tile, seqlen_k);
        const std::function<bool(int)> some = [&](int row) {
          for (int c = col; c < col_end; ++c)
            if (sees(band, row, c, seqlen_q, seqlen_k)) return true;
          return false;
        };
        const std::function<bool(int)> all = [&](int row) {
          for (int c = col; c < col_end; ++c)
            if (!sees(band, row, c, seqlen_q, seqlen_k)) return false;
          return true;
        };
        expect_exact(q_range(band, col, col + tile, seqlen_q, seqlen_k), some, all, seqlen_q);
      }
  });
}

// Without chunks the closed forms are tight: what they visit begins and ends with something seen.
TEST(KvRange, VisitsNothingInVainWithoutChunks) {
  for (const int left : {0, 1, 2, 5, kUnbounded})
    for (const int right : {0, 1, 3, kUnbounded})
      for (int seqlen_q = 1; seqlen_q <= 8; ++seqlen_q)
        for (int seqlen_k = 1; seqlen_k <= 9; ++seqlen_k)
          for (int row = 0; row < seqlen_q; row += 3) {
            const Band band{left, right};
            const TileRange r = kv_range(band, row, row + 3, seqlen_q, seqlen_k);
            const auto seen = [&](int key) {
              for (int i = row; i < min_of(row + 3, seqlen_q); ++i)
                if (sees(band, i, key, seqlen_q, seqlen_k)) return true;
              return false;
            };
            if (r.begin >= r.end) continue;
            EXPECT_TRUE(seen(r.begin));
            EXPECT_TRUE(seen(r.end - 1));
          }
}

TEST(Intervals, AreClampedWhateverTheyHold) {
  const std::array<std::int32_t, 10> rows{2, 5, -7, 100, 5, 2, INT32_MIN, INT32_MAX, 3, 3};
  const KeyIntervals intervals{.rows = rows.data()};
  const SequenceSlice at = slice(5, 6);
  const std::array<RowLimits, 5> expected{{{2, 5}, {0, 6}, {}, {0, 6}, {}}};
  for (int row = 0; row < 5; ++row) {
    const RowLimits r = row_limits(kFull, at, intervals, row);
    EXPECT_EQ(r.first, expected[static_cast<std::size_t>(row)].first) << row;
    EXPECT_EQ(r.end, expected[static_cast<std::size_t>(row)].end) << row;
  }
}

TEST(Intervals, CountSlotsOfTheTensorsRow) {
  const std::array<std::int32_t, 4> rows{0, 4, 3, 6};
  SequenceSlice at = slice(2, 3);
  at.k.slot = 2;  // keys of the entry are slots 2, 3, 4
  const RowLimits top = row_limits(kFull, at, {.rows = rows.data()}, 0);
  EXPECT_EQ(top.first, 0);
  EXPECT_EQ(top.end, 2);
  const RowLimits bottom = row_limits(kFull, at, {.rows = rows.data()}, 1);
  EXPECT_EQ(bottom.first, 1);
  EXPECT_EQ(bottom.end, 3);
}

TEST(ValidityBits, WordsSayWhatBitsSay) {
  const std::array<std::uint32_t, 3> bits{0xFFFFFFF7u, 0xFFFFFFFFu, 0x0000FFFFu};
  const KeyIntervals intervals{.bits = bits.data(), .bits_words = 3};
  for (const int slot : {0, 1, 5, 31}) {
    SequenceSlice at = slice(1, 110);
    at.k.slot = slot;
    for (int first = 0; first <= 100; ++first)
      for (int end = first; end <= 110; ++end) {
        bool all = true;
        for (int key = first; key < end; ++key) all = all && key_valid(intervals, at, key);
        ASSERT_EQ(all_keys_valid(intervals, at, first, end), all)
            << "slot " << slot << " keys [" << first << ", " << end << ")";
      }
  }
}

TEST(Division, RoundsTowardsTheNamedSide) {
  for (int a = -12; a <= 12; ++a)
    for (int b = 1; b <= 5; ++b) {
      EXPECT_EQ(floor_div(a, b), static_cast<int>(std::floor(static_cast<double>(a) / b)));
      EXPECT_EQ(ceil_div(a, b), static_cast<int>(std::ceil(static_cast<double>(a) / b)));
    }
}

}  // namespace
}  // namespace heed
