// First-match lookup in the table of kernels.
#include "registry.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

namespace heed {

// One function per group of rows; CMake writes the list, best group first.
#define HEED_KERNELS(rows) std::span<const KernelRow> rows();
#include "kernel_list.inc"
#undef HEED_KERNELS

const char* name_of(Arch arch) {
  constexpr std::array kNames{"reference", "scalar", "avx2", "avx512", "avx512_bf16",
                              "neon",      "sm80",   "sm90", "sm100",  "sm120"};
  return kNames[static_cast<std::size_t>(arch)];
}

const char* name_of(Pass pass) {
  constexpr std::array kNames{"forward", "decode", "backward"};
  return kNames[static_cast<std::size_t>(pass)];
}

std::string name_of(const KernelRow& row) {
  return std::string(name_of(row.arch)) + "/" + name_of(row.pass) + "/" + name_of(row.dtype);
}

std::span<const KernelRow> registry() {
  static const std::vector<KernelRow> table = [] {
    std::vector<KernelRow> rows;
#define HEED_KERNELS(group) \
  for (const KernelRow& row : group()) rows.push_back(row);
#include "kernel_list.inc"
#undef HEED_KERNELS
    return rows;
  }();
  return table;
}

namespace {

// x86 sets contain each other in the order of the enumeration; NEON stands alone.
bool serves(Arch row, Arch device) {
  if (row == device) return true;
  if (device >= Arch::sm80) return row >= Arch::sm80 && row < device;
  if (row == Arch::reference) return true;
  if (device == Arch::neon) return row == Arch::scalar;
  return row < device;
}

}  // namespace

Mismatch mismatch(const KernelRow& row, const Request& request) {
  const bool pass_fits =
      row.pass == request.pass || (row.pass == Pass::decode && request.pass == Pass::forward);
  if (!pass_fits) return Mismatch::pass;
  if (row.dtype != request.dtype) return Mismatch::dtype;
  if (!serves(row.arch, request.arch)) return Mismatch::arch;
  if (request.head_dim > row.max_head_dim) return Mismatch::head_dim;
  if (row.max_query_rows > 0 && request.query_rows > row.max_query_rows)
    return Mismatch::query_rows;
  if (request.force != nullptr && name_of(row).rfind(request.force, 0) != 0)
    return Mismatch::forced;
  return Mismatch::none;
}

std::string describe(Mismatch why, const KernelRow& row, const Request& request) {
  switch (why) {
    case Mismatch::none: return "fits";
    case Mismatch::pass: return std::string("is a ") + name_of(row.pass) + " kernel";
    case Mismatch::dtype: return std::string("takes ") + name_of(row.dtype) + " tensors";
    case Mismatch::arch:
      return std::string("needs ") + name_of(row.arch) + ", this device is " +
             name_of(request.arch);
    case Mismatch::head_dim:
      return "takes head_dim up to " + std::to_string(row.max_head_dim) + ", here " +
             std::to_string(request.head_dim);
    case Mismatch::query_rows:
      return "takes up to " + std::to_string(row.max_query_rows) +
             " query rows per key head, here " + std::to_string(request.query_rows);
    case Mismatch::forced: return std::string("another kernel is forced: ") + request.force;
  }
  return {};
}

const KernelRow* find_row(std::span<const KernelRow> rows, const Request& request) {
  const auto it = std::ranges::find_if(
      rows, [&](const KernelRow& row) { return mismatch(row, request) == Mismatch::none; });
  return it == rows.end() ? nullptr : &*it;
}

}  // namespace heed
