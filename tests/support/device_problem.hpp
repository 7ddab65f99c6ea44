// A test problem's tensors on the GPU, between canaries, and its results back in the host's
// tensors.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/sequence.hpp"
#include "support/problem.hpp"

namespace heed::test {

inline void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::abort();
}

// Device memory that is handed out from the front and taken back all at once, with an image of it
// in the host's memory: one copy brings all pieces over. HEED_TEST_MALLOC=1: every piece is an
// allocation of its own, so that compute-sanitizer sees its ends.
class Arena {
 public:
  static constexpr std::size_t kGuard = 256;
  static constexpr std::byte kCanary{0xC5};
  explicit Arena(std::size_t bytes)
      : size_(bytes), apart_(std::getenv("HEED_TEST_MALLOC") != nullptr) {
    if (!apart_) must(cudaMalloc(&base_, bytes), "cudaMalloc");
  }
  ~Arena() {
    reset();
    if (base_ != nullptr) cudaFree(base_);
  }
  void reset() {
    for (void* p : pieces_) cudaFree(p);
    pieces_.clear();
    image_.clear();
    used_ = 0;
  }
  // Memory of these contents; its base is `phase` past a multiple of 256 bytes.
  std::byte* take(const std::vector<std::byte>& contents, std::size_t phase) {
    if (apart_) {
      void* p = nullptr;
      must(cudaMalloc(&p, contents.size() + phase + 1), "cudaMalloc");
      pieces_.push_back(p);
      std::byte* at = static_cast<std::byte*>(p) + phase;
      must(cudaMemcpy(at, contents.data(), contents.size(), cudaMemcpyHostToDevice), "upload");
      return at;
    }
    const std::size_t at = used_ + kGuard + phase;
    used_ = (at + contents.size() + 2 * kGuard) / 256 * 256;
    if (used_ > size_) std::abort();
    image_.resize(used_, kCanary);
    std::copy(contents.begin(), contents.end(), image_.begin() + static_cast<std::ptrdiff_t>(at));
    return static_cast<std::byte*>(base_) + at;
  }
  void send(cudaStream_t stream) const {
    if (image_.empty()) return;
    must(cudaMemcpyAsync(base_, image_.data(), image_.size(), cudaMemcpyHostToDevice, stream),
         "upload");
    must(cudaStreamSynchronize(stream), "synchronise");
  }
  // Brings everything back. read() and guards_hold() are about that.
  void receive(cudaStream_t stream) {
    must(cudaStreamSynchronize(stream), "synchronise");
    now_.resize(image_.size());
    if (image_.empty()) return;
    must(cudaMemcpyAsync(now_.data(), base_, now_.size(), cudaMemcpyDeviceToHost, stream),
         "copy back");
    must(cudaStreamSynchronize(stream), "synchronise");
  }
  void read(void* to, const std::byte* from, std::size_t bytes) const {
    if (bytes == 0) return;
    if (apart_)
      must(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy back");
    else
      std::memcpy(to, now_.data() + (from - static_cast<const std::byte*>(base_)), bytes);
  }
  // Whether nothing was written just before and after a piece.
  bool guards_hold(const std::byte* piece, std::size_t bytes) const {
    if (apart_) return true;
    const std::byte* at = now_.data() + (piece - static_cast<const std::byte*>(base_));
    return std::all_of(at - kGuard / 2, at, [](std::byte b) { return b == kCanary; }) &&
           std::all_of(at + bytes, at + bytes + kGuard / 2,
                       [](std::byte b) { return b == kCanary; });
  }

 private:
  void* base_ = nullptr;
  std::size_t size_, used_ = 0;
  bool apart_;
  std::vector<void*> pieces_;
  std::vector<std::byte> image_, now_;
};

// One piece of device memory with its host image.
struct Piece {
  std::byte* device = nullptr;
  std::vector<std::byte> image;
};

class DeviceProblem {
 public:
  // `aligned`: tensors in strides that are multiples of 8 elements and bases of 16 bytes, else as
  // the host's.
  DeviceProblem(Problem& host, Arena& arena, bool aligned)
      : host_(host), arena_(arena), aligned_(aligned), backward(host.backward) {
    ForwardProblem& f = backward.forward;
    const auto entries = static_cast<std::size_t>(batch_entries(f));
    move(f.q);
    move(f.k);
    move(f.v);
    move(f.bias);
    move(backward.dout);
    move(f.out);
    move(backward.dq);
    move(backward.dk);
    move(backward.dv);
    move(backward.dbias);
    rows_ = static_cast<std::size_t>(f.q.batch() * f.q.heads() * f.q.seqlen());
    lse_host_ = f.lse;
    f.lse = const_cast<float*>(array(f.lse, rows_, &lse_));
    backward.dlse = array(backward.dlse, rows_);
    f.sink = array(f.sink, static_cast<std::size_t>(f.q.heads()));
    dsink_host_ = backward.dsink;
    backward.dsink =
        const_cast<float*>(array(backward.dsink, static_cast<std::size_t>(f.q.heads()), &dsink_));
    Sequences& s = f.sequences;
    s.cu_seqlens_q = array(s.cu_seqlens_q, entries + 1);
    s.cu_seqlens_k = array(s.cu_seqlens_k, entries + 1);
    s.start_q = array(s.start_q, entries);
    s.start_k = array(s.start_k, entries);
    s.seqused_q = array(s.seqused_q, entries);
    s.seqused_k = array(s.seqused_k, entries);
    f.intervals.rows =
        array(f.intervals.rows, static_cast<std::size_t>(2 * f.q.seqlen() * f.q.batch()));
    f.intervals.bits = array(
        f.intervals.bits,
        static_cast<std::size_t>(f.intervals.bits_words *
                                 (f.intervals.bits_batch_stride == 0 ? 1 : batch_entries(f))));
    f.paged.page_table =
        array(f.paged.page_table, static_cast<std::size_t>(f.paged.max_pages) * entries);
    f.dropout.seed = array(f.dropout.seed, 1);
  }

  // `bytes` of poisoned scratch memory.
  Workspace workspace(std::size_t bytes) {
    if (bytes == 0) return {};
    Piece piece;
    piece.image.assign(bytes, std::byte{0xFF});
    upload(piece, 0);
    pieces_.push_back(piece);
    return {piece.device, bytes};
  }

  // Brings results to the host's tensors, after Arena::receive(). Returns what was touched that
  // must not be; empty: nothing.
  std::string fetch() {
    std::string damage;
    for (Output& o : outputs_) {
      std::vector<std::byte> now(o.piece.image.size());
      arena_.read(now.data(), o.piece.device, now.size());
      std::vector<bool> element(now.size(), false);
      const std::size_t size = size_of(o.host.dtype);
      each(o.host, o.device, [&](std::int64_t to, std::int64_t from) {
        const auto at = static_cast<std::size_t>(from) * size;
        std::memcpy(static_cast<std::byte*>(o.host.data) + static_cast<std::size_t>(to) * size,
                    &now[at], size);
        for (std::size_t i = 0; i < size; ++i) element[at + i] = true;
      });
      for (std::size_t i = 0; i < now.size(); ++i)
        if (!element[i] && now[i] != o.piece.image[i])
          damage = "wrote between the elements of an output";
    }
    if (lse_host_ != nullptr) arena_.read(lse_host_, lse_.device, rows_ * sizeof(float));
    if (dsink_host_ != nullptr) arena_.read(dsink_host_, dsink_.device, dsink_.image.size());
    for (const Piece& piece : pieces_)
      if (!arena_.guards_hold(piece.device, piece.image.size())) damage = "wrote outside a buffer";
    return damage;
  }

 private:
  struct Output {
    TensorView host, device;
    Piece piece;
  };

  Problem& host_;
  Arena& arena_;
  bool aligned_;
  std::vector<Output> outputs_;
  std::vector<Piece> pieces_;
  Piece lse_, dsink_;
  float *lse_host_ = nullptr, *dsink_host_ = nullptr;
  std::size_t rows_ = 0;

  void upload(Piece& piece, std::size_t phase) { piece.device = arena_.take(piece.image, phase); }

  template <class T>
  const T* array(const T* values, std::size_t count, Piece* keep = nullptr) {
    if (values == nullptr) return nullptr;
    Piece piece;
    piece.image.resize(count * sizeof(T));
    if (count > 0) std::memcpy(piece.image.data(), values, piece.image.size());
    upload(piece, sizeof(T));
    pieces_.push_back(piece);
    if (keep != nullptr) *keep = piece;
    return reinterpret_cast<const T*>(piece.device);
  }

  template <class Body>
  static void each(const TensorView& a, const TensorView& b, const Body& body) {
    const bool packed = a.rank == 3;
    for (std::int64_t n = 0; n < a.batch(); ++n)
      for (std::int64_t s = 0; s < a.seqlen(); ++s)
        for (std::int64_t h = 0; h < a.heads(); ++h)
          for (std::int64_t c = 0; c < a.head_dim(); ++c)
            body((packed ? 0 : n * a.stride[0]) + s * a.seqlen_stride() + h * a.head_stride() + c,
                 (packed ? 0 : n * b.stride[0]) + s * b.seqlen_stride() + h * b.head_stride() + c);
  }

  static std::int64_t extent(const TensorView& t) {
    std::int64_t last = 0;
    for (int d = 0; d < t.rank; ++d) {
      const auto at = static_cast<std::size_t>(d);
      if (t.shape[at] == 0) return 0;
      last += (t.shape[at] - 1) * t.stride[at];
    }
    return last + 1;
  }

  TensorView moved(const TensorView& host, Piece& piece) {
    TensorView device = host;
    const std::size_t size = size_of(host.dtype);
    if (aligned_) device = aligned_strides(host);
    piece.image.resize(static_cast<std::size_t>(extent(device)) * size);
    const std::uint64_t bits = poison_bits(host.dtype, host_.poison);
    for (std::size_t i = 0; i < piece.image.size(); i += size)
      std::memcpy(&piece.image[i], &bits, size);
    each(host, device, [&](std::int64_t from, std::int64_t to) {
      std::memcpy(&piece.image[static_cast<std::size_t>(to) * size],
                  static_cast<const std::byte*>(host.data) + static_cast<std::size_t>(from) * size,
                  size);
    });
    upload(piece, aligned_ ? 0 : reinterpret_cast<std::uintptr_t>(host.data) % 256 / size * size);
    pieces_.push_back(piece);
    device.data = piece.device;
    return device;
  }
  void move(ConstTensorView& view) {
    if (view.data == nullptr) return;
    Piece piece;
    const TensorView host{const_cast<void*>(view.data), view.dtype, view.rank, view.shape,
                          view.stride};
    view = moved(host, piece);
  }
  void move(TensorView& view) {
    if (view.data == nullptr) return;
    Output o{.host = view, .device = {}, .piece = {}};
    o.device = moved(view, o.piece);
    view = o.device;
    outputs_.push_back(std::move(o));
  }

 public:
  BackwardProblem backward;
};

}  // namespace heed::test
