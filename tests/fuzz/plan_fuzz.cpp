// The planner on structs of any bytes: pointers lead to memory that nobody may touch, devices and
// options are invented.
#include <sys/mman.h>

#include "fuzz/bytes.hpp"
#include "fuzz/target.hpp"

namespace heed::fuzz {
namespace {

class Decoder {
 public:
  Decoder(const std::uint8_t* data, std::size_t size) : bytes_(data, size) {}

  heed_device device() {
    heed_device d;
    d.arch = bytes_.one_in(16) ? bytes_.raw<std::int32_t>() : bytes_.below(12);
    d.units = bytes_.one_in(4) ? bytes_.raw<std::int32_t>() : bytes_.below(200);
    d.smem_bytes = bytes_.one_in(4) ? bytes_.raw<std::int32_t>() : 0;
    return d;
  }

  heed_options options() {
    heed_options o = HEED_OPTIONS_INIT;
    o.splits = bytes_.one_in(4) ? bytes_.raw<std::int32_t>() : bytes_.below(9);
    o.deterministic = bytes_.below(2);
    constexpr const char* kNames[] = {nullptr,       nullptr,     nullptr, nullptr,    "scalar",
                                      "sm80/decode", "reference", "",      "no kernel"};
    o.force = bytes_.pick(kNames);
    if (bytes_.one_in(64)) o.size = bytes_.byte();
    return o;
  }

  void decode(heed_forward_problem& f, heed_backward_problem& p) {
    p.forward = &f;
    for (std::int64_t& size : sizes_) size = extent();
    dtype_ = bytes_.below(6);
    rank_ = bytes_.one_in(3) ? 3 : 4;
    f.q = tensor(2, 3);
    f.k = tensor(4, 3);
    f.v = tensor(4, 5);
    f.out = tensor(2, 5);
    p.dout = f.out;
    p.dq = f.q;
    p.dk = f.k;
    p.dv = f.v;
    p.dout.data = address<void>();
    p.dq.data = address<void>();
    p.dk.data = address<void>();
    p.dv.data = address<void>();
    f.lse = address<float>();
    f.band = {limit(), limit(), bytes_.one_in(3) ? limit() : 0};
    f.score = {bytes_.below(2), bytes_.number(), bytes_.one_in(3) ? bytes_.number() : 0.f};
    if (rank_ == 3) {
      f.sequences.batch = sizes_[0];
      f.sequences.cu_seqlens_q = f.sequences.cu_seqlens_k = address<const std::int32_t>();
    }
    if (bytes_.one_in(3)) {
      heed_sequences& s = f.sequences;
      s.batch = extent();
      for (const std::int32_t** array :
           {&s.cu_seqlens_q, &s.cu_seqlens_k, &s.start_q, &s.start_k, &s.seqused_q, &s.seqused_k})
        *array = optional<const std::int32_t>();
      s.max_seqlen_q = extent();
      s.max_seqlen_k = extent();
    }
    if (bytes_.one_in(4))
      f.intervals = {optional<const std::int32_t>(), extent(), optional<const std::uint32_t>(),
                     extent(), extent()};
    if (bytes_.one_in(4)) {
      f.bias = tensor(2, 2);
      f.bias.rank = 4;
      f.bias.dtype = bytes_.below(6);
      for (int d = 0; d < 3; ++d)
        f.bias.shape[d] = bytes_.below(2) ? 1 : sizes_[d == 0 ? 0 : d == 1 ? 1 : 2];
      f.bias.shape[3] = sizes_[4];
      p.dbias = f.bias;
      p.dbias.dtype = HEED_F32;
    }
    f.sink = optional<const float>();
    p.dsink = optional<float>();
    p.dlse = optional<const float>();
    if (bytes_.one_in(4)) {
      f.paged = {optional<const std::int32_t>(), extent()};
      f.sequences.seqused_k = optional<const std::int32_t>();
    }
    if (bytes_.one_in(4)) f.dropout = {bytes_.number(), optional<const std::uint64_t>()};
    if (bytes_.one_in(64)) f.size = bytes_.byte();
    if (bytes_.one_in(64)) p.size = bytes_.byte();
    if (bytes_.one_in(64)) p.forward = nullptr;
  }

 private:
  // sizes_: batch, heads, seqlen_q, head_dim, seqlen_k, head_dim_v.
  std::int64_t extent() { return bytes_.one_in(8) ? bytes_.extreme() : bytes_.byte(); }
  std::int32_t limit() {
    return bytes_.one_in(8)   ? bytes_.raw<std::int32_t>()
           : bytes_.one_in(2) ? HEED_UNBOUNDED
                              : bytes_.byte();
  }

  // Somewhere in a region that can be neither read nor written.
  template <class T>
  T* address() {
    static std::byte* const region = [] {
      void* const map = mmap(nullptr, std::size_t{1} << 32, PROT_NONE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      expect(map != MAP_FAILED, "the address space has 4 GiB");
      return static_cast<std::byte*>(map);
    }();
    if (bytes_.one_in(32)) return nullptr;
    const std::size_t odd = bytes_.one_in(32) ? 1 : 0;
    return reinterpret_cast<T*>(region + (std::size_t{next_++} << 24) + odd);
  }
  template <class T>
  T* optional() {
    return bytes_.one_in(2) ? address<T>() : nullptr;
  }

  heed_tensor tensor(std::size_t rows, std::size_t channels) {
    const std::int64_t heads = rows == 4 && bytes_.one_in(2) ? bytes_.below(9) : sizes_[1];
    const std::int64_t four[] = {sizes_[0], sizes_[rows], heads, sizes_[channels]};
    heed_tensor t = HEED_TENSOR_INIT;
    t.data = address<void>();
    t.dtype = bytes_.one_in(32) ? bytes_.raw<std::int32_t>() : dtype_;
    t.rank = bytes_.one_in(32) ? bytes_.raw<std::int32_t>() : rank_;
    const int first = rank_ == 3 ? 1 : 0;
    std::uint64_t step = 1;
    for (int d = 3; d >= first; --d) {
      t.shape[d - first] = bytes_.one_in(32) ? extent() : four[d];
      t.stride[d - first] = static_cast<std::int64_t>(step);
      if (bytes_.one_in(16)) t.stride[d - first] = bytes_.one_in(2) ? 0 : bytes_.extreme();
      step *= static_cast<std::uint64_t>(four[d]);
    }
    return t;
  }

  Bytes bytes_;
  std::int64_t sizes_[6] = {};
  std::int32_t dtype_ = 0;
  std::int32_t rank_ = 4;
  unsigned next_ = 0;
};

void plan_one(Decoder decoder) {
  const heed_device device = decoder.device();
  const heed_options options = decoder.options();
  heed_forward_problem forward = HEED_FORWARD_PROBLEM_INIT;
  heed_backward_problem backward = HEED_BACKWARD_PROBLEM_INIT;
  decoder.decode(forward, backward);
  heed_plan plan = HEED_PLAN_INIT;
  char text[256];
  for (const bool second : {false, true}) {
    const heed_status status = second ? heed_plan_backward(&backward, &device, &options, &plan)
                                      : heed_plan_forward(&forward, &device, &options, &plan);
    const std::size_t explained =
        second ? heed_explain_backward(&backward, &device, &options, text, sizeof text)
               : heed_explain_forward(&forward, &device, &options, text, sizeof text);
    expect(explained > 0, "every plan and every refusal is explained");
    if (!ok(status)) continue;
    expect(plan.row != nullptr && plan.workers >= 1 && plan.splits >= 1, "a plan is whole");
    expect(plan.workspace_bytes % HEED_WORKSPACE_ALIGNMENT == 0, "a workspace ends aligned");
    expect(heed_describe_plan(&plan, text, sizeof text) > 0, "a plan has a description");
  }
}

}  // namespace
}  // namespace heed::fuzz

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  heed::fuzz::plan_one({data, size});
  return 0;
}
