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

namespace {

bool is_gpu(const KernelRow& row) { return row.arch >= Arch::sm80; }

int most_head_dim_v(const KernelRow& row) {
  return row.max_head_dim_v > 0 ? row.max_head_dim_v : row.max_head_dim;
}

}  // namespace

const char* name_of(Arch arch) {
  constexpr std::array kNames{"reference", "scalar",    "avx2", "avx512", "avx512_bf16", "amx_bf16",
                              "neon",      "neon_bf16", "sm80", "sm90",   "sm100",       "sm120"};
  return kNames[static_cast<std::size_t>(arch)];
}

const char* name_of(Pass pass) {
  constexpr std::array kNames{"forward", "decode", "backward"};
  return kNames[static_cast<std::size_t>(pass)];
}

std::string name_of(const KernelRow& row) {
  std::string name =
      std::string(name_of(row.arch)) + "/" + name_of(row.pass) + "/" + name_of(row.dtype);
  if (row.arch < Arch::sm80) return name;
  name += "/hdim" + std::to_string(row.max_head_dim);
  if (row.max_head_dim_v > 0) name.append("v").append(std::to_string(row.max_head_dim_v));
  name.append("/").append(name_of(row.score)).append("/");
  name += std::to_string(row.tile_m) + "x" + std::to_string(row.tile_n);
  return name;
}

std::span<const KernelRow> registry() {
  // Never destroyed, because the caller's threads may compute until the last moment.
  static const std::vector<KernelRow>& table = *new auto([] {
    std::vector<KernelRow> rows;
#define HEED_KERNELS(group) \
  for (const KernelRow& row : group()) rows.push_back(row);
#include "kernel_list.inc"
#undef HEED_KERNELS
    std::stable_partition(rows.begin(), rows.end(), is_gpu);  // clang 14 lacks the ranges one
    return rows;
  }());
  return table;
}

std::span<const KernelRow> registry_of(Arch arch) {
  static const auto num_gpu = static_cast<std::size_t>(std::ranges::count_if(registry(), is_gpu));
  return arch >= Arch::sm80 ? registry().first(num_gpu) : registry().subspan(num_gpu);
}

// The sets of one kind of processor contain each other in the order of the enumeration. Kernels of
// a later GPU than sm80 use instructions that only its own family has.
bool serves(Arch row, Arch device) {
  if (row == device) return true;
  if (device >= Arch::sm80) return row == Arch::sm80;
  if (row > device) return false;
  return row <= Arch::scalar || device < Arch::neon || row >= Arch::neon;
}

int most_smem_bytes(Arch arch) {
  switch (arch) {
    case Arch::sm80: return 163 * 1024;
    case Arch::sm90:
    case Arch::sm100: return 227 * 1024;
    case Arch::sm120: return 99 * 1024;
    default: return 0;
  }
}

Mismatch mismatch(const KernelRow& row, const Request& request) {
  const bool pass_fits =
      row.pass == request.pass || (row.pass == Pass::decode && request.pass == Pass::forward);
  if (!pass_fits) return Mismatch::pass;
  if (row.dtype != request.dtype) return Mismatch::dtype;
  if (!serves(row.arch, request.arch)) return Mismatch::arch;
  if (row.score != request.score && row.score != ScoreKind::general) return Mismatch::score;
  if (request.head_dim > row.max_head_dim || request.head_dim_v > most_head_dim_v(row))
    return Mismatch::head_dim;
  if (row.max_query_rows > 0 && request.query_rows > row.max_query_rows)
    return Mismatch::query_rows;
  if (row.few_query_rows > 0 && request.query_rows > row.few_query_rows &&
      request.seqlen_k < request.query_rows * kKeysPerRow)
    return Mismatch::few_keys;
  if (row.max_seqlen_k > 0 && request.seqlen_k > row.max_seqlen_k) return Mismatch::seqlen_k;
  if (row.smem_bytes > request.smem_bytes) return Mismatch::smem;
  if (row.bulk) {
    if (!request.bulk) return Mismatch::alignment;
    if (request.negative_scale) return Mismatch::scale;
    if (request.page_size % 8 != 0 ||
        (request.page_size > 0 && row.tile_n % request.page_size != 0 &&
         request.page_size % row.tile_n != 0))
      return Mismatch::page_size;
  }
  if (request.force != nullptr && name_of(row).rfind(request.force, 0) != 0)
    return Mismatch::forced;
  if (request.force != nullptr) return Mismatch::none;
  if (request.query_rows < row.least_query_rows) return Mismatch::few_rows;
  const std::int64_t enough = row.least_scores;  // of either, if there is one of the other
  if (std::min(request.query_rows, enough) * std::min(request.seqlen_k, enough) < enough)
    return Mismatch::few_scores;
  if (row.arch == Arch::avx512_bf16 && request.arch == Arch::amx_bf16) return Mismatch::slow_dots;
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
    case Mismatch::head_dim: {
      std::string text = "takes head_dim up to " + std::to_string(row.max_head_dim);
      if (row.max_head_dim_v > 0)
        text.append(", of v up to ").append(std::to_string(row.max_head_dim_v));
      text.append(", here ").append(std::to_string(request.head_dim));
      if (request.head_dim_v != request.head_dim)
        text.append(", of v ").append(std::to_string(request.head_dim_v));
      return text;
    }
    case Mismatch::alignment:
      return std::string("needs q, k") + (row.pass == Pass::backward ? ", v and dout" : " and v") +
             " that repeat no axis, with head_dim and strides that are multiples "
             "of 8 and addresses that are multiples of 16 bytes";
    case Mismatch::scale: return "needs a scale of at least 0";
    case Mismatch::page_size:
      return "needs pages of a multiple of 8 keys that divide or are divided by tiles of " +
             std::to_string(row.tile_n) + ", here " + std::to_string(request.page_size);
    case Mismatch::query_rows:
      return "takes up to " + std::to_string(row.max_query_rows) +
             " query rows per key head, here " + std::to_string(request.query_rows);
    case Mismatch::few_keys:
      return "takes more than " + std::to_string(row.few_query_rows) +
             " query rows per key head, here " + std::to_string(request.query_rows) +
             ", only with at least " + std::to_string(kKeysPerRow) + " keys each";
    case Mismatch::seqlen_k:
      return "takes up to " + std::to_string(row.max_seqlen_k) + " keys of an entry, here " +
             std::to_string(request.seqlen_k);
    case Mismatch::score:
      return std::string("computes ") + name_of(row.score) + " scores, here " +
             name_of(request.score);
    case Mismatch::smem:
      return "needs " + std::to_string(row.smem_bytes) +
             " bytes of shared memory per block, here " + std::to_string(request.smem_bytes);
    case Mismatch::forced: return std::string("another kernel is forced: ") + request.force;
    case Mismatch::few_rows:
      return "takes at least " + std::to_string(row.least_query_rows) +
             " query rows per key head, here " + std::to_string(request.query_rows);
    case Mismatch::few_scores:
      return "takes at least " + std::to_string(row.least_scores) + " scores per key head, here " +
             std::to_string(request.query_rows * request.seqlen_k);
    case Mismatch::slow_dots: return "on CPUs with AMX, bf16 dot products are slower than fp32";
  }
  return {};
}

const KernelRow* find_row(std::span<const KernelRow> rows, const Request& request) {
  const auto it = std::ranges::find_if(
      rows, [&](const KernelRow& row) { return mismatch(row, request) == Mismatch::none; });
  return it == rows.end() ? nullptr : &*it;
}

}  // namespace heed
