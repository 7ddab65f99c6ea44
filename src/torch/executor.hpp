// PyTorch's intra-op threads as a heed Executor.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "heed/plan.hpp"

namespace heed::operators {

class TorchExecutor final : public Executor {
 public:
  // torch.get_num_threads()
  int concurrency() const override { return static_cast<int>(torch::stable::get_num_threads()); }

  // Inside another parallel region PyTorch runs all workers on the calling thread.
  void run(int workers, void (*body)(void* context, int worker), void* context) override {
    torch::stable::parallel_for(0, workers, 1, [=](std::int64_t begin, std::int64_t end) {
      for (std::int64_t worker = begin; worker < end; ++worker)
        body(context, static_cast<int>(worker));
    });
  }
};

}  // namespace heed::operators
