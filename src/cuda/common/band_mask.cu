// A band and a padding mask as key intervals and validity bits.
#include "cuda/common/band_mask.cuh"

#include "cuda/host/launch.hpp"

namespace heed::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kRowsPerBlock = 8192;

// Blocks share an entry's rows. Each of them finds the valid slots; the first one writes their
// bits.
__global__ void __launch_bounds__(kThreads)
    write_entry(const __grid_constant__ BandMask m, int blocks_per_entry) {
  constexpr int kWarps = kThreads / 32;
  __shared__ std::int64_t firsts[kWarps], ends[kWarps];
  const std::int64_t entry = blockIdx.x / blocks_per_entry;
  const int part = static_cast<int>(blockIdx.x % blocks_per_entry);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;

  SlotRange valid{0, m.slots};
  if (m.padding != nullptr) {
    std::int64_t first = m.slots, end = 0;
    const std::int64_t words = 2 * m.bit_rows();
    for (std::int64_t word = warp; word < words; word += kWarps) {
      const unsigned bits = __ballot_sync(~0u, slot_valid(m, entry, 32 * word + lane));
      if (part == 0 && lane == 0) m.words(entry)[word] = static_cast<std::int32_t>(bits);
      if (bits == 0) continue;
      if (end == 0) first = 32 * word + __ffs(bits) - 1;
      end = 32 * word + 32 - __clz(bits);
    }
    if (lane == 0) {
      firsts[warp] = first;
      ends[warp] = end;
    }
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) {
      first = firsts[i] < first ? firsts[i] : first;
      end = ends[i] > end ? ends[i] : end;
    }
    if (end > 0) valid = {first, end};
  }
  for (std::int64_t row = part * kThreads + threadIdx.x; row < m.seqlen_q;
       row += std::int64_t{blocks_per_entry} * kThreads)
    write_row(m, entry, row, valid);
}

}  // namespace

Status write_band_mask(const BandMask& mask, CUstream_st* stream) {
  const std::int64_t blocks_per_entry = clamp64(mask.seqlen_q / kRowsPerBlock, 1, 64);
  return launch<write_entry>({.blocks = mask.batch * blocks_per_entry, .threads = kThreads}, stream,
                             mask, static_cast<int>(blocks_per_entry));
}

}  // namespace heed::cuda
