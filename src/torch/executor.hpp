// PyTorch's intra-op threads as a heed Executor.
#pragma once

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#include "heed/plan.hpp"

namespace heed::operators {

// PyTorch's threads stay behind in the parent, and its parallel_for waits for them for ever where
// OpenMP had started them.
inline std::atomic<bool> in_forked_child{false};
inline const int watches_forks =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); });

class TorchExecutor final : public Executor {
 public:
  // torch.get_num_threads()
  int concurrency() const override { return static_cast<int>(torch::stable::get_num_threads()); }

  // Inside another parallel region PyTorch runs all workers on the calling thread. In a forked
  // child heed's own threads take its place.
  void run(int workers, void (*body)(void* context, int worker), void* context) override {
    if (in_forked_child.load(std::memory_order_relaxed))
      return Executor::pool().run(workers, body, context);
    torch::stable::parallel_for(0, workers, 1, [=](std::int64_t begin, std::int64_t end) {
      for (std::int64_t worker = begin; worker < end; ++worker)
        body(context, static_cast<int>(worker));
    });
  }
};

}  // namespace heed::operators
