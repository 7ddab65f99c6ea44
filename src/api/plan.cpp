// From a problem to a decision: the first kernel of the table that fits, and its scratch memory.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "api/message.hpp"
#include "api/validate.hpp"
#include "core/layout.hpp"
#include "core/schedule.hpp"
#include "core/sequence.hpp"
#include "registry.hpp"

namespace heed {
namespace {

const char* forced_kernel(const Options& options) {
  return options.force != nullptr ? options.force : std::getenv("HEED_FORCE_KERNEL");
}

ScoreKind score_kind(const ForwardProblem& p) {
  if (p.bias || p.dropout.probability > 0) return ScoreKind::general;
  return p.score.softcap > 0 ? ScoreKind::softcap : ScoreKind::plain;
}

Request request_of(Pass pass, const ForwardProblem& p, const Device& device,
                   const Options& options) {
  const std::int64_t group = p.k.heads() == 0 ? 1 : p.q.heads() / p.k.heads();
  return {.pass = pass,
          .dtype = p.q.dtype,
          .arch = device.arch,
          .head_dim = p.q.head_dim(),
          .query_rows = group * max_seqlen_q(p),
          .force = forced_kernel(options),
          .head_dim_v = p.v.head_dim(),
          .score = score_kind(p),
          .smem_bytes = device.smem_bytes > 0 ? device.smem_bytes : most_smem_bytes(device.arch),
          .bulk = is_bulk(p),
          .negative_scale = p.score.scale.value_or(1.f) < 0.f,
          .page_size = p.paged.page_table == nullptr ? 0 : static_cast<int>(p.k.shape[1]),
          .seqlen_k = max_seqlen_k(p)};
}

Status no_kernel(const Request& request) {
  if (request.force != nullptr)
    return {Code::unsupported, std::string("the forced kernel ") + request.force +
                                   " does not serve this problem (" + name_of(request.pass) + ", " +
                                   name_of(request.dtype) +
                                   "); `heed list` prints the kernels' names"};
  // The nearest miss says what to change.
  std::string dtypes;
  std::int64_t head_dim = 0;
  for (const KernelRow& row : registry()) {
    if (row.pass != request.pass || !serves(row.arch, request.arch)) continue;
    if (dtypes.find(name_of(row.dtype)) == std::string::npos)
      dtypes += std::string(dtypes.empty() ? "" : ", ") + name_of(row.dtype);
    if (row.dtype == request.dtype) head_dim = std::max<std::int64_t>(head_dim, row.max_head_dim);
  }
  if (dtypes.empty())
    return {Code::unsupported, std::string("no kernel of this build serves ") +
                                   name_of(request.pass) + " on " + name_of(request.arch)};
  if (head_dim == 0)
    return {Code::unsupported, std::string("q.dtype = ") + name_of(request.dtype) +
                                   " must be one of " + dtypes + " for " + name_of(request.pass) +
                                   " on " + name_of(request.arch)};
  return {Code::unsupported, "q.head_dim or v.head_dim = " +
                                 std::to_string(std::max(request.head_dim, request.head_dim_v)) +
                                 " must be at most " + std::to_string(head_dim) + " for " +
                                 name_of(request.pass) + " on " + name_of(request.arch)};
}

// Few query rows leave few tasks, so the keys are split: a thread has at least two tasks on up to
// 32 threads, parts of long texts do not keep the others waiting at the end, and none is so short
// that starting and merging it takes long. A result does not depend on how many threads there are.
int cpu_splits(const ForwardProblem& p, int wanted) {
  constexpr std::int64_t kTasks = 64, kLongTasks = 32;
  constexpr std::int64_t kLeastKeys = 512, kLongKeys = 2048;
  const std::int64_t keys = max_seqlen_k(p), entries = std::max<std::int64_t>(batch_entries(p), 1);
  const std::int64_t heads = std::max<std::int64_t>(entries * p.k.heads(), 1);
  const std::int64_t most = clamp64(keys / kLeastKeys, 1, kMostSplits);
  const std::int64_t few = (kTasks + heads - 1) / heads;
  const std::int64_t long_ones = std::min((kLongTasks + entries - 1) / entries, keys / kLongKeys);
  return static_cast<int>(clamp64(wanted > 0 ? wanted : std::max(few, long_ones), 1, most));
}

int splits_of(const KernelRow& row, const ForwardProblem& p, const Device& device,
              const Options& options) {
  if (row.pass == Pass::backward || (row.pass == Pass::forward && !row.bulk)) return 1;
  if (device.is_cpu()) return cpu_splits(p, options.splits);
  // Decode packs the query heads of a key head into its tiles; a forward has tiles of each.
  const std::int64_t heads = row.pass == Pass::decode ? p.k.heads() : p.q.heads();
  const std::int64_t group = heads == 0 ? 1 : p.q.heads() / heads;
  const std::int64_t tiles = (max_seqlen_q(p) * group + row.tile_m - 1) / row.tile_m;
  return gpu_splits({.tasks = batch_entries(p) * heads * tiles,
                     .slots = std::int64_t{device.units} * row.ctas,
                     .keys = max_seqlen_k(p),
                     .tile_n = row.tile_n},
                    options.splits);
}

constexpr int kMostUnits = 1 << 16;

Status check_device(const Device& device) {
  if (device.units >= 1 && device.units <= kMostUnits) return {};
  return invalid("device.units = ", device.units, " must be in [1, ", kMostUnits,
                 "]: threads of a CPU, multiprocessors of a GPU");
}

const ForwardProblem& forward_of(const ForwardProblem& problem) { return problem; }
const ForwardProblem& forward_of(const BackwardProblem& problem) { return problem.forward; }
std::size_t bytes_of(const Plan& plan, const ForwardProblem& problem) {
  return plan.row->forward_bytes(plan, problem);
}
std::size_t bytes_of(const Plan& plan, const BackwardProblem& problem) {
  return plan.row->backward_bytes(plan, problem);
}

template <class Problem>
Result<Plan> plan_any(const Problem& problem, const Device& device, const Options& options) {
  if (Status s = validate(problem); !s.ok()) return s;
  if (Status s = check_device(device); !s.ok()) return s;
  if (options.splits < 0)
    return Status(Code::invalid, "options.splits = " + std::to_string(options.splits) +
                                     " must be at least 0 (0: chosen from the shape)");
  const Request request = request_of(problem, device, options);
  const KernelRow* row = find_row(registry_of(device.arch), request);
  if (row == nullptr) return no_kernel(request);
  Plan plan{.row = row,
            .workers = device.units,
            .splits = splits_of(*row, forward_of(problem), device, options)};
  plan.deterministic = device.is_cpu() || request.pass == Pass::forward || options.deterministic;
  plan.workspace_bytes = bytes_of(plan, problem);
  return plan;
}

template <class Problem>
std::string explain_any(const Problem& problem, const Device& device, const Options& options) {
  const Result<Plan> chosen = plan_any(problem, device, options);
  if (!chosen.ok()) return chosen.status().message() + "\n";
  std::string text = describe(*chosen) + "\n";
  const Request request = request_of(problem, device, options);
  for (const KernelRow& row : registry_of(device.arch)) {
    if (&row == chosen->row) break;
    const Mismatch why = mismatch(row, request);
    if (why == Mismatch::pass || why == Mismatch::dtype) continue;
    text += "  not " + name_of(row) + ": " + describe(why, row, request) + "\n";
  }
  return text;
}

}  // namespace

Request request_of(const ForwardProblem& problem, const Device& device, const Options& options) {
  return request_of(Pass::forward, problem, device, options);
}

Request request_of(const BackwardProblem& problem, const Device& device, const Options& options) {
  Request request = request_of(Pass::backward, problem.forward, device, options);
  request.bulk = is_bulk(problem);
  return request;
}

std::string describe(const Plan& plan) {
  const char* unit = plan.row->arch < Arch::sm80 ? " workers, " : " multiprocessors, ";
  return name_of(*plan.row) + ": tile " + std::to_string(plan.row->tile_m) + " x " +
         std::to_string(plan.row->tile_n) + ", " + std::to_string(plan.workers) + unit +
         std::to_string(plan.splits) + " splits, workspace " +
         std::to_string(plan.workspace_bytes) + " bytes";
}

Result<Plan> plan(const ForwardProblem& problem, const Device& device, const Options& options) {
  return plan_any(problem, device, options);
}

Result<Plan> plan(const BackwardProblem& problem, const Device& device, const Options& options) {
  return plan_any(problem, device, options);
}

std::string explain(const ForwardProblem& problem, const Device& device, const Options& options) {
  return explain_any(problem, device, options);
}

std::string explain(const BackwardProblem& problem, const Device& device, const Options& options) {
  return explain_any(problem, device, options);
}

}  // namespace heed
