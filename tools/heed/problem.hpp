// A problem given by flags, with real memory to run on or invented addresses to plan with.
#pragma once

#include <CLI/CLI.hpp>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "heed/heed.hpp"

namespace heed::tool {

enum class Layout { dense, padded, packed, paged };
enum class Direction { forward, backward };

struct ProblemFlags {
  Direction pass = Direction::forward;
  DType dtype = DType::f32;
  Layout layout = Layout::dense;
  double fill = 1.0;  // mean length of an entry, as a share of the seqlen
  std::int64_t batch = 1;
  std::int64_t seqlen_q = 2048;
  std::int64_t seqlen_k = 0;  // 0: seqlen_q
  std::int64_t heads_q = 8;
  std::int64_t heads_k = 0;  // 0: heads_q
  std::int64_t head_dim = 64;
  std::int64_t head_dim_v = 0;  // 0: head_dim
  std::int64_t page_size = 16;
  bool causal = false;
  int window = -1;  // -1: none
  int chunk = 0;
  float scale = 0.f;  // 0: 1 / sqrt(head_dim)
  float softcap = 0.f;
  float dropout = 0.f;
  bool sink = false;
  bool bias = false;
  int splits = 0;
  std::string force;

  void add_to(CLI::App& verb);
  Options options() const;
  Band band() const;
  // "forward bf16 B1 H8/8 S2048/2048 D64/64 causal".
  std::string text() const;
};

// Memory of a problem. Invented memory has addresses and must never be read or written.
class Arena {
 public:
  explicit Arena(bool real) : real_(real) {}
  bool real() const { return real_; }
  void* take(std::int64_t bytes);

 private:
  struct Free {
    void operator()(void* data) const;
  };
  bool real_;
  std::uintptr_t next_ = std::uintptr_t{1} << 40;
  std::vector<std::unique_ptr<void, Free>> blocks_;
};

// `forward` is what runs when the pass is forward, and the problem as it ran when it is backward.
struct Problem {
  ForwardProblem forward;
  BackwardProblem backward;
};
// Inputs hold standard normal numbers when the memory is real.
Problem make_problem(const ProblemFlags& flags, Arena& arena);

// What the problem's contents amount to. Requires real memory.
struct Cost {
  double flops;
  double bytes;  // every live element of every tensor once
};
Cost cost_of(const ForwardProblem& problem, Direction pass);

}  // namespace heed::tool
