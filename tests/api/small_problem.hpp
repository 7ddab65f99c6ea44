// A small legal problem with real memory, for tests that change one thing about it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/device.hpp"
#include "heed/heed.hpp"
#include "registry.hpp"
#include "support/random.hpp"

namespace heed::test {

inline std::vector<float> numbers(std::int64_t count, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& x : values) x = static_cast<float>(random.normal());
  return values;
}

// 64-byte aligned scratch memory of exactly `bytes`.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : memory_(bytes + kWorkspaceAlignment), bytes_(bytes) {}
  Workspace workspace() {
    const auto at = reinterpret_cast<std::uintptr_t>(memory_.data());
    return {memory_.data() + (kWorkspaceAlignment - at % kWorkspaceAlignment) % kWorkspaceAlignment,
            bytes_};
  }

 private:
  std::vector<std::byte> memory_;
  std::size_t bytes_;
};

struct Sizes {
  std::int64_t batch = 2, seqlen_q = 3, seqlen_k = 5, heads_q = 4, heads_k = 2, head_dim = 8,
               head_dim_v = 6;
};

// Dense f32 tensors; optional fields are absent until a test adds them.
struct SmallProblem {
  Sizes sizes;
  std::vector<float> q, k, v, out, lse, dout, dq, dk, dv, bias, dbias, sink, dsink, dlse;
  std::vector<std::int32_t> ints = std::vector<std::int32_t>(64, 0);
  std::uint64_t seed = 7;
  BackwardProblem backward;
  ForwardProblem& forward = backward.forward;

  explicit SmallProblem(const Sizes& s = {}) : sizes(s) {
    const std::int64_t rows_q = s.batch * s.seqlen_q * s.heads_q;
    const std::int64_t rows_k = s.batch * s.seqlen_k * s.heads_k;
    q = numbers(rows_q * s.head_dim, 1);
    k = numbers(rows_k * s.head_dim, 2);
    v = numbers(rows_k * s.head_dim_v, 3);
    out = numbers(rows_q * s.head_dim_v, 4);
    lse = numbers(rows_q, 5);
    dout = numbers(rows_q * s.head_dim_v, 6);
    dq = numbers(rows_q * s.head_dim, 7);
    dk = numbers(rows_k * s.head_dim, 8);
    dv = numbers(rows_k * s.head_dim_v, 9);
    bias = numbers(s.batch * s.heads_q * s.seqlen_q * s.seqlen_k, 10);
    dbias = bias;
    sink = numbers(s.heads_q, 11);
    dsink = sink;
    dlse = lse;
    const auto as_q = [&](std::vector<float>& x, std::int64_t dim) {
      return contiguous(x.data(), DType::f32, {s.batch, s.seqlen_q, s.heads_q, dim});
    };
    const auto as_k = [&](std::vector<float>& x, std::int64_t dim) {
      return contiguous(x.data(), DType::f32, {s.batch, s.seqlen_k, s.heads_k, dim});
    };
    forward.q = as_q(q, s.head_dim);
    forward.k = as_k(k, s.head_dim);
    forward.v = as_k(v, s.head_dim_v);
    forward.out = as_q(out, s.head_dim_v);
    forward.lse = lse.data();
    backward.dout = as_q(dout, s.head_dim_v);
    backward.dq = as_q(dq, s.head_dim);
    backward.dk = as_k(dk, s.head_dim);
    backward.dv = as_k(dv, s.head_dim_v);
  }
  SmallProblem(const SmallProblem&) = delete;

  ConstTensorView bias_view() const { return TensorView(dense_bias(bias)); }
  TensorView dbias_view() { return dense_bias(dbias); }

  // The same tensors as packed ones of one entry each batch row, with cu_seqlens in `ints`.
  void pack_q() {
    const Sizes& s = sizes;
    const std::int64_t total = s.batch * s.seqlen_q;
    const auto packed = [&](const void* data, std::int64_t dim) {
      return contiguous(const_cast<void*>(data), DType::f32, std::array{total, s.heads_q, dim});
    };
    forward.q = packed(q.data(), s.head_dim);
    forward.out = packed(out.data(), s.head_dim_v);
    backward.dout = packed(dout.data(), s.head_dim_v);
    backward.dq = packed(dq.data(), s.head_dim);
    for (std::int64_t b = 0; b <= s.batch; ++b)
      ints[static_cast<std::size_t>(b)] = static_cast<std::int32_t>(b * s.seqlen_q);
    forward.sequences.batch = s.batch;
    forward.sequences.cu_seqlens_q = ints.data();
  }
  void pack_k() {
    const Sizes& s = sizes;
    const std::int64_t total = s.batch * s.seqlen_k;
    const auto packed = [&](const void* data, std::int64_t dim) {
      return contiguous(const_cast<void*>(data), DType::f32, std::array{total, s.heads_k, dim});
    };
    forward.k = packed(k.data(), s.head_dim);
    forward.v = packed(v.data(), s.head_dim_v);
    backward.dk = packed(dk.data(), s.head_dim);
    backward.dv = packed(dv.data(), s.head_dim_v);
    for (std::int64_t b = 0; b <= s.batch; ++b)
      ints[static_cast<std::size_t>(16 + b)] = static_cast<std::int32_t>(b * s.seqlen_k);
    forward.sequences.cu_seqlens_k = ints.data() + 16;
  }
  // One page per batch row of k, in reverse order, all of it used.
  void page() {
    for (std::int64_t b = 0; b < sizes.batch; ++b) {
      ints[static_cast<std::size_t>(32 + b)] = static_cast<std::int32_t>(sizes.seqlen_k);
      ints[static_cast<std::size_t>(48 + b)] = static_cast<std::int32_t>(sizes.batch - 1 - b);
    }
    forward.sequences.seqused_k = ints.data() + 32;
    forward.paged = {ints.data() + 48, 1};
  }

 private:
  TensorView dense_bias(const std::vector<float>& data) const {
    return contiguous(const_cast<float*>(data.data()), DType::f32,
                      {sizes.batch, sizes.heads_q, sizes.seqlen_q, sizes.seqlen_k});
  }
};

// Plans and runs on `device` with a workspace of exactly the planned size.
template <class Problem>
Status plan_and_run(const Problem& problem, const Device& device, const Options& options = {},
                    Queue queue = {}) {
  const Result<Plan> made = plan(problem, device, options);
  if (!made.ok()) return made.status();
  Scratch scratch(made->workspace_bytes);
  return run(*made, problem, scratch.workspace(), queue);
}

// Every CPU device that this machine can be.
inline std::vector<Device> cpu_devices() {
  std::vector<Device> devices;
  for (int i = 0; i < static_cast<int>(Arch::sm80); ++i)
    if (const auto arch = static_cast<Arch>(i); serves(arch, cpu::best_arch()))
      devices.push_back({.arch = arch, .units = 2});
  return devices;
}

}  // namespace heed::test
