// heed list: the table of kernels, and which of them this machine runs.
#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "registry.hpp"
#include "verbs.hpp"

namespace heed::tool {
namespace {

// Empty when this machine runs the row.
std::string obstacle(const KernelRow& row, const Device& device) {
  const Request any{.pass = row.pass,
                    .dtype = row.dtype,
                    .arch = device.arch,
                    .head_dim = 1,
                    .query_rows = 1,
                    .force = nullptr};
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
          {"runs_here", why_not.empty()},
          {"why_not", why_not}};
}

void list(bool as_json) {
  const Device device = value_or_fail(Device::cpu());
  nlohmann::json rows = nlohmann::json::array();
  if (!as_json)
    fmt::print("this machine: {}, {} threads\n\n{:<28}{:>9}{:>11}{:>10}  {}\n",
               name_of(device.arch), device.units, "kernel", "operand", "tile", "head_dim",
               "runs here");
  for (const KernelRow& row : registry()) {
    const std::string why_not = obstacle(row, device);
    if (as_json)
      rows.push_back(to_json(row, why_not));
    else
      fmt::print("{:<28}{:>9}{:>11}{:>10}  {}\n", name_of(row), name_of(row.operand),
                 row.tile_m == 0 ? "-" : fmt::format("{} x {}", row.tile_m, row.tile_n),
                 fmt::format("1..{}", row.max_head_dim), why_not.empty() ? "yes" : why_not);
  }
  if (as_json)
    fmt::print("{}\n",
               nlohmann::json(
                   {{"device", name_of(device.arch)}, {"threads", device.units}, {"kernels", rows}})
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
