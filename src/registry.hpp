// The table of kernels: dispatch, support tables, error texts, tests and `heed list` read it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "core/score.hpp"
#include "heed/plan.hpp"
#include "heed/problem.hpp"
#include "heed/status.hpp"

namespace heed {

enum class Pass : std::uint8_t { forward, decode, backward };
const char* name_of(Pass pass);

// One compiled kernel. A pass uses either the forward or the backward pair of functions.
struct KernelRow {
  Arch arch;
  Pass pass;
  DType dtype;         // of q, k, v, out, dout, dq, dk, dv
  DType operand;       // what P and dS are rounded to before they are multiplied again
  int tile_m;          // query rows per step
  int tile_n;          // keys per step
  int max_head_dim;    // of q and k, and of v unless max_head_dim_v says otherwise
  int max_query_rows;  // decode: most rows seqlen_q * heads_q / heads_k of one key head; 0: any

  // Scratch bytes of a plan, and the kernel itself. Both see validated problems only.
  std::size_t (*forward_bytes)(const Plan&, const ForwardProblem&);
  Status (*forward)(const Plan&, const ForwardProblem&, Workspace, Queue);
  std::size_t (*backward_bytes)(const Plan&, const BackwardProblem&);
  Status (*backward)(const Plan&, const BackwardProblem&, Workspace, Queue);

  ScoreKind score = ScoreKind::general;  // the most that it computes; CPU kernels take everything
  int smem_bytes = 0;                    // GPU: shared memory of a block
  int ctas = 0;                          // GPU, where keys may be split: blocks per multiprocessor
  // GPU: the copy engine brings q, k, v (and dout). Their rows begin at multiples of 16 bytes, the scale is
  // not negative, and tiles and pages fit into each other.
  bool bulk = false;
  int max_head_dim_v = 0;  // 0: max_head_dim
  int max_seqlen_k = 0;    // most keys of an entry; 0: any
  // Decode on a CPU: more query rows than these need kKeysPerRow keys each to be worth it; 0: none do.
  int few_query_rows = 0;
  // Below these another kernel is faster; one that is forced does not ask. Scores: query rows of a key
  // head times keys.
  int least_query_rows = 0;
  int least_scores = 0;
};
inline constexpr int kKeysPerRow = 16;
// "avx512/forward/bf16"; of a GPU also head_dim, score and tile:
// "sm80/forward/bf16/hdim64/plain/128x128".
std::string name_of(const KernelRow& row);

// Every kernel of this build, those of GPUs before those of CPUs, best first.
std::span<const KernelRow> registry();
// The GPU's or the CPU's part of it.
std::span<const KernelRow> registry_of(Arch arch);

// The first thing about a row that does not fit a request.
enum class Mismatch : std::uint8_t {
  none,
  pass,
  arch,
  dtype,
  score,
  head_dim,
  alignment,
  scale,
  page_size,
  query_rows,
  few_keys,
  seqlen_k,
  smem,
  forced,
  few_rows,
  few_scores,
  slow_dots
};

struct Request {
  Pass pass;  // forward also takes decode rows
  DType dtype;
  Arch arch;
  std::int64_t head_dim;
  std::int64_t query_rows;
  const char* force = nullptr;  // null: none
  std::int64_t head_dim_v = 0;
  ScoreKind score = ScoreKind::plain;
  int smem_bytes = 0;  // GPU: that a block can have
  bool bulk = true;    // is_bulk() of the problem
  bool negative_scale = false;
  int page_size = 0;          // 0: no pages
  std::int64_t seqlen_k = 0;  // most keys that an entry can have
};
// Whether a device of one family runs the kernels of another.
bool serves(Arch row, Arch device);
// The most shared memory that a block can have on GPUs of a family; 0 for a CPU.
int most_smem_bytes(Arch arch);

Request request_of(const ForwardProblem& problem, const Device& device, const Options& options);
Request request_of(const BackwardProblem& problem, const Device& device, const Options& options);

Mismatch mismatch(const KernelRow& row, const Request& request);
// A sentence fragment such as "needs avx512_bf16, this device is avx2".
std::string describe(Mismatch why, const KernelRow& row, const Request& request);

// The first row that fits; nullptr when none does.
const KernelRow* find_row(std::span<const KernelRow> rows, const Request& request);

}  // namespace heed
