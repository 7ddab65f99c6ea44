// Carves the caller's scratch memory, or counts what it must hold: the same code does both.
#pragma once

#include <cstddef>
#include <cstdint>

#include "heed/plan.hpp"

namespace heed {

class WorkspaceLayout {
 public:
  // Counts only.
  WorkspaceLayout() = default;
  explicit WorkspaceLayout(Workspace memory) : base_(static_cast<std::byte*>(memory.data)) {}

  // `count` objects of T, aligned to kWorkspaceAlignment; nullptr while only counting.
  template <class T>
  T* add(std::int64_t count) {
    const std::size_t at = bytes_;
    const std::size_t size = static_cast<std::size_t>(count) * sizeof(T);
    bytes_ += (size + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace heed
