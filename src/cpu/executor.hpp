// Tasks on the workers of an Executor.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <tuple>

#include "cpu/arithmetic.hpp"
#include "heed/plan.hpp"

namespace heed::cpu {

// Tasks [0, tasks), and what each of them does: body(task, worker).
template <class Body>
struct Stage {
  std::int64_t tasks;
  Body body;
};
template <class Body>
Stage(std::int64_t, Body) -> Stage<Body>;

// Returns when `done` has reached `tasks`, which other workers are about to finish.
void wait_for(const std::atomic<std::int64_t>& done, std::int64_t tasks);

// Calls the body of every task once, from at most `workers` workers, in order of the stages and of
// the index as workers come free; a task starts after all tasks of the stages before. Workers stay
// awake from stage to stage. The caller computes in StandardArithmetic, and so do they.
template <class... Bodies>
void run_stages(Executor& executor, int workers, const Stage<Bodies>&... stages) {
  const std::int64_t tasks = (std::int64_t{0} + ... + stages.tasks);
  workers = static_cast<int>(std::min(std::int64_t{workers}, std::max({stages.tasks...})));
  if (tasks <= 0) return;
  if (workers <= 1) {
    const auto run = [](const auto& stage) {
      for (std::int64_t task = 0; task < stage.tasks; ++task) stage.body(task, 0);
    };
    (run(stages), ...);
    return;
  }
  struct Shared {
    std::tuple<const Stage<Bodies>&...> stages;
    std::int64_t tasks;
    alignas(64) std::atomic<std::int64_t> next{0};
    alignas(64) std::atomic<std::int64_t> done{0};
  } shared{{stages...}, tasks};
  executor.run(
      workers,
      [](void* context, int worker) {
        const StandardArithmetic arithmetic;
        auto& s = *static_cast<Shared*>(context);
        for (std::int64_t task;
             (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;) {
          std::int64_t first = 0;
          const auto run_if_its_own = [&](const auto& stage) {
            if (task - first >= stage.tasks) {
              first += stage.tasks;
              return false;
            }
            if (first > 0) wait_for(s.done, first);
            stage.body(task - first, worker);
            return true;
          };
          std::apply([&](const auto&... stage) { (run_if_its_own(stage) || ...); }, s.stages);
          s.done.fetch_add(1, std::memory_order_release);
        }
      },
      &shared);
}

template <class Body>
void parallel_for(Executor& executor, int workers, std::int64_t tasks, const Body& body) {
  run_stages(executor, workers, Stage<const Body&>{tasks, body});
}

inline Executor& executor_of(const Queue& queue) {
  return queue.executor != nullptr ? *queue.executor : Executor::pool();
}

}  // namespace heed::cpu
