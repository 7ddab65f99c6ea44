// heed explain: the plan of a problem, and why better kernels do not serve it. Runs nothing.
#include <fmt/format.h>

#include <memory>

#include "problem.hpp"
#include "verbs.hpp"

namespace heed::tool {
namespace {

struct Flags {
  ProblemFlags problem;
  std::string arch;  // empty: this machine's CPU
  int units = 0;
};

Device device_of(const Flags& flags) {
  Device device = flags.arch.empty() ? value_or_fail(Device::cpu()) : Device{};
  for (int i = 0; i <= static_cast<int>(Arch::sm120); ++i)
    if (flags.arch == name_of(static_cast<Arch>(i))) device.arch = static_cast<Arch>(i);
  if (flags.units > 0) device.units = flags.units;
  return device;
}

void explain_problem(const Flags& flags) {
  Arena arena(/*real=*/false);
  const Problem problem = make_problem(flags.problem, arena);
  const Device device = device_of(flags);
  const Options options = flags.problem.options();
  fmt::print("{}\non {}, {} units\n", flags.problem.text(), name_of(device.arch), device.units);
  const auto print = [&](const auto& p) {
    fmt::print("{}", explain(p, device, options));
    if (!plan(p, device, options).ok()) throw CLI::RuntimeError(1);
  };
  if (flags.problem.pass == Direction::forward)
    print(problem.forward);
  else
    print(problem.backward);
}

}  // namespace

void add_explain(CLI::App& app) {
  CLI::App* verb = app.add_subcommand("explain", "the plan of a problem, and why not a better one");
  const auto flags = std::make_shared<Flags>();
  flags->problem.add_to(*verb);
  std::vector<std::string> archs;
  for (int i = 0; i <= static_cast<int>(Arch::sm120); ++i)
    archs.emplace_back(name_of(static_cast<Arch>(i)));
  verb->add_option("--arch", flags->arch, "another device than this machine's CPU")
      ->check(CLI::IsMember(archs));
  verb->add_option("--units", flags->units, "its threads or multiprocessors");
  verb->callback([flags] { explain_problem(*flags); });
}

}  // namespace heed::tool
