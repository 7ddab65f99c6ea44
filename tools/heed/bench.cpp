// heed bench: how fast one problem runs, beside what the machine can do at most.
#include <fmt/chrono.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "heed/heed.h"
#include "peaks.hpp"
#include "problem.hpp"
#include "verbs.hpp"

namespace heed::tool {
namespace {

struct Flags {
  ProblemFlags problem;
  double seconds = 1.0;
  bool peaks = false;
  bool json = false;
};

struct Timing {
  double median = 0;  // seconds
  double best = 0;
  std::size_t runs = 0;
  double plan = 0;  // seconds that making the plan takes
};

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown";
}

template <class Problem>
Timing time_runs(const Plan& plan, const Problem& problem, Workspace workspace, double seconds) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  const auto begin = Clock::now();
  for (bool warm = false;; warm = true) {
    const auto start = Clock::now();
    if (const Status s = run(plan, problem, workspace); !s.ok()) fail(s.message());
    const auto end = Clock::now();
    if (warm) times.push_back(std::chrono::duration<double>(end - start).count());
    if (times.size() >= 3 && std::chrono::duration<double>(end - begin).count() >= seconds) break;
  }
  std::ranges::sort(times);
  return {.median = times[times.size() / 2], .best = times.front(), .runs = times.size()};
}

// Median seconds of making a plan.
template <class Problem>
double time_plan(const Problem& problem, const Device& device, const Options& options) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times(101);
  for (double& time : times) {
    const auto start = Clock::now();
    value_or_fail(plan(problem, device, options));
    time = std::chrono::duration<double>(Clock::now() - start).count();
  }
  std::ranges::nth_element(times, times.begin() + 50);
  return times[50];
}

template <class Problem>
std::pair<Plan, Timing> measure(const Problem& problem, const Device& device, const Flags& flags,
                                Arena& arena) {
  const Plan made = value_or_fail(plan(problem, device, flags.problem.options()));
  const Workspace workspace{arena.take(static_cast<std::int64_t>(made.workspace_bytes)),
                            made.workspace_bytes};
  Timing timing = time_runs(made, problem, workspace, flags.seconds);
  timing.plan = time_plan(problem, device, flags.problem.options());
  return {made, timing};
}

nlohmann::json result_of(const Flags& flags, const Device& device, const Plan& made,
                         const Timing& timing, const Cost& cost) {
  nlohmann::json result{{"problem", flags.problem.text()},
                        {"plan", describe(made)},
                        {"machine", cpu_name()},
                        {"device", name_of(device.arch)},
                        {"threads", device.units},
                        {"version", heed_version()},
                        {"date", fmt::format("{:%Y-%m-%d}", fmt::gmtime(std::time(nullptr)))},
                        {"runs", timing.runs},
                        {"seconds_median", timing.median},
                        {"seconds_best", timing.best},
                        {"seconds_plan", timing.plan},
                        {"gflops", cost.flops / timing.median * 1e-9},
                        {"gbs", cost.bytes / timing.median * 1e-9}};
  if (!flags.peaks) return result;
  const Peaks peaks = measure_peaks(device.arch);
  result["peak_fma_gflops"] = peaks.fma_gflops;
  result["peak_bf16_gflops"] = peaks.bf16_gflops;
  result["peak_read_gbs"] = peaks.read_gbs;
  result["share_of_fma_peak"] = result["gflops"].get<double>() / peaks.fma_gflops;
  if (peaks.bf16_gflops > 0)
    result["share_of_bf16_peak"] = result["gflops"].get<double>() / peaks.bf16_gflops;
  result["share_of_read_peak"] = result["gbs"].get<double>() / peaks.read_gbs;
  return result;
}

void print(const nlohmann::json& r) {
  const auto number = [&](const char* key) { return r[key].get<double>(); };
  fmt::print("{}\n{}\n", r["problem"].get<std::string>(), r["plan"].get<std::string>());
  fmt::print("{}, {} threads\n", r["machine"].get<std::string>(), r["threads"].get<int>());
  fmt::print("median {:.3f} ms, best {:.3f} ms of {} runs: {:.1f} GFLOP/s, {:.2f} GB/s\n",
             number("seconds_median") * 1e3, number("seconds_best") * 1e3, r["runs"].get<int>(),
             number("gflops"), number("gbs"));
  if (!r.contains("peak_fma_gflops")) return;
  fmt::print("{:.0f} % of the fp32 FMA peak, {:.0f} GFLOP/s\n", number("share_of_fma_peak") * 100,
             number("peak_fma_gflops"));
  if (r.contains("share_of_bf16_peak"))
    fmt::print("{:.0f} % of the bf16 dot peak, {:.0f} GFLOP/s\n",
               number("share_of_bf16_peak") * 100, number("peak_bf16_gflops"));
  fmt::print("{:.0f} % of the memory read peak, {:.1f} GB/s\n", number("share_of_read_peak") * 100,
             number("peak_read_gbs"));
}

void bench(const Flags& flags) {
  const Device device = value_or_fail(Device::cpu());
  Arena arena(/*real=*/true);
  const Problem problem = make_problem(flags.problem, arena);
  const bool backward = flags.problem.pass == Direction::backward;
  if (backward) measure(problem.forward, device, {.problem = flags.problem, .seconds = 0}, arena);
  const auto [made, timing] = backward ? measure(problem.backward, device, flags, arena)
                                       : measure(problem.forward, device, flags, arena);
  const nlohmann::json result =
      result_of(flags, device, made, timing, cost_of(problem.forward, flags.problem.pass));
  if (flags.json)
    fmt::print("{}\n", result.dump(2));
  else
    print(result);
}

}  // namespace

void add_bench(CLI::App& app) {
  CLI::App* verb = app.add_subcommand("bench", "time a problem on this machine's CPU");
  const auto flags = std::make_shared<Flags>();
  flags->problem.add_to(*verb);
  verb->add_option("--seconds", flags->seconds, "measure for at least so long");
  verb->add_flag("--peaks", flags->peaks, "also measure what the machine can do at most");
  verb->add_flag("--json", flags->json, "machine-readable");
  verb->callback([flags] { bench(*flags); });
}

}  // namespace heed::tool
