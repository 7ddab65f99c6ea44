// What the backward kernels must know of every query row and of every tile of them, computed first.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/mask.hpp"
#include "core/sequence.hpp"
#include "heed/problem.hpp"
#include "heed/status.hpp"

namespace heed::cuda {

// One row of one head; 16 bytes, indexed as lse.
struct alignas(16) BackwardRow {
  float lse_log2;  // 0 for a row without keys
  float delta;     // rowsum(dout * out) - dlse
  RowLimits limits;
};

// Keys that the rows of a tile see: some of them [first, end), all of them [all_first, all_end),
// which is empty when the tile has rows that do not exist.
struct alignas(16) TileLimits {
  int first, end, all_first, all_end;
};

// Largest norms of rows of dout and v, largest |delta|: what bounds dS.
struct BackwardBounds {
  float dout, v, delta;
};

// Sums over the key tiles, cleared with the rows.
struct QuerySums {
  float* dq;   // [count_of, heads_q, floats]
  int floats;  // of a tile, a multiple of 4
  int* turns;  // [count_of, heads_q, writers] or nullptr
  int writers;
  int* counter;  // one
};

// Tiles of tile_m query rows, numbered through all entries; some numbers may stay unused.
struct QueryTiles {
  int tile_m;
  int per_entry;  // most tiles of one entry
  bool packed;

  constexpr std::int64_t index(const SequenceSlice& at, int m_tile) const {
    return (packed ? static_cast<int>(at.q.token) / tile_m + at.entry
                   : std::int64_t{at.entry} * per_entry) +
           m_tile;
  }
};
constexpr QueryTiles query_tiles(const ForwardProblem& p, int tile_m) {
  return {tile_m, static_cast<int>((max_seqlen_q(p) + tile_m - 1) / tile_m), p.q.rank == 3};
}
constexpr std::int64_t count_of(const QueryTiles& tiles, const ForwardProblem& p) {
  return tiles.packed ? p.q.seqlen() / tiles.tile_m + batch_entries(p) + 1
                      : batch_entries(p) * tiles.per_entry;
}

// rows: [batch, heads_q, seqlen_q] as lse; limits: [count_of], those of tiles that do not exist are
// not written; bounds: found for f16 only.
Status find_backward_rows(const BackwardProblem& problem, const QueryTiles& tiles,
                          BackwardRow* rows, TileLimits* limits, BackwardBounds* bounds,
                          const QuerySums& sums, cudaStream_t stream);
// dsink, in one order of additions; nothing without it.
Status sum_dsink(const BackwardProblem& problem, const BackwardRow* rows, cudaStream_t stream);

}  // namespace heed::cuda
