// Ragged and causal batches leave threads with equal work: scores are counted, nothing is timed.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <queue>
#include <vector>

#include "core/mask.hpp"
#include "core/sequence.hpp"
#include "cpu/schedule.hpp"

namespace heed::cpu {
namespace {

constexpr int kTile = 96;  // query rows and keys, of both passes

// A batch whose tensors are never read.
struct Batch {
  ForwardProblem p;
  std::vector<std::int32_t> lengths, cu_seqlens;

  Batch(std::vector<std::int32_t> of, std::int64_t heads, Band band, bool packed) : lengths(of) {
    cu_seqlens.push_back(0);
    for (const std::int32_t length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
    const auto entries = static_cast<std::int64_t>(lengths.size());
    const std::int64_t longest = *std::ranges::max_element(lengths);
    void* const none = nullptr;
    for (auto* x : {&p.q, &p.k, &p.v})
      *x = packed ? contiguous(none, DType::f32, std::array{cu_seqlens.back() + 0l, heads, 64l})
                  : contiguous(none, DType::f32, std::array{entries, longest, heads, 64l});
    p.band = band;
    if (packed) {
      p.sequences.batch = static_cast<int>(entries);
      p.sequences.cu_seqlens_q = p.sequences.cu_seqlens_k = cu_seqlens.data();
      p.sequences.max_seqlen_q = p.sequences.max_seqlen_k = longest;
    } else {
      p.sequences.seqused_q = p.sequences.seqused_k = lengths.data();
    }
  }
};

// Scores of the query rows [row, row_end) against the keys [key, key_end) of one head.
std::int64_t scores(const ForwardProblem& p, int entry, int row, int row_end, int key,
                    int key_end) {
  const SequenceSlice at = slice_of(p, entry);
  std::int64_t sum = 0;
  for (; row < std::min(row_end, at.q.length); ++row) {
    const RowLimits seen = row_limits(p.band, at, p.intervals, row);
    sum += std::max(0, std::min(seen.end, key_end) - std::max(seen.first, key));
  }
  return sum;
}

constexpr int kAll = 1 << 30;

// Work of every task in the order in which they are handed out.
std::vector<std::int64_t> forward_tasks(const ForwardProblem& p, int workers) {
  const Cut cut{.tile = kTile};
  std::vector<Share> shares(static_cast<std::size_t>(share_count(p, cut)));
  order_shares(p, cut, shares.data());
  const bool by_heads = forward_by_heads(p, workers);
  const TaskOrder order{shares.data(), share_count(p, cut), p.q.heads(),
                        by_heads ? 1 : ceil_div(static_cast<int>(max_seqlen_q(p)), kTile)};
  std::vector<std::int64_t> work;
  for (std::int64_t task = 0; task < order.tasks(); ++task) {
    const TaskOrder::Task at = order.at(task);
    const int row = static_cast<int>(at.tile) * kTile;
    work.push_back(scores(p, at.share.entry, row, by_heads ? kAll : row + kTile, 0, kAll));
  }
  return work;
}

std::vector<std::int64_t> backward_tasks(const ForwardProblem& p) {
  const Cut cut = backward_cut(p, kTile, batch_entries(p) * p.k.heads());
  std::vector<Share> shares(static_cast<std::size_t>(share_count(p, cut)));
  order_shares(p, cut, shares.data());
  const TaskOrder order{shares.data(), share_count(p, cut), p.k.heads()};
  std::vector<std::int64_t> work;
  for (std::int64_t task = 0; task < order.tasks(); ++task) {
    const Share share = order.at(task).share;
    work.push_back(scores(p, share.entry, 0, kAll, cut.first_key(share.chunk),
                          cut.first_key(share.chunk + 1)));
  }
  return work;
}

// The most that one of `threads` has to do over the mean, when each takes the next task when it is
// done with its last.
double most_over_mean(const std::vector<std::int64_t>& tasks, int threads) {
  std::priority_queue<std::int64_t, std::vector<std::int64_t>, std::greater<>> busy;
  for (int i = 0; i < threads; ++i) busy.push(0);
  std::int64_t most = 0;
  for (const std::int64_t work : tasks) {
    const std::int64_t end = busy.top() + work;
    busy.pop();
    busy.push(end);
    most = std::max(most, end);
  }
  const auto sum = static_cast<double>(std::accumulate(tasks.begin(), tasks.end(), 0l));
  return static_cast<double>(most) * threads / sum;
}

struct Case {
  const char* name;
  std::vector<std::int32_t> lengths;
  std::int64_t heads;
  bool packed = false;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all{
      {"one text", {2048}, 8},
      {"55 % fill", {512, 430, 380, 300, 230, 180, 130, 91}, 12},
      {"55 % fill, the longest last", {91, 130, 180, 230, 300, 380, 430, 512}, 12},
      {"documents", {333, 64, 700, 90, 1200, 17, 1536, 256, 512, 2048}, 8, true},
      {"short documents", {333, 64, 700, 90, 1000, 17, 512, 256, 512, 1000}, 12, true},
      {"one long document", {64, 64, 64, 64, 64, 64, 64, 4096}, 8, true},
  };
  return all;
}

void expect_balance(
    const char* pass, const Case& c,
    const std::function<std::vector<std::int64_t>(const ForwardProblem&, int)>& of,
    int most_threads = 16) {
  for (const Band& band : {Band{}, kCausal, Band{.left = 255, .right = 0}})
    for (int threads = 2; threads <= most_threads; threads *= 2) {
      const Batch batch(c.lengths, c.heads, band, c.packed);
      const double most = most_over_mean(of(batch.p, threads), threads);
      EXPECT_LE(most, 1.05) << pass << ", " << c.name << ", right " << band.right << ", left "
                            << band.left << ", " << threads << " threads";
    }
}

TEST(Balance, ForwardTasksEndTogether) {
  for (const Case& c : cases()) expect_balance("forward", c, forward_tasks);
  // As many heads as do not divide by the threads.
  expect_balance("forward", {"three texts", {512, 512, 512}, 12}, forward_tasks, 8);
}

TEST(Balance, BackwardTasksEndTogether) {
  for (const Case& c : cases())
    expect_balance("backward", c,
                   [](const ForwardProblem& p, int /*workers*/) { return backward_tasks(p); });
}

TEST(Balance, TasksHoldEveryScoreOnce) {
  for (const Case& c : cases())
    for (const Band& band : {Band{}, kCausal}) {
      const Batch batch(c.lengths, c.heads, band, c.packed);
      std::int64_t all = 0;
      for (int entry = 0; entry < batch_entries(batch.p); ++entry)
        all += c.heads * scores(batch.p, entry, 0, kAll, 0, kAll);
      for (const auto& tasks :
           {forward_tasks(batch.p, 2), forward_tasks(batch.p, 8), backward_tasks(batch.p)})
        EXPECT_EQ(std::accumulate(tasks.begin(), tasks.end(), std::int64_t{0}), all) << c.name;
    }
}

// The order itself: without it a long text that comes last keeps one thread busy alone.
TEST(Balance, LongOnesComeFirst) {
  const Batch batch({91, 512, 130, 430}, 2, {}, false);
  std::array<Share, 4> shares;
  order_shares(batch.p, {.tile = kTile}, shares.data());
  EXPECT_EQ(shares[0].entry, 1);
  EXPECT_EQ(shares[1].entry, 3);
  EXPECT_EQ(shares[2].entry, 2);
  EXPECT_EQ(shares[3].entry, 0);
  EXPECT_EQ(shares[0].work, 512 * 512);
}

}  // namespace
}  // namespace heed::cpu
