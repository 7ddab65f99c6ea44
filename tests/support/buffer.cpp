#include "support/buffer.hpp"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace heed::test {
namespace {

constexpr std::byte kCanary{0xC5};
char crash_context[2048];

[[maybe_unused]] void report_crash(int signal_number) {
  const char text[] = "\na guard page was touched, or memory that is not there, while running\n  ";
  (void)!write(STDERR_FILENO, text, sizeof text - 1);
  (void)!write(STDERR_FILENO, crash_context, std::strlen(crash_context));
  (void)!write(STDERR_FILENO, "\n", 1);
  signal(signal_number, SIG_DFL);
}

}  // namespace

void set_crash_context(const char* text) {
#if !defined(__SANITIZE_ADDRESS__)
  static const bool installed = [] {
    for (const int number : {SIGSEGV, SIGBUS}) signal(number, report_crash);
    return true;
  }();
  (void)installed;
#endif
  std::strncpy(crash_context, text, sizeof crash_context - 1);
}

Buffer::Buffer(std::size_t bytes, bool flush_right, std::size_t alignment) : size_(bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t inner = std::max(page, (bytes + page - 1) / page * page);
  map_bytes_ = inner + 2 * page;
  void* map =
      mmap(nullptr, map_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) std::abort();
  map_ = static_cast<std::byte*>(map);
  if (mprotect(map_ + page, inner, PROT_READ | PROT_WRITE) != 0) std::abort();
  data_ = map_ + page + (flush_right ? (inner - bytes) / alignment * alignment : 0);
  std::fill(map_ + page, data_, kCanary);
  std::fill(data_ + size_, map_ + page + inner, kCanary);
}

Buffer::~Buffer() {
  if (map_ != nullptr) munmap(map_, map_bytes_);
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(map_, other.map_);
  std::swap(map_bytes_, other.map_bytes_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

bool Buffer::intact() const {
  if (map_ == nullptr) return true;
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const auto is_canary = [](std::byte b) { return b == kCanary; };
  return std::all_of(map_ + page, data_, is_canary) &&
         std::all_of(data_ + size_, map_ + map_bytes_ - page, is_canary);
}

std::uint64_t poison_bits(DType dtype, Poison poison) {
  if (poison == Poison::nan) return ~std::uint64_t{0};
  if (poison == Poison::huge) return 0x7F7F7F7F7F7F7F7Fu;
  switch (dtype) {
    case DType::f64: return 0x7FF0000000000000u;
    case DType::f32: return 0x7F800000u;
    case DType::bf16: return 0x7F80u;
    case DType::f16: return 0x7C00u;
    case DType::boolean: return 1;
  }
  return 0;
}

void Buffer::fill(DType dtype, Poison poison) const {
  const std::uint64_t bits = poison_bits(dtype, poison);
  const std::size_t step = size_of(dtype);
  for (std::size_t i = 0; i < size_; i += step)
    std::memcpy(data_ + i, &bits, std::min(step, size_ - i));
}

}  // namespace heed::test
