// Compiled for the baseline, apart from the kernels: sorting is templates of the standard library.
#include "cpu/schedule.hpp"

#include <algorithm>

#include "core/mask.hpp"
#include "core/sequence.hpp"

namespace heed::cpu {
namespace {

std::int64_t seen(const ForwardProblem& p, const SequenceSlice& at, int row, int begin, int end) {
  const RowLimits r = row_limits(p.band, at, p.intervals, row);
  return std::max(0, std::min(r.end, end) - std::max(r.first, begin));
}

std::int64_t work_of(const ForwardProblem& p, const Cut& cut, int entry, int chunk) {
  const SequenceSlice at = slice_of(p, entry);
  const int begin = chunk * cut.chunk_keys;
  const int end = cut.chunks == 1 ? at.k.length : begin + cut.chunk_keys;
  std::int64_t twice = 0;
  for (int row = 0; row < at.q.length; row += cut.tile) {
    const int rows = std::min(cut.tile, at.q.length - row);
    twice += rows * (seen(p, at, row, begin, end) + seen(p, at, row + rows - 1, begin, end));
  }
  return twice / 2;
}

}  // namespace

std::int64_t share_count(const ForwardProblem& p, const Cut& cut) {
  return cut.chunks * (batch_entries(p) / std::max<std::int64_t>(cut.together, 1));
}

bool forward_by_heads(const ForwardProblem& p, int workers) {
  constexpr std::int64_t kMostKeys = 1024;
  const std::int64_t heads = batch_entries(p) * p.k.heads();
  const std::int64_t turns = (heads + workers - 1) / workers;
  return max_seqlen_k(p) <= kMostKeys && turns >= 4 && 20 * turns * workers <= 21 * heads;
}

Cut backward_cut(const ForwardProblem& p, int tile, std::int64_t owners) {
  constexpr std::int64_t kTasks = 32;  // enough for any CPU to balance, few enough partial dq
  const int keys = static_cast<int>(max_seqlen_k(p));
  const int tiles = std::max(1, ceil_div(keys, tile));
  const auto chunks =
      static_cast<int>(clamp64((kTasks + owners - 1) / owners, 1, ceil_div(tiles, 4)));
  Cut cut{.tile = tile, .chunk_keys = ceil_div(tiles, chunks) * tile};
  cut.chunks = std::max(1, ceil_div(keys, cut.chunk_keys));
  return cut;
}

void order_shares(const ForwardProblem& p, const Cut& cut, Share* shares) {
  Share* const end = shares + share_count(p, cut);
  int entry = 0, chunk = 0;
  for (Share* s = shares; s != end; ++s) {
    *s = {0, entry, chunk};
    for (int e = entry; e < entry + cut.together; ++e) s->work += work_of(p, cut, e, chunk);
    if (++chunk < cut.chunks) continue;
    chunk = 0;
    entry += static_cast<int>(cut.together);
  }
  std::sort(shares, end, [](const Share& a, const Share& b) {
    if (a.work != b.work) return a.work > b.work;
    return a.entry != b.entry ? a.entry < b.entry : a.chunk < b.chunk;
  });
}

}  // namespace heed::cpu
