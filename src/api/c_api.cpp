// The C API: copies the C structs into the C++ ones and calls the same functions.
#include "heed/heed.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <string>

#include "api/message.hpp"
#include "heed/heed.hpp"

namespace {

using heed::Status;

static_assert(HEED_BOOL == static_cast<int>(heed::DType::boolean));
static_assert(HEED_SM120 == static_cast<int>(heed::Arch::sm120));
static_assert(HEED_DEVICE == static_cast<int>(heed::Code::device));
static_assert(HEED_UNBOUNDED == heed::kUnbounded);
static_assert(HEED_WORKSPACE_ALIGNMENT == heed::kWorkspaceAlignment);

heed_status to_c(const Status& status) {
  heed_status c;
  c.code = static_cast<std::int32_t>(status.code());
  const std::size_t length = std::min<std::size_t>(status.message().size(), HEED_MESSAGE_BYTES - 1);
  std::memcpy(c.message, status.message().data(), length);
  c.message[length] = '\0';
  return c;
}

heed_status failed(const char* why) noexcept {
  heed_status c{HEED_DEVICE, {}};
  std::strncpy(c.message, why, HEED_MESSAGE_BYTES - 1);
  return c;
}

// No exception leaves the library; the allocation of an error's text is what can throw.
template <class Body>
heed_status guarded(const Body& body) noexcept {
  try {
    return to_c(body());
  } catch (const std::exception& error) {
    return failed(error.what());
  } catch (...) {
    return failed("an executor threw an exception");
  }
}

template <class Body>
std::size_t guarded_text(char* text, std::size_t bytes, const Body& body) noexcept {
  try {
    const std::string full = body();
    if (bytes > 0) {
      const std::size_t length = std::min(full.size(), bytes - 1);
      std::memcpy(text, full.data(), length);
      text[length] = '\0';
    }
    return full.size();
  } catch (...) {
    if (bytes > 0) *text = '\0';
    return 0;
  }
}

// `size` is the caller's sizeof: a struct of another header must not be read.
template <class T>
Status check_size(const char* name, const T* from) {
  if (from == nullptr) return heed::invalid(name, " = null must point to a struct");
  if (from->size != sizeof(T))
    return heed::invalid(name, ".size = ", from->size, " must be ", sizeof(T),
                         ": start from the struct's _INIT macro in the header of heed ",
                         HEED_VERSION);
  return {};
}

template <class View>
View view(const heed_tensor& t) {
  View v;
  v.data = t.data;
  v.dtype = static_cast<heed::DType>(t.dtype >= 0 && t.dtype < 255 ? t.dtype : 255);
  v.rank = t.rank;
  std::copy_n(t.shape, 4, v.shape.begin());
  std::copy_n(t.stride, 4, v.stride.begin());
  return v;
}

Status read(const heed_forward_problem* from, heed::ForwardProblem& p,
            const char* name = "problem") {
  if (Status s = check_size(name, from); !s.ok()) return s;
  const heed_forward_problem& c = *from;
  p.q = view<heed::ConstTensorView>(c.q);
  p.k = view<heed::ConstTensorView>(c.k);
  p.v = view<heed::ConstTensorView>(c.v);
  p.out = view<heed::TensorView>(c.out);
  p.lse = c.lse;
  p.band = {c.band.left, c.band.right, c.band.chunk};
  if (c.score.has_scale != 0) p.score.scale = c.score.scale;
  p.score.softcap = c.score.softcap;
  const heed_sequences& s = c.sequences;
  p.sequences = {s.batch,     s.cu_seqlens_q, s.cu_seqlens_k, s.start_q,     s.start_k,
                 s.seqused_q, s.seqused_k,    s.max_seqlen_q, s.max_seqlen_k};
  const heed_key_intervals& at = c.intervals;
  p.intervals = {at.rows, at.rows_batch_stride, at.bits, at.bits_batch_stride, at.bits_words};
  p.bias = view<heed::ConstTensorView>(c.bias);
  p.sink = c.sink;
  p.paged = {c.paged.page_table, c.paged.max_pages};
  p.dropout = {c.dropout.probability, c.dropout.seed};
  return {};
}

Status read(const heed_backward_problem* from, heed::BackwardProblem& p) {
  if (Status s = check_size("problem", from); !s.ok()) return s;
  const heed_backward_problem& c = *from;
  if (Status s = read(c.forward, p.forward, "problem.forward"); !s.ok()) return s;
  p.dout = view<heed::ConstTensorView>(c.dout);
  p.dlse = c.dlse;
  p.dq = view<heed::TensorView>(c.dq);
  p.dk = view<heed::TensorView>(c.dk);
  p.dv = view<heed::TensorView>(c.dv);
  p.dbias = view<heed::TensorView>(c.dbias);
  p.dsink = c.dsink;
  return {};
}

Status read(const heed_options* from, heed::Options& options) {
  if (from == nullptr) return {};
  if (Status s = check_size("options", from); !s.ok()) return s;
  options = {from->splits, from->deterministic != 0, from->force};
  return {};
}

Status read(const heed_device* from, heed::Device& device) {
  if (from == nullptr) return heed::invalid("device = null must point to a struct");
  if (from->arch < 0 || from->arch > HEED_SM120)
    return heed::invalid("device.arch = ", from->arch, " must be in [0, ",
                         static_cast<int>(HEED_SM120), "]");
  device = {static_cast<heed::Arch>(from->arch), from->units, from->smem_bytes};
  return {};
}

heed::Plan plan_of(const heed_plan& c) {
  return {static_cast<const heed::KernelRow*>(c.row), c.workers, c.splits, c.workspace_bytes,
          c.deterministic != 0};
}

heed::Workspace workspace_of(heed_workspace c) { return {c.data, c.bytes}; }

class CallerExecutor final : public heed::Executor {
 public:
  explicit CallerExecutor(const heed_executor* c) : c_(c) {}
  int concurrency() const override { return c_->concurrency(c_->user); }
  void run(int workers, void (*body)(void*, int), void* context) override {
    c_->run(c_->user, workers, body, context);
  }

 private:
  const heed_executor* c_;
};

// Holds the executor while a queue names it.
struct CallerQueue {
  explicit CallerQueue(const heed_queue* c) : executor(c == nullptr ? nullptr : c->executor) {
    if (c == nullptr) return;
    if (c->on_gpu != 0) queue = static_cast<CUstream_st*>(c->cuda_stream);
    if (c->executor != nullptr) queue.executor = &executor;
  }
  CallerQueue(const CallerQueue&) = delete;
  CallerQueue& operator=(const CallerQueue&) = delete;

  CallerExecutor executor;
  heed::Queue queue;
};

Status check_queue(const heed_queue* queue) {
  const heed_executor* executor = queue == nullptr ? nullptr : queue->executor;
  if (executor == nullptr || (executor->concurrency != nullptr && executor->run != nullptr))
    return {};
  return heed::invalid("queue.executor.", executor->run == nullptr ? "run" : "concurrency",
                       " = null must point to a function");
}

template <class Problem, class CProblem>
Status plan(const CProblem* problem, const heed_device* device, const heed_options* options,
            heed_plan* plan) {
  if (plan == nullptr) return heed::invalid("plan = null must point to a struct");
  Problem p;
  heed::Device d;
  heed::Options o;
  if (Status s = read(problem, p); !s.ok()) return s;
  if (Status s = read(device, d); !s.ok()) return s;
  if (Status s = read(options, o); !s.ok()) return s;
  const heed::Result<heed::Plan> made = heed::plan(p, d, o);
  if (!made.ok()) return made.status();
  *plan = {made->row, made->workers, made->splits, made->workspace_bytes, made->deterministic};
  return {};
}

template <class Problem, class CProblem>
Status run(const heed_plan* plan, const CProblem* problem, heed_workspace workspace,
           const heed_queue* queue) {
  if (plan == nullptr) return heed::invalid("plan = null must point to a struct");
  Problem p;
  if (Status s = read(problem, p); !s.ok()) return s;
  if (Status s = check_queue(queue); !s.ok()) return s;
  CallerQueue q(queue);
  return heed::run(plan_of(*plan), p, workspace_of(workspace), q.queue);
}

template <class Problem, class CProblem>
Status plan_and_run(const CProblem* problem, heed_workspace workspace, const heed_queue* queue,
                    const heed_options* options,
                    Status (*call)(const Problem&, heed::Workspace, heed::Queue,
                                   const heed::Options&)) {
  Problem p;
  heed::Options o;
  if (Status s = read(problem, p); !s.ok()) return s;
  if (Status s = read(options, o); !s.ok()) return s;
  if (Status s = check_queue(queue); !s.ok()) return s;
  CallerQueue q(queue);
  return call(p, workspace_of(workspace), q.queue, o);
}

template <class Problem, class CProblem>
std::string explain(const CProblem* problem, const heed_device* device,
                    const heed_options* options) {
  Problem p;
  heed::Device d;
  heed::Options o;
  if (Status s = read(problem, p); !s.ok()) return s.message();
  if (Status s = read(device, d); !s.ok()) return s.message();
  if (Status s = read(options, o); !s.ok()) return s.message();
  return heed::explain(p, d, o);
}

heed_tensor to_c(const heed::TensorView& view) {
  heed_tensor c{view.data, static_cast<std::int32_t>(view.dtype), view.rank, {}, {}};
  std::ranges::copy(view.shape, c.shape);
  std::ranges::copy(view.stride, c.stride);
  return c;
}

Status write(const heed::Result<heed::Device>& from, heed_device* device) {
  if (device == nullptr) return heed::invalid("device = null must point to a struct");
  if (!from.ok()) return from.status();
  *device = {static_cast<std::int32_t>(from->arch), from->units, from->smem_bytes};
  return {};
}

heed_band to_c(const heed::Band& band) { return {band.left, band.right, band.chunk}; }

heed::DType dtype_of(heed_dtype dtype) { return static_cast<heed::DType>(dtype); }

}  // namespace

extern "C" {

const char* heed_version(void) { return HEED_VERSION; }

heed_tensor heed_dense(const void* data, heed_dtype dtype, int64_t batch, int64_t seqlen,
                       int64_t heads, int64_t head_dim) {
  return to_c(
      heed::contiguous(const_cast<void*>(data), dtype_of(dtype), {batch, seqlen, heads, head_dim}));
}

heed_tensor heed_packed(const void* data, heed_dtype dtype, int64_t total, int64_t heads,
                        int64_t head_dim) {
  return to_c(heed::contiguous(const_cast<void*>(data), dtype_of(dtype),
                               std::array<std::int64_t, 3>{total, heads, head_dim}));
}

heed_band heed_full(void) { return to_c(heed::kFull); }
heed_band heed_causal(void) { return to_c(heed::kCausal); }
heed_band heed_sliding_window(int32_t keys_back) { return to_c(heed::sliding_window(keys_back)); }
heed_band heed_chunked(int32_t chunk) { return to_c(heed::chunked(chunk)); }

heed_status heed_device_cpu(heed_device* device) {
  return guarded([&] { return write(heed::Device::cpu(), device); });
}
heed_status heed_device_cuda(int32_t ordinal, heed_device* device) {
  return guarded([&] { return write(heed::Device::cuda(ordinal), device); });
}

heed_status heed_plan_forward(const heed_forward_problem* problem, const heed_device* device,
                              const heed_options* options, heed_plan* out) {
  return guarded([&] { return plan<heed::ForwardProblem>(problem, device, options, out); });
}
heed_status heed_plan_backward(const heed_backward_problem* problem, const heed_device* device,
                               const heed_options* options, heed_plan* out) {
  return guarded([&] { return plan<heed::BackwardProblem>(problem, device, options, out); });
}

heed_status heed_run_forward(const heed_plan* planned, const heed_forward_problem* problem,
                             heed_workspace workspace, const heed_queue* queue) {
  return guarded([&] { return run<heed::ForwardProblem>(planned, problem, workspace, queue); });
}
heed_status heed_run_backward(const heed_plan* planned, const heed_backward_problem* problem,
                              heed_workspace workspace, const heed_queue* queue) {
  return guarded([&] { return run<heed::BackwardProblem>(planned, problem, workspace, queue); });
}

heed_status heed_forward(const heed_forward_problem* problem, heed_workspace workspace,
                         const heed_queue* queue, const heed_options* options) {
  return guarded([&] {
    return plan_and_run<heed::ForwardProblem>(problem, workspace, queue, options, heed::forward);
  });
}
heed_status heed_backward(const heed_backward_problem* problem, heed_workspace workspace,
                          const heed_queue* queue, const heed_options* options) {
  return guarded([&] {
    return plan_and_run<heed::BackwardProblem>(problem, workspace, queue, options, heed::backward);
  });
}

size_t heed_describe_plan(const heed_plan* planned, char* text, size_t bytes) {
  return guarded_text(text, bytes, [&] {
    return planned == nullptr || planned->row == nullptr ? std::string("no plan")
                                                         : describe(plan_of(*planned));
  });
}
size_t heed_explain_forward(const heed_forward_problem* problem, const heed_device* device,
                            const heed_options* options, char* text, size_t bytes) {
  return guarded_text(text, bytes,
                      [&] { return explain<heed::ForwardProblem>(problem, device, options); });
}
size_t heed_explain_backward(const heed_backward_problem* problem, const heed_device* device,
                             const heed_options* options, char* text, size_t bytes) {
  return guarded_text(text, bytes,
                      [&] { return explain<heed::BackwardProblem>(problem, device, options); });
}

}  // extern "C"
