// Tasks on the workers of an Executor.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

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

// How far a run is: tasks [0, next) are taken, `done` of them computed.
struct Progress {
  alignas(64) std::atomic<std::int64_t> next{0};
  alignas(64) std::atomic<std::int64_t> done{0};
};

// Returns when `done` has reached `tasks`, which other workers are about to finish.
void wait_for(const std::atomic<std::int64_t>& done, std::int64_t tasks);

// The task that a worker computes, and the one after it.
class Claim {
 public:
  explicit Claim(Progress& progress) : progress_(progress), task_(take()) {}
  std::int64_t task() const { return task_; }
  // Nobody else takes it once it is asked for.
  std::int64_t next() {
    if (next_ < 0) next_ = take();
    return next_;
  }
  void finish() {
    progress_.done.fetch_add(1, std::memory_order_release);
    task_ = next();
    next_ = -1;
  }

 private:
  std::int64_t take() { return progress_.next.fetch_add(1, std::memory_order_relaxed); }

  Progress& progress_;
  std::int64_t task_;
  std::int64_t next_ = -1;
};

// The same for a body that computes all of its worker's tasks of a stage in one call, so that it
// can prepare for the next one meanwhile. There is at least one.
class StageTasks {
 public:
  StageTasks(Claim& claim, std::int64_t first, std::int64_t end)
      : claim_(claim), first_(first), end_(end) {}
  std::int64_t task() const { return claim_.task() - first_; }
  bool has_next() { return claim_.next() < end_; }
  std::int64_t next() { return claim_.next() - first_; }
  // Moves on to the next task; false if there is none.
  bool finish() {
    claim_.finish();
    return claim_.task() < end_;
  }

 private:
  Claim& claim_;
  const std::int64_t first_;
  const std::int64_t end_;
};

// Calls the body of every task once, from at most `workers` workers, in order of the stages and of
// the index as workers come free; a task starts after all tasks of the stages before. Workers stay
// awake from stage to stage. The caller computes in StandardArithmetic, and so do they.
template <class... Bodies>
void run_stages(Executor& executor, int workers, const Stage<Bodies>&... stages) {
  const std::int64_t tasks = (std::int64_t{0} + ... + stages.tasks);
  workers = static_cast<int>(std::min(std::int64_t{workers}, std::max({stages.tasks...})));
  if (tasks <= 0) return;
  Progress progress;
  auto work = [&](int worker) {
    Claim claim(progress);
    std::int64_t first = 0;
    const auto run = [&]<class Body>(const Stage<Body>& stage) {
      const std::int64_t end = first + stage.tasks;
      if (claim.task() < end && first > 0) wait_for(progress.done, first);
      if constexpr (std::is_invocable_v<const Body&, StageTasks&, int>) {
        if (StageTasks own(claim, first, end); claim.task() < end) stage.body(own, worker);
      } else {
        for (; claim.task() < end; claim.finish()) stage.body(claim.task() - first, worker);
      }
      first = end;
    };
    (run(stages), ...);
  };
  if (workers <= 1) return work(0);
  executor.run(
      workers,
      [](void* context, int worker) {
        const StandardArithmetic arithmetic;
        (*static_cast<decltype(work)*>(context))(worker);
      },
      &work);
}

template <class Body>
void parallel_for(Executor& executor, int workers, std::int64_t tasks, const Body& body) {
  run_stages(executor, workers, Stage<const Body&>{tasks, body});
}

inline Executor& executor_of(const Queue& queue) {
  return queue.executor != nullptr ? *queue.executor : Executor::pool();
}

}  // namespace heed::cpu
