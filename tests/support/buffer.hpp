// Memory that notices: an inaccessible page on either side, canaries in what remains of its own
// pages.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "heed/tensor.hpp"

namespace heed::test {

// What stands in memory that a kernel must not read, or has not written yet.
enum class Poison { nan, infinity, huge };

class Buffer {
 public:
  Buffer() = default;
  // `bytes` exactly: flush with the page after it (then `alignment` bounds the base from below only
  // by what the size leaves), or with the page before it.
  Buffer(std::size_t bytes, bool flush_right, std::size_t alignment = 8);
  ~Buffer();
  Buffer(Buffer&& other) noexcept { *this = static_cast<Buffer&&>(other); }
  Buffer& operator=(Buffer&& other) noexcept;

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  // Whether the canaries around the data are untouched.
  bool intact() const;

  void fill(DType dtype, Poison poison) const;
  template <class T>
  std::span<T> as() const {
    return {reinterpret_cast<T*>(data_), size_ / sizeof(T)};
  }

 private:
  std::byte* map_ = nullptr;
  std::size_t map_bytes_ = 0;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// The bits of one poisoned element, in the low bytes.
std::uint64_t poison_bits(DType dtype, Poison poison);

// Says which problem ran when a guard page is touched.
void set_crash_context(const char* text);

}  // namespace heed::test
