#include "support/gpu.hpp"

#include "registry.hpp"
#include "support/device_problem.hpp"

namespace heed::test {

Status run_on_gpu(const Plan& plan, Problem& problem) {
  static Arena arena(std::size_t{512} << 20);
  static const cudaStream_t stream = [] {
    cudaStream_t made = nullptr;
    must(cudaStreamCreate(&made), "stream");
    return made;
  }();
  arena.reset();
  DeviceProblem device(problem, arena, plan.row->bulk || problem.poison != Poison::nan);
  const Workspace workspace = device.workspace(plan.workspace_bytes);
  arena.send(stream);
  const Status status = plan.row->pass == Pass::backward
                            ? run(plan, device.backward, workspace, stream)
                            : run(plan, device.backward.forward, workspace, stream);
  if (!status.ok()) return status;
  arena.receive(stream);
  if (const std::string damage = device.fetch(); !damage.empty()) return {Code::device, damage};
  if (const std::string damage = problem.damage(); !damage.empty()) return {Code::device, damage};
  return {};
}

}  // namespace heed::test
