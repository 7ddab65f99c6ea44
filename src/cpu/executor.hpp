// Tasks on the workers of an Executor.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/arithmetic.hpp"
#include "heed/plan.hpp"

namespace heed::cpu {

// Calls body(task, worker) once for every task in [0, tasks), from at most `workers` workers, in
// order of the index as workers come free. The caller computes in StandardArithmetic, and so do they.
template <class Body>
void parallel_for(Executor& executor, int workers, std::int64_t tasks, const Body& body) {
  if (tasks <= 0) return;
  if (workers > tasks) workers = static_cast<int>(tasks);
  if (workers <= 1) {
    for (std::int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  struct Shared {
    const Body& body;
    std::int64_t tasks;
    std::atomic<std::int64_t> next{0};
  } shared{body, tasks};
  executor.run(
      workers,
      [](void* context, int worker) {
        const StandardArithmetic arithmetic;
        auto& s = *static_cast<Shared*>(context);
        for (std::int64_t task; (task = s.next.fetch_add(1, std::memory_order_relaxed)) < s.tasks;)
          s.body(task, worker);
      },
      &shared);
}

inline Executor& executor_of(const Queue& queue) {
  return queue.executor != nullptr ? *queue.executor : Executor::pool();
}

}  // namespace heed::cpu
