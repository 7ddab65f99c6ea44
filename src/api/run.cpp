// Runs what was planned; no decision is taken here.
#include <cstdint>
#include <string>

#include "api/validate.hpp"
#include "cpu/arithmetic.hpp"
#include "cpu/device.hpp"
#include "registry.hpp"

namespace heed {
namespace {

bool is_gpu(const Plan& plan) { return plan.row->arch >= Arch::sm80; }

Status check_device(const Plan& plan, Queue queue) {
  if (is_gpu(plan) != queue.on_gpu)
    return {Code::invalid, std::string("queue is ") + (queue.on_gpu ? "a CUDA stream" : "the CPU") +
                               ", the plan is for " + name_of(plan.row->arch)};
  if (!queue.on_gpu) {
    if (serves(plan.row->arch, cpu::best_arch())) return {};
    return {Code::unsupported, std::string("plan is for ") + name_of(plan.row->arch) +
                                   ", this CPU offers up to " + name_of(cpu::best_arch())};
  }
  const Result<Device> gpu = Device::cuda();
  if (!gpu.ok()) return gpu.status();
  if (serves(plan.row->arch, gpu->arch)) return {};
  return {Code::unsupported, std::string("plan is for ") + name_of(plan.row->arch) +
                                 ", the current GPU is " + name_of(gpu->arch)};
}

Status check_plan(const Plan& plan, Workspace workspace, Queue queue) {
  if (plan.row == nullptr) return {Code::invalid, "plan.row is null: make the plan with plan()"};
  if (Status s = check_device(plan, queue); !s.ok()) return s;
  if (workspace.bytes < plan.workspace_bytes)
    return {Code::invalid, "workspace.bytes = " + std::to_string(workspace.bytes) +
                               " must be at least " + std::to_string(plan.workspace_bytes)};
  if (plan.workspace_bytes == 0) return {};
  if (workspace.data == nullptr ||
      reinterpret_cast<std::uintptr_t>(workspace.data) % kWorkspaceAlignment != 0)
    return {Code::invalid, "workspace.data must be a non-null multiple of " +
                               std::to_string(kWorkspaceAlignment) + " bytes"};
  return {};
}

template <class Problem>
Status plan_and_run(const Problem& problem, Workspace workspace, Queue queue,
                    const Options& options) {
  Result<Device> found = queue.on_gpu ? Device::cuda() : Device::cpu();
  if (!found.ok()) return found.status();
  Device device = *found;
  if (queue.executor != nullptr) device.units = queue.executor->concurrency();
  const Result<Plan> chosen = plan(problem, device, options);
  if (!chosen.ok()) return chosen.status();
  return run(*chosen, problem, workspace, queue);
}

}  // namespace

Status run(const Plan& plan, const ForwardProblem& problem, Workspace workspace, Queue queue) {
  if (Status s = check_plan(plan, workspace, queue); !s.ok()) return s;
  if (plan.row->forward == nullptr)
    return {Code::invalid, "plan is for a backward problem: " + describe(plan)};
  // Arrays on a GPU are not read here: its kernels clamp them.
  if (is_gpu(plan)) return plan.row->forward(plan, problem, workspace, queue);
  if (Status s = validate_contents(problem); !s.ok()) return s;
  const cpu::StandardArithmetic arithmetic;
  return plan.row->forward(plan, problem, workspace, queue);
}

Status run(const Plan& plan, const BackwardProblem& problem, Workspace workspace, Queue queue) {
  if (Status s = check_plan(plan, workspace, queue); !s.ok()) return s;
  if (plan.row->backward == nullptr)
    return {Code::invalid, "plan is for a forward problem: " + describe(plan)};
  // Arrays on a GPU are not read here: its kernels clamp them.
  if (is_gpu(plan)) return plan.row->backward(plan, problem, workspace, queue);
  if (Status s = validate_contents(problem); !s.ok()) return s;
  const cpu::StandardArithmetic arithmetic;
  return plan.row->backward(plan, problem, workspace, queue);
}

Status forward(const ForwardProblem& problem, Workspace workspace, Queue queue,
               const Options& options) {
  return plan_and_run(problem, workspace, queue, options);
}

Status backward(const BackwardProblem& problem, Workspace workspace, Queue queue,
                const Options& options) {
  return plan_and_run(problem, workspace, queue, options);
}

}  // namespace heed
