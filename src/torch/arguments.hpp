// An operator's arguments, taken off its stack in the order of the schema.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>

#include "tensors.hpp"

namespace heed::operators {

class Arguments {
 public:
  explicit Arguments(const StableIValue* stack) : next_(stack) {}

  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  std::optional<Tensor> optional_tensor() { return take<std::optional<Tensor>>(); }

 private:
  const StableIValue* next_;
};

}  // namespace heed::operators
