#include "support/run.hpp"

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <sstream>
#include <thread>
#include <type_traits>

#include "cpu/device.hpp"
#include "support/gate.hpp"
#include "support/gpu.hpp"

namespace heed::test {
namespace {

bool is_gpu(const KernelRow& row) { return row.arch >= Arch::sm80; }

// With everything that the CPU offers, also where plans leave the widest set out, or what
// HEED_FORCE_ISA says.
Device machine(int units) {
  if (std::getenv("HEED_FORCE_ISA") == nullptr) return {.arch = cpu::best_arch(), .units = units};
  const Result<Device> device = Device::cpu();
  return {.arch = device.ok() ? device->arch : Arch::scalar, .units = units};
}

// The device that runs the row; without a GPU an invented one, so that planning can be tested.
Device machine_of(const KernelRow& row, const RunOptions& options) {
  if (!is_gpu(row)) return machine(options.workers);
  const Result<Device> gpu = Device::cuda();
  Device device = gpu.ok() ? *gpu : Device{.arch = row.arch, .units = 132};
  if (options.multiprocessors > 0) device.units = options.multiprocessors;
  return device;
}

// Poisons the workspace, runs, and looks at every guard.
template <class AnyProblem>
Status run_planned(const Plan& plan, const AnyProblem& problem, Problem& owner,
                   const RunOptions& options) {
  const std::size_t bytes = plan.workspace_bytes;
  const std::size_t aligned =
      (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  if (aligned != bytes)
    return {Code::device, "workspace_bytes = " + std::to_string(bytes) + " is no multiple of " +
                              std::to_string(kWorkspaceAlignment)};
  if (is_gpu(*plan.row)) return run_on_gpu(plan, owner);
  Buffer workspace(bytes, true, kWorkspaceAlignment);
  workspace.fill(DType::f32, owner.poison);
  ThreadExecutor executor(options.workers);
  if (Status s = run(plan, problem, {workspace.data(), bytes}, executor); !s.ok()) return s;
  if (!workspace.intact()) return {Code::device, "wrote outside the workspace"};
  if (const std::string damage = owner.damage(); !damage.empty()) return {Code::device, damage};
  return {};
}

ForwardProblem& forward_of(ForwardProblem& problem) { return problem; }
ForwardProblem& forward_of(BackwardProblem& problem) { return problem.forward; }

// The problem as the row gets it, for planning: in device memory tensors may be laid out anew.
template <class AnyProblem>
Result<Plan> plan_row(const KernelRow& row, AnyProblem problem, const RunOptions& options) {
  if (row.bulk) {
    const auto align = [](ConstTensorView& view) {
      view = aligned_strides(view);
      view.data = reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(view.data) &
                                                ~std::uintptr_t{15});
    };
    ForwardProblem& f = forward_of(problem);
    for (ConstTensorView* view : {&f.q, &f.k, &f.v}) align(*view);
    if constexpr (std::is_same_v<AnyProblem, BackwardProblem>) align(problem.dout);
  }
  const std::string name = name_of(row);
  Result<Plan> made = plan(
      problem, machine_of(row, options),
      {.splits = options.splits, .deterministic = options.deterministic, .force = name.c_str()});
  if (made.ok() && made->row != &row)
    return Status(Code::device,
                  "plan() chose " + name_of(*made->row) + " when " + name + " was forced");
  return made;
}

// A forward kernel of the same family, for out and lse.
const KernelRow* forward_partner(const KernelRow& row, const ForwardProblem& problem) {
  for (const KernelRow& other : registry())
    if (other.arch == row.arch && other.pass == Pass::forward && other.dtype == row.dtype &&
        plan_row(other, problem, {}).ok())
      return &other;
  return nullptr;
}

}  // namespace

void ThreadExecutor::run(int workers, void (*body)(void* context, int worker), void* context) {
  std::vector<std::thread> threads;
  for (int worker = 1; worker < workers; ++worker) threads.emplace_back(body, context, worker);
  body(context, 0);
  for (std::thread& thread : threads) thread.join();
}

Status run_forward(const KernelRow& row, Problem& problem, const RunOptions& options) {
  const Result<Plan> made = plan_row(row, problem.forward, options);
  if (!made.ok()) return made.status();
  return run_planned(*made, problem.forward, problem, options);
}

Status run_backward(const KernelRow& row, Problem& problem, const RunOptions& options) {
  const Result<Plan> made = plan_row(row, problem.backward, options);
  if (!made.ok()) return made.status();
  const KernelRow* partner = forward_partner(row, problem.forward);
  if (partner == nullptr) return {Code::device, "no forward kernel goes with " + name_of(row)};
  if (Status s = run_forward(*partner, problem); !s.ok()) return s;
  return run_planned(*made, problem.backward, problem, options);
}

Status run_row(const KernelRow& row, Problem& problem, const RunOptions& options) {
  return row.pass == Pass::backward ? run_backward(row, problem, options)
                                    : run_forward(row, problem, options);
}

bool machine_runs(const KernelRow& row) {
  static std::set<Arch> told;
  if (is_gpu(row)) {
    const Result<Device> gpu = Device::cuda();
    if (gpu.ok() && heed::serves(row.arch, gpu->arch) && row.smem_bytes <= gpu->smem_bytes)
      return true;
    if (told.insert(row.arch).second)
      std::printf("[ NOT RUN  ] kernels of %s: %s\n", name_of(row.arch),
                  gpu.ok() ? "another GPU" : gpu.status().message().c_str());
    return false;
  }
  const Arch arch = machine(1).arch;
  if (heed::serves(row.arch, arch)) return true;
  if (told.insert(row.arch).second)
    std::printf("[ NOT RUN  ] kernels of %s: this machine offers %s\n", name_of(row.arch),
                name_of(arch));
  return false;
}

std::vector<const KernelRow*> runnable_rows() {
  const char* wanted = std::getenv("HEED_TEST_ROWS");
  std::vector<const KernelRow*> rows;
  for (const KernelRow& row : registry())
    if (name_of(row).starts_with(wanted == nullptr ? "" : wanted) && machine_runs(row))
      rows.push_back(&row);
  if (rows.empty()) {
    std::fprintf(stderr, "HEED_TEST_ROWS = %s: this machine runs no kernel whose name begins so\n",
                 wanted);
    std::exit(1);
  }
  return rows;
}

std::vector<const KernelRow*> runnable_rows(DType dtype) {
  std::vector<const KernelRow*> rows = runnable_rows();
  std::erase_if(rows, [&](const KernelRow* row) { return row->dtype != dtype; });
  return rows;
}

std::vector<const KernelRow*> distinct_rows(DType dtype) {
  std::vector<const KernelRow*> rows = runnable_rows(dtype);
  std::erase_if(rows, [](const KernelRow* row) {
    return is_gpu(*row) && row->max_head_dim != 64 && row->max_head_dim != 192;
  });
  return rows;
}

bool serves(const KernelRow& row, const Problem& problem) {
  if (row.dtype != problem.dtype) return false;
  const Status status = row.pass == Pass::backward
                            ? (problem.shape.lse ? plan_row(row, problem.backward, {}).status()
                                                 : Status(Code::unsupported, ""))
                            : plan_row(row, problem.forward, {}).status();
  return status.code() != Code::unsupported;
}

std::vector<double> outputs_of(const KernelRow& row, const Problem& problem) {
  std::vector<double> all;
  const auto append = [&](const TensorView& view) {
    const std::vector<double> part = values(view);
    all.insert(all.end(), part.begin(), part.end());
  };
  if (row.pass == Pass::backward) {
    const BackwardProblem& b = problem.backward;
    for (const TensorView* t : {&b.dq, &b.dk, &b.dv}) append(*t);
    if (b.dbias) append(b.dbias);
    if (b.dsink != nullptr)
      for (int h = 0; h < problem.shape.heads_q; ++h) all.push_back(double{b.dsink[h]});
    return all;
  }
  append(problem.forward.out);
  const ConstTensorView& q = problem.forward.q;
  if (problem.forward.lse != nullptr)
    for (std::int64_t i = 0; i < q.batch() * q.heads() * q.seqlen(); ++i)
      all.push_back(double{problem.forward.lse[i]});
  return all;
}

std::string difference(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size())
    return std::to_string(a.size()) + " against " + std::to_string(b.size()) + " elements";
  std::size_t count = 0, first = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (std::bit_cast<std::uint64_t>(a[i]) == std::bit_cast<std::uint64_t>(b[i])) continue;
    if (count++ == 0) first = i;
  }
  if (count == 0) return {};
  std::ostringstream text;
  text.precision(17);
  text << count << " of " << a.size() << " elements differ, first element " << first << ": "
       << a[first] << " against " << b[first];
  return text.str();
}

}  // namespace heed::test
