// heed list: the table of kernels, and which of them this machine runs.
#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "registry.hpp"
#include "verbs.hpp"

namespace heed::tool {
namespace {

// Empty when this machine runs the row.
std::string obstacle(const KernelRow& row) {
  static const Result<Device> cpu = Device::cpu(), gpu = Device::cuda(0);
  const bool on_gpu = row.arch >= Arch::sm80;
  if (on_gpu && !gpu.ok()) return "no GPU";
  const Device& device = on_gpu ? *gpu : value_or_fail(cpu);
  const std::string name = name_of(row);
  const Request any{.pass = row.pass,
                    .dtype = row.dtype,
                    .arch = device.arch,
                    .head_dim = 1,
                    .query_rows = 1,
                    .force = name.c_str(),
                    .score = row.score,
                    .smem_bytes = device.smem_bytes};
  const Mismatch why = mismatch(row, any);
  return why == Mismatch::none ? std::string() : describe(why, row, any);
}

nlohmann::json to_json(const KernelRow& row, const std::string& why_not) {
  return {{"name", name_of(row)},
          {"arch", name_of(row.arch)},
          {"pass", name_of(row.pass)},
          {"dtype", name_of(row.dtype)},
          {"operand", name_of(row.operand)},
          {"tile_m", row.tile_m},
          {"tile_n", row.tile_n},
          {"max_head_dim", row.max_head_dim},
          {"max_query_rows", row.max_query_rows},
          {"max_seqlen_k", row.max_seqlen_k},
          {"score", name_of(row.score)},
          {"smem_bytes", row.smem_bytes},
          {"runs_here", why_not.empty()},
          {"why_not", why_not}};
}

void list(bool as_json) {
  const Device cpu = value_or_fail(Device::cpu());
  const Result<Device> gpu = Device::cuda(0);
  nlohmann::json rows = nlohmann::json::array();
  if (!as_json) {
    fmt::print("this machine: {}, {} threads; ", name_of(cpu.arch), cpu.units);
    if (gpu.ok())
      fmt::print("{}, {} multiprocessors\n\n", name_of(gpu->arch), gpu->units);
    else
      fmt::print("{}\n\n", gpu.status().message());
    fmt::print("{:<50}{:>9}{:>11}{:>10}  {}\n", "kernel", "operand", "tile", "head_dim",
               "runs here");
  }
  for (const KernelRow& row : registry()) {
    const std::string why_not = obstacle(row);
    if (as_json)
      rows.push_back(to_json(row, why_not));
    else
      fmt::print("{:<50}{:>9}{:>11}{:>10}  {}\n", name_of(row), name_of(row.operand),
                 row.tile_m == 0 ? "-" : fmt::format("{} x {}", row.tile_m, row.tile_n),
                 fmt::format("1..{}", row.max_head_dim), why_not.empty() ? "yes" : why_not);
  }
  if (as_json)
    fmt::print("{}\n", nlohmann::json({{"device", name_of(cpu.arch)},
                                       {"threads", cpu.units},
                                       {"gpu", gpu.ok() ? name_of(gpu->arch) : ""},
                                       {"kernels", rows}})
                           .dump(2));
}

}  // namespace

void add_list(CLI::App& app) {
  CLI::App* verb = app.add_subcommand("list", "the kernels, best first");
  const auto as_json = std::make_shared<bool>(false);
  verb->add_flag("--json", *as_json, "machine-readable");
  verb->callback([as_json] { list(*as_json); });
}

}  // namespace heed::tool
