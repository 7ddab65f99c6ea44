// What is asked: everything that changes the answer, and nothing that only changes the speed.
//
//   S = scale * q kᵀ,   S = softcap * tanh(S / softcap) when softcap > 0,   S += bias,
//   P = softmax over the visible keys (and the sink),   out = dropout(P) v.
#pragma once

#include <cstdint>
#include <optional>

#include "heed/tensor.hpp"

namespace heed {

inline constexpr int kUnbounded = 1 << 30;

// Which keys a row may see. Row i of an entry stands at position i + seqlen_k - seqlen_q among its
// keys (the last row at the last key) and sees key j iff
//   position - left <= j <= position + right   and   j >= floor(position / chunk) * chunk if chunk.
struct Band {
  int left = kUnbounded;
  int right = kUnbounded;
  int chunk = 0;  // 0: not chunked

  friend constexpr bool operator==(const Band&, const Band&) = default;
};

inline constexpr Band kFull{};
inline constexpr Band kCausal{.left = kUnbounded, .right = 0};
// A row sees itself and the `keys_back` keys before it.
constexpr Band sliding_window(int keys_back) { return {.left = keys_back, .right = 0}; }
// A row sees the keys of its own chunk up to itself.
constexpr Band chunked(int chunk) { return {.left = kUnbounded, .right = 0, .chunk = chunk}; }

struct Score {
  std::optional<float> scale{};  // default: 1 / sqrt(head_dim)
  float softcap = 0.f;         // 0: none
};

// Where each batch entry's tokens are. All arrays are int32 in the memory of the device that runs
// the kernel. On a GPU they are clamped, never trusted; on a CPU a bad value is refused by name.
//   dense    all null: entry b owns row b of the tensor.
//   packed   cu_seqlens: entry b owns tokens [cu_seqlens[b], cu_seqlens[b + 1]) of a rank 3 tensor.
//   padded   start: entry b's tokens begin at slot start[b] of row b.
//   seqused  on top of any: the entry has seqused[b] tokens from its first one on.
struct Sequences {
  std::int64_t batch = 0;                      // entries; needed when q is packed, else taken from q
  const std::int32_t* cu_seqlens_q = nullptr;  // [batch + 1]
  const std::int32_t* cu_seqlens_k = nullptr;  // [batch + 1]
  const std::int32_t* start_q = nullptr;       // [batch]
  const std::int32_t* start_k = nullptr;       // [batch]
  const std::int32_t* seqused_q = nullptr;     // [batch]
  const std::int32_t* seqused_k = nullptr;     // [batch]
  std::int64_t max_seqlen_q = 0;               // packed: no entry is longer; 0: the total
  std::int64_t max_seqlen_k = 0;
};

// One key interval per query row, intersected with Band and Sequences. A slot is a token's index in
// its row of the k tensor (padded: counted from the row's start, not the entry's), for packed and
// paged k its index within the entry.
struct KeyIntervals {
  const std::int32_t* rows = nullptr;   // [batch, seqlen_q, 2] or packed [total_q, 2]: first, end
  std::int64_t rows_batch_stride = 0;   // int32 elements between batch entries; 0: shared
  const std::uint32_t* bits = nullptr;  // [batch, words]: bit j % 32 of word j / 32 = slot j valid
  std::int64_t bits_batch_stride = 0;   // words between batch entries; 0: shared
  std::int64_t bits_words = 0;          // words per entry; slots past the last word are not valid
};

// Keys and values in pages: k and v are [num_pages, page_size, heads_k, head_dim]. Slot j of entry b
// is row j % page_size of page page_table[b * max_pages + j / page_size]. Needs seqused_k.
// A GPU takes a page id outside [0, num_pages) as unmapped: its keys are not visible. A CPU refuses it.
struct PagedKv {
  const std::int32_t* page_table = nullptr;  // [batch, max_pages]
  std::int64_t max_pages = 0;
};

// P_ij is kept, and divided by 1 - probability, iff word j % 4 of Philox-4x32-10 with key = *seed and
// counter = (i, j / 4, head, batch entry) is at least floor(probability * 2^32).
struct Dropout {
  float probability = 0.f;
  const std::uint64_t* seed = nullptr;  // [1], device memory
};

struct ForwardProblem {
  ConstTensorView q{};  // [batch, seqlen_q, heads_q, head_dim] or packed [total_q, ...]
  ConstTensorView k{};  // [batch, seqlen_k, heads_k, head_dim] or packed or pages
  ConstTensorView v{};  // as k, with head_dim_v
  TensorView out{};     // as q, with head_dim_v
  float* lse = nullptr;  // [batch, heads_q, seqlen_q] or packed [heads_q, total_q]; natural log, with
                         // the sink; -inf for a row without keys. Optional.
  Band band{};
  Score score{};
  Sequences sequences{};
  KeyIntervals intervals{};
  ConstTensorView bias{};       // [batch|1, heads_q|1, seqlen_q|1, seqlen_k]; bool: false hides
  const float* sink = nullptr;  // [heads_q]: one more logit per row, natural log units, no value
  PagedKv paged{};
  Dropout dropout{};
};

// Gradients of sum(out ∘ dout) + sum(lse ∘ dlse). `forward` is the problem as it ran: out and lse
// hold its results and are only read.
struct BackwardProblem {
  ForwardProblem forward{};
  ConstTensorView dout{};       // as out
  const float* dlse = nullptr;  // as lse; optional
  TensorView dq{};              // as q
  TensorView dk{};              // as k
  TensorView dv{};              // as v
  TensorView dbias{};           // as bias, f32; optional
  float* dsink = nullptr;       // [heads_q]; optional
};

}  // namespace heed
