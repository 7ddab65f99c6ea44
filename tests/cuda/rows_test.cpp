// Every GPU kernel on the curated, decode and random shapes against the fp64 oracle: rows_test PASS
// SEEDS [NAME] [SEED], PASS = forward, backward, decode, or lies: index arrays that contradict the
// tensors, nothing but guards checked.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>

#include "device_problem.hpp"
#include "support/gate.hpp"
#include "support/shapes.hpp"

namespace heed {
#define HEED_KERNELS(rows) std::span<const KernelRow> rows();
#include "cuda_kernel_list.inc"
#undef HEED_KERNELS
}  // namespace heed

namespace heed::test {
namespace {

std::vector<const KernelRow*> rows() {
  std::vector<const KernelRow*> all;
#define HEED_KERNELS(group) \
  for (const KernelRow& row : heed::group()) all.push_back(&row);
#include "cuda_kernel_list.inc"
#undef HEED_KERNELS
  return all;
}

std::string name(const KernelRow& row) {
  const char* pass = row.pass == Pass::forward  ? "forward"
                     : row.pass == Pass::decode ? "decode"
                                                : "backward";
  return std::string("sm80/") + pass + "/" + std::to_string(row.max_head_dim) + "/" +
         std::to_string(row.tile_m) + "x" + std::to_string(row.tile_n) + "/" + name_of(row.score) +
         "/" + heed::name_of(row.dtype);
}

struct Tally {
  int problems = 0;
  double worst = 0, worst_row = 0, rms = 0, bias = 0;
};
std::map<std::string, std::map<std::string, Tally>> tallies;
std::vector<std::string> failures;
std::atomic<int> runs{0};
std::mutex mutex;

void record(const KernelRow& row, const std::string& tensor, const Verdict& v,
            const std::string& where) {
  const std::lock_guard lock(mutex);
  if (!v.failure.empty()) failures.push_back(name(row) + " on " + where + "\n      " + v.failure);
  if (v.rows == 0) return;
  Tally& t = tallies[name(row)][tensor];
  ++t.problems;
  t.worst = std::max(t.worst, v.worst);
  t.worst_row = std::max(t.worst_row, v.worst_row);
  if (v.rows >= 32) t.rms = std::max(t.rms, v.rms), t.bias = std::max(t.bias, v.bias);
}

bool serves(const KernelRow& row, const Shape& s, DType dtype) {
  if (row.dtype != dtype || std::max(s.head_dim, s.dim_v()) > row.max_head_dim) return false;
  if (row.pass == Pass::backward && (s.paged() || !s.lse)) return false;
  if (row.max_query_rows > 0 && s.heads_k > 0) {
    int longest = 0;
    for (const int n : s.seqlens_q) longest = std::max(longest, n);
    if (s.heads_q / s.heads_k * longest > row.max_query_rows) return false;
  }
  const ScoreKind needs = s.bias != BiasKind::none || s.dropout > 0 ? ScoreKind::general
                          : s.softcap > 0                           ? ScoreKind::softcap
                                                                    : ScoreKind::plain;
  return row.score == needs || row.score == ScoreKind::general;
}

const KernelRow* forward_partner(const KernelRow& row) {
  for (const KernelRow* other : rows())
    if (other->pass == Pass::forward && other->dtype == row.dtype && other->score == row.score &&
        other->max_head_dim == row.max_head_dim)
      return other;
  return nullptr;
}

// What every thread is at, for the watchdog.
struct Progress {
  std::mutex mutex;
  std::string text;
  void set(const std::string& now) {
    const std::lock_guard lock(mutex);
    text = now;
  }
};
std::vector<std::unique_ptr<Progress>> progress;
std::atomic<bool> finished{false};

void watch() {
  for (int seconds = 1; !finished; ++seconds) {
    std::this_thread::sleep_for(std::chrono::seconds(1));
    if (seconds % 20 != 0) continue;
    std::printf("after %d s, %d runs:\n", seconds, runs.load());
    for (const auto& p : progress) {
      const std::lock_guard lock(p->mutex);
      if (!p->text.empty()) std::printf("  %s\n", p->text.c_str());
    }
    std::fflush(stdout);
  }
}

struct Worker {
  Progress* at = nullptr;
  Arena arena{std::size_t{512} << 20};
  cudaStream_t stream = nullptr;
  Worker() { must(cudaStreamCreate(&stream), "stream"); }

  Verdict launch(const KernelRow& row, Problem& problem, DeviceProblem& device, bool aligned,
                 int splits, const std::string& where) {
    Plan plan{.row = &row, .workers = 132, .splits = splits};
    plan.deterministic = !aligned;
    Status status;
    if (row.pass == Pass::backward) {
      const KernelRow* partner = forward_partner(row);
      Plan first{.row = partner, .workers = 132};
      first.workspace_bytes = partner->forward_bytes(first, device.backward.forward);
      status = partner->forward(first, device.backward.forward,
                                device.workspace(first.workspace_bytes), stream);
      plan.workspace_bytes = row.backward_bytes(plan, device.backward);
      if (status.ok())
        status =
            row.backward(plan, device.backward, device.workspace(plan.workspace_bytes), stream);
    } else {
      plan.workspace_bytes = row.forward_bytes(plan, device.backward.forward);
      status = row.forward(plan, device.backward.forward, device.workspace(plan.workspace_bytes),
                           stream);
    }
    ++runs;
    Verdict bad;
    if (!status.ok()) bad.failure = status.message();
    must(cudaStreamSynchronize(stream), where.c_str());
    if (const std::string damage = device.fetch(); !damage.empty()) bad.failure = damage;
    if (const std::string damage = problem.damage(); !damage.empty()) bad.failure = damage;
    return bad;
  }

  void damage(const KernelRow& row, Problem& problem, bool aligned, const std::string& where) {
    at->set(name(row) + " on " + where);
    arena.reset();
    problem.reset_outputs();
    DeviceProblem device(problem, arena, aligned, stream);
    const Verdict bad =
        launch(row, problem, device, aligned, row.pass == Pass::decode ? 3 : 1, where);
    if (!bad.failure.empty()) record(row, "", bad, where);
  }

  void run(const KernelRow& row, Problem& problem, bool aligned, int splits,
           const ForwardOracle& fo, const BackwardOracle* bo, const std::string& where) {
    at->set(name(row) + " on " + where);
    arena.reset();
    problem.reset_outputs();
    DeviceProblem device(problem, arena, aligned, stream);
    Verdict bad = launch(row, problem, device, aligned, splits, where);
    if (!bad.failure.empty()) return record(row, "", bad, where);
    const Shape& shape = problem.shape;
    const Statistics gaussian{.gaussian = shape.inputs == Inputs::gaussian};
    Statistics keys = gaussian;
    keys.independent =
        shape.seqlens_k.size() *
        static_cast<std::size_t>(shape.heads_k * std::min(shape.head_dim, shape.dim_v()));
    const ForwardProblem& f = problem.forward;
    const BackwardProblem& b = problem.backward;
    if (row.pass != Pass::backward) {
      record(row, "out", compare("out", f.out, fo.out, values(f.out), gaussian), where);
      record(row, "lse", compare_lse(f, fo), where);
      return;
    }
    record(row, "dq", compare("dq", b.dq, bo->dq, values(b.dq), gaussian), where);
    record(row, "dk", compare("dk", b.dk, bo->dk, values(b.dk), keys), where);
    record(row, "dv", compare("dv", b.dv, bo->dv, values(b.dv), keys), where);
    if (b.dbias && b.dbias.numel() > 0)
      record(row, "dbias", compare("dbias", b.dbias, bo->dbias, values(b.dbias), gaussian), where);
    record(row, "dsink", compare_dsink(b, *bo), where);
  }
};

std::vector<Shape> larger_shapes() {
  std::vector<Shape> all;
  const auto add = [&](const char* name, std::vector<int> q, std::vector<int> k, int dim,
                       auto change) {
    Shape s;
    s.name = name;
    s.seqlens_q = std::move(q);
    s.seqlens_k = std::move(k);
    s.head_dim = dim;
    change(s);
    all.push_back(std::move(s));
  };
  for (const int dim : {64, 96, 128, 192, 256}) {
    add("large_causal", {520}, {520}, dim, [](Shape& s) { s.band = kCausal; });
    add("large_full_gqa", {300}, {450}, dim, [](Shape& s) { s.heads_q = 2; });
    add("large_window", {400}, {700}, dim, [](Shape& s) { s.band = {.left = 150, .right = 20}; });
    add("large_chunked", {400}, {400}, dim, [](Shape& s) {
      s.band = chunked(150);
      s.dlse = true;
    });
    add("large_intervals", {400}, {500}, dim, [](Shape& s) { s.intervals = true; });
    add("large_bits", {300}, {500}, dim, [](Shape& s) {
      s.key_bits = true;
      s.band = kCausal;
    });
    add("large_packed", {260, 0, 130}, {300, 7, 129}, dim, [](Shape& s) {
      s.layout_q = s.layout_k = Layout::packed;
      s.heads_q = 4;
      s.heads_k = 2;
      s.dlse = true;
    });
    add("large_padded", {260, 130}, {300, 129}, dim, [](Shape& s) {
      s.layout_q = s.layout_k = Layout::padded;
      s.sinks = Sinks::zero;
      s.band = kCausal;
    });
    add("large_paged", {200, 60}, {400, 333}, dim, [](Shape& s) {
      s.layout_k = Layout::paged;
      s.page_size = 48;
    });
    add("large_softcap", {260}, {390}, dim, [](Shape& s) { s.softcap = 20.f; });
    add("large_bias", {260}, {390}, dim, [](Shape& s) { s.bias = BiasKind::tensor; });
    add("large_dropout", {260}, {390}, dim, [](Shape& s) {
      s.dropout = 0.2f;
      s.band = kCausal;
    });
  }
  return all;
}

// Every index array says something else than the truth; kernels must stay within their buffers.
void lie(Problem& problem, std::uint64_t seed) {
  Random random(seed ^ 0x11E5);
  const auto any = [&] {
    return random.pick(random.between(-5, 300), random.between(-5, 40), -1, 0, 1 << 30, -(1 << 30),
                       std::numeric_limits<int>::max(), std::numeric_limits<int>::min());
  };
  const auto scramble = [&](const std::int32_t* values, std::int64_t count) {
    if (values == nullptr) return;
    for (std::int64_t i = 0; i < count; ++i)
      if (random.chance(0.7)) const_cast<std::int32_t*>(values)[i] = any();
  };
  ForwardProblem& f = problem.forward;
  const std::int64_t entries = batch_entries(f);
  for (const std::int32_t* cu : {f.sequences.cu_seqlens_q, f.sequences.cu_seqlens_k})
    scramble(cu, entries + 1);
  for (const std::int32_t* a :
       {f.sequences.start_q, f.sequences.start_k, f.sequences.seqused_q, f.sequences.seqused_k})
    scramble(a, entries);
  scramble(f.paged.page_table, entries * f.paged.max_pages);
  scramble(f.intervals.rows, 2 * f.q.seqlen() * f.q.batch());
}

void check_lies(Worker& worker, const Shape& shape, std::uint64_t seed) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    Problem problem(shape, dtype, seed, Poison::huge);
    lie(problem, seed);
    for (const KernelRow* row : rows()) {
      if (!serves(*row, shape, dtype)) continue;
      worker.damage(*row, problem, seed % 2 == 0,
                    describe(shape) + " with lies, seed " + std::to_string(seed));
    }
  }
}

void check(Worker& worker, const Shape& shape, std::uint64_t seed, const std::set<Pass>& passes) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    std::unique_ptr<Problem> problems[2];
    std::unique_ptr<ForwardOracle> fo;
    std::unique_ptr<BackwardOracle> bo;
    for (const KernelRow* row : rows()) {
      if (!passes.contains(row->pass) || !serves(*row, shape, dtype)) continue;
      if (fo == nullptr) {
        problems[0] = std::make_unique<Problem>(shape, dtype, seed, Poison::nan);
        problems[1] = std::make_unique<Problem>(shape, dtype, seed,
                                                seed % 2 == 0 ? Poison::infinity : Poison::huge);
        worker.at->set("oracle of " + describe(shape));
        const Rounding rounding = rounding_of(*row);
        fo = std::make_unique<ForwardOracle>(oracle(problems[0]->forward, rounding));
        if (passes.contains(Pass::backward) && !shape.paged())
          bo = std::make_unique<BackwardOracle>(oracle(problems[0]->backward, rounding));
      }
      for (const bool aligned : {false, true}) {
        const int splits = row->pass == Pass::decode ? (aligned ? 3 : 1) : 1;
        worker.run(
            *row, *problems[aligned ? 1 : 0], aligned, splits, *fo, bo.get(),
            describe(shape) + (aligned ? " aligned" : " as is") + ", seed " + std::to_string(seed));
      }
    }
  }
}

}  // namespace
}  // namespace heed::test

int main(int argc, char** argv) {
  using namespace heed;
  using namespace heed::test;
  const std::string pass = argc > 1 ? argv[1] : "forward";
  const int seeds = argc > 2 ? std::atoi(argv[2]) : 100;
  const std::string only = argc > 3 ? argv[3] : "";
  const std::uint64_t offset = argc > 4 ? static_cast<std::uint64_t>(std::atoi(argv[4])) : 0;
  std::set<Pass> passes;
  if (pass == "forward") passes = {Pass::forward};
  if (pass == "decode") passes = {Pass::decode};
  if (pass == "backward") passes = {Pass::backward};
  std::vector<std::pair<Shape, std::uint64_t>> work;
  for (const Shape& s : larger_shapes()) work.emplace_back(s, 1 + offset);
  for (const Shape& s : curated_shapes()) work.emplace_back(s, 2 + offset);
  for (const Shape& s : decode_shapes()) work.emplace_back(s, 3 + offset);
  for (int i = 0; i < seeds; ++i)
    work.emplace_back(random_shape(1000 + offset + static_cast<unsigned>(i)), i);
  if (!only.empty())
    std::erase_if(work,
                  [&](const auto& w) { return w.first.name.find(only) == std::string::npos; });
  std::stable_sort(work.begin(), work.end(), [](const auto& a, const auto& b) {
    return pairs_of(a.first) * a.first.head_dim > pairs_of(b.first) * b.first.head_dim;
  });
  std::atomic<std::size_t> next{0};
  std::vector<std::thread> threads;
  const unsigned count =
      std::getenv("HEED_TEST_MALLOC") != nullptr ? 1 : std::thread::hardware_concurrency();
  for (unsigned t = 0; t < count; ++t) progress.push_back(std::make_unique<Progress>());
  std::thread watchdog(watch);
  for (unsigned t = 0; t < count; ++t)
    threads.emplace_back([&, t] {
      Worker worker;
      worker.at = progress[t].get();
      for (std::size_t i = next++; i < work.size(); i = next++) {
        if (passes.empty())
          check_lies(worker, work[i].first, work[i].second);
        else
          check(worker, work[i].first, work[i].second, passes);
      }
      worker.at->set("");
    });
  for (std::thread& t : threads) t.join();
  finished = true;
  watchdog.join();

  std::map<std::string, int> shown;
  std::size_t printed = 0;
  for (const std::string& f : failures)
    if (++shown[f.substr(0, f.find(" on "))] <= 3 && ++printed <= 40)
      std::printf("FAIL %s\n", f.c_str());
  std::printf("%-44s %-6s %5s %7s %7s %7s %7s\n", "kernel", "tensor", "runs", "worst", "row", "rms",
              "bias");
  for (const auto& [kernel, tensors] : tallies)
    for (const auto& [tensor, t] : tensors)
      std::printf("%-44s %-6s %5d %7.2f %7.2f %7.2f %7.2f\n", kernel.c_str(), tensor.c_str(),
                  t.problems, t.worst, t.worst_row, t.rms, t.bias);
  std::printf("%s: %zu shapes, %d kernel runs, %zu failures\n", pass.c_str(), work.size(),
              runs.load(), failures.size());
  return failures.empty() ? 0 : 1;
}
