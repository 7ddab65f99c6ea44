// The operators heed::forward, heed::attention and heed::backward: tensors in, plan, run, tensors
// out.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "api/message.hpp"
#include "arguments.hpp"
#include "band_mask.hpp"
#include "heed/heed.hpp"
#include "registry.hpp"
#include "target.hpp"
#include "tensors.hpp"

namespace heed::operators {
namespace {

// What the operators take besides tensors like q.
struct Fields {
  // Those that most calls have; the others are absent.
  static Fields common(Arguments& a) {
    Fields f;
    f.scale = a.take<std::optional<double>>();
    f.left = a.take<std::int64_t>();
    f.right = a.take<std::int64_t>();
    f.intervals = a.optional_tensor();
    return f;
  }
  static Fields all(Arguments& a) {
    Fields f = common(a);
    for (auto* tensor : {&f.bias, &f.sink}) *tensor = a.optional_tensor();
    f.softcap = a.take<double>();
    f.chunk = a.take<std::int64_t>();
    f.dropout_p = a.take<double>();
    for (auto* tensor : {&f.seed, &f.key_bits, &f.cu_seqlens_q, &f.cu_seqlens_k, &f.start_q,
                         &f.start_k, &f.seqused_q, &f.seqused_k, &f.page_table})
      *tensor = a.optional_tensor();
    f.max_seqlen_q = a.take<std::int64_t>();
    f.max_seqlen_k = a.take<std::int64_t>();
    f.deterministic = a.take<bool>();
    return f;
  }

  std::optional<double> scale;
  std::int64_t left = -1, right = -1;
  std::optional<Tensor> intervals, bias, sink;
  double softcap = 0;
  std::int64_t chunk = 0;
  double dropout_p = 0;
  std::optional<Tensor> seed, key_bits, cu_seqlens_q, cu_seqlens_k, start_q, start_k, seqused_q,
      seqused_k, page_table;
  std::int64_t max_seqlen_q = -1, max_seqlen_k = -1;
  bool deterministic = false;
};
constexpr const char* kCommonFields =
    "float? scale=None, int left=-1, int right=-1, Tensor? intervals=None";
constexpr const char* kOtherFields =
    ", Tensor? bias=None, Tensor? sink=None, float softcap=0.0, int chunk=0, float dropout_p=0.0, "
    "Tensor? seed=None, Tensor? key_bits=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? start_q=None, Tensor? start_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, Tensor? page_table=None, "
    "SymInt max_seqlen_q=-1, SymInt max_seqlen_k=-1, bool deterministic=False";

// -1 is unbounded; what no int holds is refused with the nearest one.
int band_limit(std::int64_t limit) {
  if (limit == -1 || limit > kUnbounded) return kUnbounded;
  return static_cast<int>(std::max<std::int64_t>(limit, std::numeric_limits<int>::min()));
}

// A forward problem together with the tensors that it points into.
class Problem {
 public:
  Problem(const Tensor& q, const Tensor& k, const Tensor& v, const Fields& fields)
      : q_(with_unit_stride(q)), k_(with_unit_stride(k)), v_(with_unit_stride(v)) {
    check_device("k", k, q);
    check_device("v", v, q);
    problem_.q = view_of("q", q_);
    problem_.k = view_of("k", k_);
    problem_.v = view_of("v", v_);
    set_scalars(fields);
    set_sequences(fields);
    set_intervals(fields);
    set_bias(fields);
    set_sink(fields);
    seed_ = Array("seed", fields.seed, q_, dtype_codes().int64, "[1]", {{1}});
    problem_.dropout.seed = seed_.data<std::uint64_t>();
  }

  ForwardProblem& operator*() { return problem_; }
  ForwardProblem* operator->() { return &problem_; }
  const Tensor& q() const { return q_; }
  const Tensor& k() const { return k_; }
  const Tensor& v() const { return v_; }

  // Shapes of the results; the last one is also that of out's gradient.
  std::array<std::int64_t, 4> out_shape() const {
    std::array<std::int64_t, 4> shape = problem_.q.shape;
    shape[rank() - 1] = problem_.v.head_dim();
    return shape;
  }
  std::array<std::int64_t, 3> lse_shape() const {
    const ConstTensorView& q = problem_.q;
    if (q.rank == 3) return {q.heads(), q.seqlen(), 0};
    return {q.batch(), q.heads(), q.seqlen()};
  }
  std::size_t rank() const { return static_cast<std::size_t>(problem_.q.rank); }

 private:
  void set_scalars(const Fields& f) {
    problem_.band = {.left = band_limit(f.left), .right = band_limit(f.right)};
    problem_.band.chunk = static_cast<int>(
        std::clamp<std::int64_t>(f.chunk, std::numeric_limits<int>::min(), kUnbounded));
    if (f.scale) problem_.score.scale = static_cast<float>(*f.scale);
    problem_.score.softcap = static_cast<float>(f.softcap);
    problem_.dropout.probability = static_cast<float>(f.dropout_p);
    problem_.sequences.max_seqlen_q = f.max_seqlen_q == -1 ? 0 : f.max_seqlen_q;
    problem_.sequences.max_seqlen_k = f.max_seqlen_k == -1 ? 0 : f.max_seqlen_k;
  }

  void set_sequences(const Fields& f) {
    Sequences& s = problem_.sequences;
    const auto array = [&](const char* name, const std::optional<Tensor>& tensor,
                           const char* meaning, std::initializer_list<std::int64_t> shape) {
      return Array(name, tensor, q_, dtype_codes().int32, meaning, {shape});
    };
    if (problem_.q.rank == 4) {
      batch_ = problem_.q.batch();
    } else if (f.cu_seqlens_q) {
      cu_seqlens_q_ = array("cu_seqlens_q", f.cu_seqlens_q, "[batch + 1]", {Array::kAny});
      batch_ = cu_seqlens_q_.extent(0) - 1;
      if (batch_ < 0) raise(invalid("cu_seqlens_q.shape = [0] must be [batch + 1]"));
      s.batch = batch_;
    }
    const std::int64_t ends = batch_ == Array::kAny ? Array::kAny : batch_ + 1;
    cu_seqlens_q_ = array("cu_seqlens_q", f.cu_seqlens_q, "[batch + 1]", {ends});
    cu_seqlens_k_ = array("cu_seqlens_k", f.cu_seqlens_k, "[batch + 1]", {ends});
    start_q_ = array("start_q", f.start_q, "[batch]", {batch_});
    start_k_ = array("start_k", f.start_k, "[batch]", {batch_});
    seqused_q_ = array("seqused_q", f.seqused_q, "[batch]", {batch_});
    seqused_k_ = array("seqused_k", f.seqused_k, "[batch]", {batch_});
    page_table_ = array("page_table", f.page_table, "[batch, max_pages]", {batch_, Array::kAny});
    s.cu_seqlens_q = cu_seqlens_q_.data<std::int32_t>();
    s.cu_seqlens_k = cu_seqlens_k_.data<std::int32_t>();
    s.start_q = start_q_.data<std::int32_t>();
    s.start_k = start_k_.data<std::int32_t>();
    s.seqused_q = seqused_q_.data<std::int32_t>();
    s.seqused_k = seqused_k_.data<std::int32_t>();
    problem_.paged.page_table = page_table_.data<std::int32_t>();
    if (page_table_) problem_.paged.max_pages = page_table_.extent(1);
  }

  void set_intervals(const Fields& f) {
    if (f.intervals && f.intervals->dim() == 4) return set_mask(f);
    KeyIntervals& at = problem_.intervals;
    const std::int64_t rows = problem_.q.seqlen();
    const auto int32 = dtype_codes().int32;
    intervals_ = problem_.q.rank == 3
                     ? Array("intervals", f.intervals, q_, int32, "[total_q, 2]", {{rows, 2}})
                     : Array("intervals", f.intervals, q_, int32, "[batch or 1, seqlen_q, 2]",
                             {{batch_, rows, 2}, {1, rows, 2}});
    key_bits_ = Array("key_bits", f.key_bits, q_, int32, "[batch or 1, words]",
                      {{batch_, Array::kAny}, {1, Array::kAny}});
    at.rows = intervals_.data<std::int32_t>();
    at.bits = key_bits_.data<std::uint32_t>();
    if (intervals_ && problem_.q.rank == 4) at.rows_batch_stride = intervals_.batch_stride();
    if (key_bits_) {
      at.bits_batch_stride = key_bits_.batch_stride();
      at.bits_words = key_bits_.extent(1);
    }
  }

  // Intervals and, in the rows after them, key bits in one tensor, as heed::band_mask makes it.
  void set_mask(const Fields& f) {
    const std::int64_t rows = problem_.q.seqlen(), keys = problem_.k.seqlen();
    mask_ = *f.intervals;
    check_device("intervals", *mask_, q_);
    check_dtype("intervals", *mask_, dtype_codes().int32);
    const Shape shape = shape_of(*mask_);
    const std::int64_t words = 2 * (shape[2] - rows);
    if (problem_.q.rank != 4 || problem_.k.rank != 4 || (shape[0] != batch_ && shape[0] != 1) ||
        shape[1] != 1 || shape[3] != 2 || words < 0 || (words > 0 && 32 * words < keys))
      raise(invalid("intervals.shape = ", text_of(shape),
                    " must be [batch or 1, 1, seqlen_q + n, 2], where n is 0 or n rows have a bit "
                    "for each key; q.shape = ",
                    text_of(shape_of(q_)), ", k.shape = ", text_of(shape_of(k_))));
    if (f.key_bits) raise(invalid("key_bits must be None when intervals.rank = 4"));
    if (mask_->stride(3) != 1 || (shape[2] > 1 && mask_->stride(2) != 2))
      mask_ = torch::stable::contiguous(*mask_);
    KeyIntervals& at = problem_.intervals;
    at.rows = static_cast<const std::int32_t*>(data_of(*mask_));
    at.rows_batch_stride = shape[0] == 1 ? 0 : mask_->stride(0);
    if (words == 0) return;
    at.bits = reinterpret_cast<const std::uint32_t*>(at.rows + 2 * rows);
    at.bits_batch_stride = at.rows_batch_stride;
    at.bits_words = words;
  }

  void set_bias(const Fields& f) {
    if (!f.bias) return;
    check_device("bias", *f.bias, q_);
    if (f.bias->dim() != 4)
      raise(invalid("bias.rank = ", f.bias->dim(),
                    " must be 4, [batch or 1, heads_q or 1, seqlen_q or 1, seqlen_k]"));
    bias_ = with_unit_stride(*f.bias);
    problem_.bias = view_of("bias", *bias_);
  }

  void set_sink(const Fields& f) {
    if (!f.sink) return;
    const std::int32_t code = dtype_code(*f.sink);
    const DTypeCodes& codes = dtype_codes();
    const bool is_float =
        code == codes.bf16 || code == codes.f16 || code == codes.f32 || code == codes.f64;
    const std::optional<Tensor> sink = is_float ? cast(*f.sink, codes.f32) : *f.sink;
    sink_ = Array("sink", sink, q_, codes.f32, "[heads_q]", {{problem_.q.heads()}});
    problem_.sink = sink_.data<float>();
  }

  ForwardProblem problem_;
  std::int64_t batch_ = Array::kAny;
  Tensor q_, k_, v_;
  std::optional<Tensor> bias_, mask_;
  Array sink_, intervals_, key_bits_, cu_seqlens_q_, cu_seqlens_k_, start_q_, start_k_, seqused_q_,
      seqused_k_, page_table_, seed_;
};

// Workspace for the CPU that stays with the calling thread. Memory that is new to the process costs
// a page fault every 4 KB: up to half of the time of a backward on 16 threads.
class KeptMemory {
 public:
  // nullptr where `bytes`, whole units of the alignment, are too many to keep.
  void* at_least(std::size_t bytes) {
    if (bytes > kMostBytes) return nullptr;
    if (bytes > bytes_) {
      memory_.reset();  // before its successor, so that there are never two
      memory_.reset(std::aligned_alloc(kWorkspaceAlignment, bytes));
      bytes_ = memory_ == nullptr ? 0 : bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::size_t kMostBytes = 128 << 20;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t bytes_ = 0;
};
thread_local KeptMemory kept_memory;  // of both passes

template <class AnyProblem>
void plan_and_run(const AnyProblem& problem, const Tensor& q, const Options& options) {
  Target target;
  aim_at(target, q);
  const Result<Plan> chosen = plan(problem, target.device, options);
  if (!chosen.ok()) raise(chosen.status());
  std::optional<Tensor> scratch;
  Workspace workspace{.bytes = chosen->workspace_bytes};
  if (workspace.bytes > 0 && target.device.is_cpu())
    workspace.data = kept_memory.at_least(workspace.bytes);
  if (workspace.bytes > 0 && workspace.data == nullptr) {
    const std::int64_t bytes = static_cast<std::int64_t>(workspace.bytes);
    scratch = empty({&bytes, 1}, aoti_torch_dtype_uint8(), q);
    workspace.data = scratch->mutable_data_ptr();
  }
  check(run(*chosen, problem, workspace, target.queue));
}

// out and, if it is wanted, lse.
std::pair<Tensor, std::optional<Tensor>> attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Fields& fields, bool want_lse) {
  Problem problem(q, k, v, fields);
  const auto out_shape = problem.out_shape();
  const Tensor out = empty({out_shape.data(), problem.rank()}, dtype_code(q), q);
  problem->out = mutable_view_of("out", out);
  std::optional<Tensor> lse;
  if (want_lse) {
    const auto lse_shape = problem.lse_shape();
    lse = empty({lse_shape.data(), problem.rank() - 1}, dtype_codes().f32, q);
    problem->lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  plan_and_run(*problem, q, {.deterministic = fields.deterministic});
  return {out, lse};
}

template <Fields (*kFields)(Arguments&)>
void forward(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  const auto q = arguments.take<Tensor>(), k = arguments.take<Tensor>(),
             v = arguments.take<Tensor>();
  const bool want_lse = arguments.take<bool>();
  const auto [out, lse] = attend(q, k, v, kFields(arguments), want_lse);
  stack[0] = torch::stable::detail::from(out);
  stack[1] = torch::stable::detail::from(lse);
}

void attention(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  const auto q = arguments.take<Tensor>(), k = arguments.take<Tensor>(),
             v = arguments.take<Tensor>();
  const auto [out, lse] = attend(q, k, v, Fields::all(arguments), true);
  stack[0] = torch::stable::detail::from(out);
  stack[1] = torch::stable::detail::from(*lse);
}

// The gradient of an optional argument: f32 while it is computed, its argument's dtype in the end;
// none if it is not wanted.
class Gradient {
 public:
  Gradient(const std::optional<Tensor>& of, bool wanted, const Tensor& q) {
    if (!of || !wanted || dtype_code(*of) == dtype_codes().boolean) return;
    dtype_ = dtype_code(*of);
    tensor_ = empty(shape_of(*of), dtype_codes().f32, q);
  }

  bool wanted() const { return tensor_.has_value(); }
  const Tensor& tensor() const { return *tensor_; }
  std::optional<Tensor> result() const {
    return tensor_ ? std::optional(cast(*tensor_, dtype_)) : std::nullopt;
  }

 private:
  std::int32_t dtype_ = 0;
  std::optional<Tensor> tensor_;
};

void backward(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments arguments(stack);
  const auto dout = arguments.take<Tensor>();
  const auto dlse = arguments.optional_tensor();
  const auto q = arguments.take<Tensor>(), k = arguments.take<Tensor>(),
             v = arguments.take<Tensor>(), out = arguments.take<Tensor>(),
             lse = arguments.take<Tensor>();
  const Fields fields = Fields::all(arguments);
  const bool want_dbias = arguments.take<bool>(), want_dsink = arguments.take<bool>();

  Problem forward_problem(q, k, v, fields);
  const Tensor dq = empty(shape_of(q), dtype_code(q), q);
  const Tensor dk = empty(shape_of(k), dtype_code(k), q);
  const Tensor dv = empty(shape_of(v), dtype_code(v), q);
  const Gradient dbias(fields.bias, want_dbias, q), dsink(fields.sink, want_dsink, q);

  check_device("dout", dout, q);
  check_device("out", out, q);
  const Tensor dout_rows = with_unit_stride(dout), out_rows = with_unit_stride(out);
  const bool packed = forward_problem.rank() == 3;
  const auto rows = forward_problem.lse_shape();
  const auto row_values = [&](const char* name, const std::optional<Tensor>& tensor) {
    const auto f32 = dtype_codes().f32;
    return packed ? Array(name, tensor, q, f32, "[heads_q, total_q]", {{rows[0], rows[1]}})
                  : Array(name, tensor, q, f32, "[batch, heads_q, seqlen_q]",
                          {{rows[0], rows[1], rows[2]}});
  };
  const Array lse_values = row_values("lse", lse), dlse_values = row_values("dlse", dlse);
  const ConstTensorView out_view = view_of("out", out_rows);
  forward_problem->out = {const_cast<void*>(out_view.data), out_view.dtype, out_view.rank,
                          out_view.shape, out_view.stride};
  forward_problem->lse = const_cast<float*>(lse_values.data<float>());

  BackwardProblem problem;
  problem.forward = *forward_problem;
  problem.dout = view_of("dout", dout_rows);
  problem.dlse = dlse_values.data<float>();
  problem.dq = mutable_view_of("dq", dq);
  problem.dk = mutable_view_of("dk", dk);
  problem.dv = mutable_view_of("dv", dv);
  if (dbias.wanted()) problem.dbias = mutable_view_of("dbias", dbias.tensor());
  if (dsink.wanted()) problem.dsink = static_cast<float*>(dsink.tensor().mutable_data_ptr());
  plan_and_run(problem, q, {.deterministic = fields.deterministic});

  stack[0] = torch::stable::detail::from(dq);
  stack[1] = torch::stable::detail::from(dk);
  stack[2] = torch::stable::detail::from(dv);
  stack[3] = torch::stable::detail::from(dbias.result());
  stack[4] = torch::stable::detail::from(dsink.result());
}

// For `python -m heed`: "cpu<tab>isa", "gpu<tab>arch<tab>why there is none", then a line
// "kernel<tab>reason" per row of the table, best first; the reason is empty where the kernel runs
// on this machine.
void kernels(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const Result<Device> cpu = Device::cpu(), gpu = Device::cuda(0);
  check(cpu.status());
  std::string text = concat("cpu\t", name_of(cpu->arch), "\ngpu\t");
  text += gpu.ok() ? concat(name_of(gpu->arch), "\t\n") : "\t" + gpu.status().message() + "\n";
  for (const KernelRow& row : registry()) {
    const bool on_gpu = row.arch >= Arch::sm80;
    text += name_of(row) + "\t";
    if (on_gpu && !gpu.ok()) {
      text += "no GPU\n";
      continue;
    }
    const std::string name = name_of(row);  // forced: whether it is worth it depends on the problem
    const char* const forced = std::getenv("HEED_FORCE_KERNEL");
    const Request request{.pass = row.pass,
                          .dtype = row.dtype,
                          .arch = on_gpu ? gpu->arch : cpu->arch,
                          .head_dim = 1,
                          .query_rows = 1,
                          .force = forced == nullptr ? name.c_str() : forced,
                          .score = row.score,
                          .smem_bytes = on_gpu ? gpu->smem_bytes : 0};
    const Mismatch why = mismatch(row, request);
    if (why != Mismatch::none) text += describe(why, row, request);
    text += "\n";
  }
  stack[0] = torch::stable::detail::from(text);
}

}  // namespace

// forward_band is forward without what few calls have: every argument takes PyTorch 50 to 100 ns,
// given or not. attention is forward with gradients, which python/heed/ops.py gives it, for
// tracing.
STABLE_TORCH_LIBRARY(heed, m) {
  const std::string fields = concat(kCommonFields, kOtherFields);
  m.def(concat("forward_band(Tensor q, Tensor k, Tensor v, bool want_lse, ", kCommonFields,
               ") -> (Tensor out, Tensor? lse)")
            .c_str());
  m.def(concat("forward(Tensor q, Tensor k, Tensor v, bool want_lse, ", fields,
               ") -> (Tensor out, Tensor? lse)")
            .c_str());
  m.def(concat("attention(Tensor q, Tensor k, Tensor v, ", fields, ") -> (Tensor out, Tensor lse)")
            .c_str());
  m.def(concat("backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
               "Tensor lse, ",
               fields,
               ", bool want_dbias=True, bool want_dsink=True) -> "
               "(Tensor dq, Tensor dk, Tensor dv, Tensor? dbias, Tensor? dsink)")
            .c_str());
  m.def(kBandMaskSchema);
  m.def("kernels() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("forward_band", &forward<Fields::common>);
  m.impl("forward", &forward<Fields::all>);
  m.impl("attention", &attention);
  m.impl("backward", &backward);
}

STABLE_TORCH_LIBRARY_IMPL(heed, CUDA, m) {
  m.impl("forward_band", &forward<Fields::common>);
  m.impl("forward", &forward<Fields::all>);
  m.impl("attention", &attention);
  m.impl("backward", &backward);
}

// These may have no tensor among their arguments.
STABLE_TORCH_LIBRARY_IMPL(heed, CompositeExplicitAutograd, m) {
  m.impl("band_mask", &band_mask);
  m.impl("kernels", &kernels);
}

}  // namespace heed::operators
