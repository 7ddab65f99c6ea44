// The C interface on small problems: every tensor and array stands in memory of exactly its size,
// where the address sanitizer sees a step outside. Shapes, strides and contents may contradict each
// other; what is legal runs, forward and backward, on any kernel of this CPU.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "fuzz/bytes.hpp"
#include "fuzz/target.hpp"

namespace heed::fuzz {
namespace {

std::size_t element_bytes(std::int32_t dtype) {
  constexpr std::size_t kBytes[] = {4, 2, 2, 8, 1};
  return dtype >= HEED_F32 && dtype <= HEED_BOOL ? kBytes[dtype] : 8;
}

// Small numbers of any dtype that are no NaN and no infinity.
void fill(std::byte* data, std::size_t bytes, std::int32_t dtype, std::uint32_t seed) {
  for (std::size_t at = 0; at < bytes; at += element_bytes(dtype)) {
    seed = seed * 1664525u + 1013904223u;
    const float x = static_cast<float>(static_cast<std::int32_t>(seed)) * 0x1p-30f;
    const double wide = double{x};
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, 4);
    switch (dtype) {
      case HEED_F32: std::memcpy(data + at, &x, 4); break;
      case HEED_F64: std::memcpy(data + at, &wide, 8); break;
      case HEED_BF16:
        std::memcpy(data + at, reinterpret_cast<const std::byte*>(&bits) + 2, 2);
        break;
      case HEED_F16: {
        const auto half = static_cast<std::uint16_t>(seed >> 16 & 0xBFFFu);  // below 2 in size
        std::memcpy(data + at, &half, 2);
        break;
      }
      default: data[at] = static_cast<std::byte>(seed >> 24 & 1u);
    }
  }
}

bool is_nan(const std::byte* at, std::int32_t dtype) {
  std::uint16_t half = 0;
  std::memcpy(&half, at, 2);
  if (dtype == HEED_BF16) return (half & 0x7FFFu) > 0x7F80u;
  if (dtype == HEED_F16) return (half & 0x7FFFu) > 0x7C00u;
  if (dtype == HEED_F64) {
    double x = 0;
    std::memcpy(&x, at, 8);
    return std::isnan(x);
  }
  float x = 0;
  std::memcpy(&x, at, 4);
  return std::isnan(x);
}

class Problem {
 public:
  Problem(const std::uint8_t* data, std::size_t size) : bytes_(data, size) {}

  void run() {
    heed_device device;
    expect(ok(heed_device_cpu(&device)), "there is a CPU");
    device.units = 1 + bytes_.below(3);
    heed_options options = HEED_OPTIONS_INIT;
    constexpr const char* kKernels[] = {nullptr, "scalar", "reference", "avx2", "avx512/"};
    options.force = bytes_.pick(kKernels);
    options.splits = bytes_.below(4);
    decode();
    forward_and_backward(device, options);
  }

 private:
  static constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  static constexpr std::size_t kMostBytes = 1 << 16;  // of one tensor or array
  static constexpr double kMostWork = 1 << 15;        // pairs of rows, about

  // ---- the problem ----

  void decode() {
    batch_ = extent(4);
    heads_k_ = extent(3);
    heads_q_ = times(heads_k_, 1 + bytes_.below(3));
    seqlen_q_ = extent(40);
    seqlen_k_ = extent(70);
    head_dim_ = 1 + bytes_.below(40);
    head_dim_v_ = bytes_.one_in(3) ? 1 + bytes_.below(40) : head_dim_;
    constexpr std::int32_t kDTypes[] = {HEED_F32, HEED_F32, HEED_BF16, HEED_F16, HEED_F64};
    dtype_ = bytes_.one_in(64) ? bytes_.byte() : bytes_.pick(kDTypes);
    const int layout_q = bytes_.below(3), layout_k = bytes_.below(4);
    packed_q_ = layout_q == 1;
    packed_k_ = layout_k == 1;
    paged_ = layout_k == 3;

    decode_tensors();
    decode_sequences(layout_q == 2, layout_k == 2);
    forward_.band = {limit(), limit(), bytes_.one_in(4) ? bytes_.below(20) : 0};
    forward_.score = {bytes_.one_in(3) ? 1 : 0, bytes_.number(),
                      bytes_.one_in(4) ? bytes_.number() : 0.f};
    decode_masks();
    if (bytes_.one_in(4)) {
      forward_.sink = array<float>(heads_q_);
      backward_.dsink = bytes_.one_in(2) ? array<float>(heads_q_) : nullptr;
    }
    if (bytes_.one_in(4))
      forward_.dropout = {bytes_.pick({0.f, 0.1f, 0.5f, 0.99f, 1.f, -1.f}),
                          array<std::uint64_t>(1)};
  }

  void decode_tensors() {
    const std::int64_t keys = paged_ ? page_size_ = 1 + bytes_.below(9) : seqlen_k_;
    const std::int64_t rows = paged_ ? pages_ = bytes_.below(12) : batch_;
    forward_.q = tensor(packed_q_, batch_, seqlen_q_, heads_q_, head_dim_);
    forward_.k = tensor(packed_k_, rows, keys, heads_k_, head_dim_);
    forward_.v = tensor(packed_k_, rows, keys, heads_k_, head_dim_v_);
    forward_.out = tensor(packed_q_, batch_, seqlen_q_, heads_q_, head_dim_v_);
    backward_.dout = tensor(packed_q_, batch_, seqlen_q_, heads_q_, head_dim_v_);
    backward_.dq = tensor(packed_q_, batch_, seqlen_q_, heads_q_, head_dim_);
    backward_.dk = tensor(packed_k_, rows, keys, heads_k_, head_dim_);
    backward_.dv = tensor(packed_k_, rows, keys, heads_k_, head_dim_v_);
    const std::int64_t statistics = times(times(batch_, heads_q_), seqlen_q_);
    forward_.lse = bytes_.one_in(8) ? nullptr : array<float>(statistics);
    backward_.dlse = bytes_.one_in(3) ? array<float>(statistics) : nullptr;
  }

  void decode_sequences(bool padded_q, bool padded_k) {
    heed_sequences& s = forward_.sequences;
    if (packed_q_ || bytes_.one_in(16)) s.batch = entries_ = bytes_.below(5);
    if (!packed_q_) entries_ = batch_;
    const std::int64_t total_q = packed_q_ ? times(batch_, seqlen_q_) : seqlen_q_;
    const std::int64_t total_k = packed_k_ ? times(batch_, seqlen_k_) : seqlen_k_;
    if (packed_q_ || bytes_.one_in(32)) s.cu_seqlens_q = ascending(total_q);
    if (packed_k_ || bytes_.one_in(32)) s.cu_seqlens_k = ascending(total_k);
    if (padded_q || bytes_.one_in(32)) s.start_q = indices(entries_, seqlen_q_);
    if (padded_k || bytes_.one_in(32)) s.start_k = indices(entries_, seqlen_k_);
    if (bytes_.one_in(4)) s.seqused_q = indices(entries_, seqlen_q_);
    if (paged_) {
      forward_.paged.max_pages = bytes_.below(6);
      forward_.paged.page_table = indices(times(entries_, forward_.paged.max_pages), pages_);
    }
    if (paged_ || bytes_.one_in(4)) s.seqused_k = indices(entries_, paged_ ? 30 : seqlen_k_);
    if (bytes_.one_in(4)) s.max_seqlen_q = bytes_.below(60);
    if (bytes_.one_in(4)) s.max_seqlen_k = bytes_.below(90);
  }

  void decode_masks() {
    heed_key_intervals& at = forward_.intervals;
    if (bytes_.one_in(4)) {
      const std::int64_t row_entries = packed_q_ ? 1 : batch_;
      const std::int64_t elements = times(2, packed_q_ ? times(batch_, seqlen_q_) : seqlen_q_);
      at.rows_batch_stride = stride_between(elements);
      at.rows = indices(span(row_entries, at.rows_batch_stride, elements), seqlen_k_);
    }
    if (bytes_.one_in(4)) {
      at.bits_words = bytes_.below(4);
      at.bits_batch_stride = stride_between(at.bits_words);
      at.bits = array<std::uint32_t>(span(entries_, at.bits_batch_stride, at.bits_words));
    }
    if (!bytes_.one_in(4)) return;
    const heed_sequences& s = forward_.sequences;
    const std::int64_t keys = packed_k_ ? s.max_seqlen_k
                              : paged_  ? times(forward_.paged.max_pages, page_size_)
                                        : seqlen_k_;
    constexpr std::int32_t kDTypes[] = {HEED_F32, HEED_BOOL, HEED_BF16, HEED_F16, HEED_F64};
    const std::int32_t dtype = bytes_.pick(kDTypes);
    const std::int64_t axes[] = {bytes_.one_in(2) ? 1 : entries_, bytes_.one_in(2) ? 1 : heads_q_,
                                 bytes_.one_in(2) ? 1
                                 : packed_q_      ? s.max_seqlen_q
                                                  : seqlen_q_};
    forward_.bias = view(dtype, 4, {axes[0], axes[1], axes[2], keys});
    if (bytes_.one_in(2)) backward_.dbias = view(HEED_F32, 4, {axes[0], axes[1], axes[2], keys});
  }

  // ---- memory ----

  std::int64_t extent(int most) {
    return bytes_.one_in(24) ? bytes_.extreme() : bytes_.below(most + 1);
  }
  std::int32_t limit() { return bytes_.one_in(2) ? bytes_.below(50) : HEED_UNBOUNDED; }
  std::int64_t stride_between(std::int64_t elements) {
    return bytes_.one_in(3) ? 0 : plus(elements, bytes_.below(3));
  }
  static std::int64_t span(std::int64_t entries, std::int64_t stride, std::int64_t elements) {
    return entries < 1 ? 0 : plus(times(entries - 1, stride), elements);
  }
  // Of numbers that are not negative, at most 2^63 - 1; a negative one is the result.
  static std::int64_t plus(std::int64_t a, std::int64_t b) {
    std::int64_t sum = 0;
    if (a < 0 || b < 0) return std::min(a, b);
    return __builtin_add_overflow(a, b, &sum) ? kMost : sum;
  }
  static std::int64_t times(std::int64_t a, std::int64_t b) {
    std::int64_t product = 0;
    if (a < 0 || b < 0) return std::min(a, b);
    return __builtin_mul_overflow(a, b, &product) ? kMost : product;
  }

  // Exactly so many elements; what is too much to allocate is planned and not run.
  std::byte* memory(std::int64_t elements, std::size_t element) {
    if (elements < 0) elements = 0;
    if (elements > static_cast<std::int64_t>(kMostBytes / element)) {
      too_large_ = true;
      elements = 0;
    }
    const std::size_t bytes = static_cast<std::size_t>(elements) * element;
    memory_.emplace_back(static_cast<std::byte*>(std::malloc(bytes)), std::free);
    if (bytes > 0) std::memset(memory_.back().get(), 0, bytes);
    return memory_.back().get();
  }
  template <class T>
  T* array(std::int64_t count) {
    if (bytes_.one_in(64)) return nullptr;
    std::byte* const data = memory(count < 0 ? 0 : count, sizeof(T));
    if (!too_large_)
      fill(data, static_cast<std::size_t>(count < 0 ? 0 : count) * sizeof(T),
           sizeof(T) == 4 ? HEED_F32 : HEED_F64, bytes_.byte());
    return reinterpret_cast<T*>(data);
  }
  // Numbers in [0, most], and now and then any other.
  const std::int32_t* indices(std::int64_t count, std::int64_t most) {
    auto* const data = array<std::int32_t>(count);
    if (data == nullptr || too_large_) return data;
    for (std::int64_t i = 0; i < count; ++i)
      data[i] = bytes_.one_in(32)
                    ? bytes_.raw<std::int32_t>()
                    : static_cast<std::int32_t>(bytes_.byte() % (most < 0 ? 1 : most % 256 + 1));
    return data;
  }
  const std::int32_t* ascending(std::int64_t total) {
    auto* const data = array<std::int32_t>(plus(entries_, 1));
    if (data == nullptr || too_large_) return data;
    std::int32_t at = 0;
    for (std::int64_t i = 0; i <= entries_; ++i) {
      data[i] = bytes_.one_in(48) ? bytes_.raw<std::int32_t>() : at;
      const std::int64_t rest = total < 0 ? 0 : total - at;
      at += static_cast<std::int32_t>(rest > 0 ? bytes_.byte() % (rest % 256 + 1) : 0);
    }
    return data;
  }

  heed_tensor tensor(bool packed, std::int64_t batch, std::int64_t rows, std::int64_t heads,
                     std::int64_t dim) {
    if (packed) return view(dtype_, 3, {times(batch, rows), heads, dim, 0});
    return view(dtype_, 4, {batch, rows, heads, dim});
  }

  // A view of memory that ends with its last element; one of the axes may have an odd extent or
  // stride.
  heed_tensor view(std::int32_t dtype, int rank, const std::int64_t (&shape)[4]) {
    heed_tensor t = HEED_TENSOR_INIT;
    t.dtype = dtype;
    t.rank = rank;
    std::copy_n(shape, 4, t.shape);
    if (bytes_.one_in(48)) t.shape[bytes_.below(4)] = extent(20);
    const int order = bytes_.below(4);  // 0 to 2: row-major; 3: heads before tokens
    std::int64_t step = 1;
    const auto put = [&](int axis, std::int64_t gap) {
      t.stride[axis] = step;
      step = plus(times(std::max<std::int64_t>(t.shape[axis], 1), step), gap);
    };
    const std::int64_t gap = order == 2 ? bytes_.below(5) : 0;
    put(rank - 1, gap);
    put(order == 3 ? rank - 3 : rank - 2, gap);
    put(order == 3 ? rank - 2 : rank - 3, gap);
    if (rank == 4) put(0, gap);
    if (bytes_.one_in(24)) t.stride[bytes_.below(4)] = bytes_.one_in(2) ? bytes_.extreme() : 0;

    std::int64_t elements = 1;
    for (int d = 0; d < rank && elements > 0; ++d)
      elements =
          t.shape[d] < 1
              ? 0
              : plus(elements, std::max<std::int64_t>(times(t.shape[d] - 1, t.stride[d]), 0));
    const std::size_t size = element_bytes(dtype);
    std::byte* const data = memory(elements, size);
    if (!too_large_) fill(data, static_cast<std::size_t>(elements) * size, dtype, bytes_.byte());
    t.data = bytes_.one_in(64) ? nullptr : data;
    if (bytes_.one_in(64) && t.data != nullptr) {
      t.data = data + 1;
      too_large_ = too_large_ || size == 1;  // no longer of its size
    }
    return t;
  }

  // ---- what is done with it ----

  // Tasks are cut into tiles, so that tiny problems cost one too.
  bool affordable() const {
    if (too_large_) return false;
    const auto count = [](std::int64_t n, double more) { return static_cast<double>(n) + more; };
    const double work = count(entries_, 1) * count(heads_q_, 1) *
                        count(times(seqlen_q_, packed_q_ ? batch_ : 1), 1) *
                        count(times(seqlen_k_, packed_k_ ? batch_ : 1), 64);
    return work <= kMostWork;
  }

  void forward_and_backward(const heed_device& device, const heed_options& options) {
    heed_plan plan = HEED_PLAN_INIT;
    const bool planned = ok(heed_plan_forward(&forward_, &device, &options, &plan));
    bool ran = false;
    if (planned && affordable()) {
      ran = with_workspace(plan, [&](heed_workspace scratch) {
        return heed_run_forward(&plan, &forward_, scratch, nullptr);
      });
      if (ran) no_nan(forward_.out);
    }
    backward_.forward = &forward_;
    if (!ok(heed_plan_backward(&backward_, &device, &options, &plan)) || !ran) return;
    const bool done = with_workspace(plan, [&](heed_workspace scratch) {
      return heed_run_backward(&plan, &backward_, scratch, nullptr);
    });
    if (done)
      for (const heed_tensor* t : {&backward_.dq, &backward_.dk, &backward_.dv}) no_nan(*t);
  }

  // Runs in exactly the planned memory, and is refused with less.
  template <class Run>
  static bool with_workspace(const heed_plan& plan, const Run& run) {
    const std::unique_ptr<void, void (*)(void*)> scratch(
        std::aligned_alloc(HEED_WORKSPACE_ALIGNMENT, plan.workspace_bytes), std::free);
    if (plan.workspace_bytes > 0)
      expect(!ok(run({scratch.get(), plan.workspace_bytes - 1})), "less memory is refused");
    return ok(run({scratch.get(), plan.workspace_bytes}));
  }

  // Inputs are small and finite.
  static void no_nan(const heed_tensor& t) {
    const std::int64_t first[] = {t.rank == 4 ? t.shape[0] : 1, t.rank == 4 ? t.stride[0] : 0};
    const std::int64_t* shape = t.shape + (t.rank - 3);
    const std::int64_t* stride = t.stride + (t.rank - 3);
    const auto* data = static_cast<const std::byte*>(t.data);
    const std::size_t size = element_bytes(t.dtype);
    for (std::int64_t b = 0; b < first[0]; ++b)
      for (std::int64_t s = 0; s < shape[0]; ++s)
        for (std::int64_t h = 0; h < shape[1]; ++h)
          for (std::int64_t c = 0; c < shape[2]; ++c) {
            const std::int64_t at = b * first[1] + s * stride[0] + h * stride[1] + c;
            expect(!is_nan(data + at * static_cast<std::int64_t>(size), t.dtype),
                   "finite inputs give no NaN");
          }
  }

  Bytes bytes_;
  std::vector<std::unique_ptr<std::byte, void (*)(void*)>> memory_;
  bool too_large_ = false;
  std::int64_t batch_ = 0, heads_q_ = 0, heads_k_ = 0, seqlen_q_ = 0, seqlen_k_ = 0, head_dim_ = 0,
               head_dim_v_ = 0, entries_ = 0, page_size_ = 1, pages_ = 0;
  std::int32_t dtype_ = HEED_F32;
  bool packed_q_ = false, packed_k_ = false, paged_ = false;
  heed_forward_problem forward_ = HEED_FORWARD_PROBLEM_INIT;
  heed_backward_problem backward_ = HEED_BACKWARD_PROBLEM_INIT;
};

}  // namespace
}  // namespace heed::fuzz

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  heed::fuzz::Problem(data, size).run();
  return 0;
}
