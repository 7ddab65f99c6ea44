// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the
// dropout mask is a pure function of seed, batch entry, head, row and column.
#pragma once

#include <array>
#include <cstdint>

namespace heed {

using PhiloxBlock = std::array<std::uint32_t, 4>;

constexpr PhiloxBlock philox(std::uint64_t key, PhiloxBlock counter) {
  auto k0 = static_cast<std::uint32_t>(key);
  auto k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter = {static_cast<std::uint32_t>(p1 >> 32) ^ counter[1] ^ k0,
               static_cast<std::uint32_t>(p1),
               static_cast<std::uint32_t>(p0 >> 32) ^ counter[3] ^ k1,
               static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// Draws of columns 4 * col4 .. 4 * col4 + 3 of one row.
constexpr PhiloxBlock dropout_words(std::uint64_t seed, int entry, int head, int row, int col4) {
  return philox(seed, {static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(col4),
                       static_cast<std::uint32_t>(head), static_cast<std::uint32_t>(entry)});
}

// A value is kept iff its word is at least this. Requires 0 <= probability < 1.
constexpr std::uint32_t dropout_threshold(float probability) {
  return static_cast<std::uint32_t>(double{probability} * 4294967296.0);
}

}  // namespace heed
