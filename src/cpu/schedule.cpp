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
  const int begin = cut.first_key(chunk);
  const int end = cut.chunks == 1 ? at.k.length : cut.first_key(chunk + 1);
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
  constexpr std::int64_t kTasks = 32;  // few enough partial dq
  constexpr int kLeastTiles = 4;       // of a chunk, which packs all queries anew
  const int keys = std::max(1, static_cast<int>(max_seqlen_k(p)));
  // Of a packed batch, no more entries than its tokens suffice for can be as long as the longest,
  // where the caller says how long that is.
  const std::int64_t entries = std::max<std::int64_t>(1, batch_entries(p));
  if (p.k.rank == 3 && keys < p.k.seqlen())
    owners = owners * clamp64(p.k.seqlen() / keys, 1, entries) / entries;
  owners = std::max<std::int64_t>(1, owners);
  const std::int64_t wanted = (kTasks + owners - 1) / owners;
  const int tiles = ceil_div(keys, tile);
  return {.tile = tile,
          .chunks = static_cast<int>(clamp64(wanted, 1, ceil_div(tiles, kLeastTiles))),
          .key_tiles = tiles};
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
