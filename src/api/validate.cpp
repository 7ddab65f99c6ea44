// The only place that knows what is legal.
#include "api/validate.hpp"

#include <array>
#include <cmath>
#include <cstdint>
#include <utility>

#include "api/message.hpp"
#include "api/overlap.hpp"
#include "api/tensor_rules.hpp"
#include "core/sequence.hpp"

namespace heed {
namespace {

bool is_paged(const ForwardProblem& p) {
  return p.paged.page_table != nullptr || p.paged.max_pages > 0;
}

Status check_heads(const ForwardProblem& p) {
  if (p.k.heads() == 0 ? p.q.heads() != 0 : p.q.heads() % p.k.heads() != 0)
    return invalid("q.heads = ", p.q.heads(), " must be a multiple of k.heads = ", p.k.heads());
  return {};
}

Status check_batch(const ForwardProblem& p) {
  const std::int64_t batch = p.sequences.batch;
  if (batch < 0 || batch > kMaxExtent)
    return invalid("sequences.batch = ", batch, " must be in [0, ", kMaxExtent, "]");
  if (is_packed(p.q)) {
    if (batch == 0 && p.q.seqlen() > 0)
      return invalid("sequences.batch = 0 must be at least 1: q packs ", p.q.seqlen(), " tokens");
  } else if (batch != 0 && batch != p.q.batch()) {
    return invalid("sequences.batch = ", batch, " must be 0 or q.batch = ", p.q.batch());
  }
  if (!is_packed(p.k) && !is_paged(p) && p.k.batch() != batch_entries(p))
    return invalid("k.batch = ", p.k.batch(), " must be ",
                   is_packed(p.q) ? "sequences.batch = " : "q.batch = ", batch_entries(p));
  return {};
}

Status check_tensors(const ForwardProblem& p) {
  const ConstTensorView out_view = p.out;
  const Named q{"q", p.q}, k{"k", p.k}, v{"v", p.v}, out{"out", out_view};
  for (const Named& t : {q, k, v, out})
    if (Status s = check_tensor(t, p.q); !s.ok()) return s;
  if (p.k.head_dim() != p.q.head_dim())
    return invalid("k.head_dim = ", p.k.head_dim(), " must be q.head_dim = ", p.q.head_dim());
  if (Status s = check_like(v, k, v); !s.ok()) return s;
  if (Status s = check_like(out, q, v); !s.ok()) return s;
  if (Status s = check_heads(p); !s.ok()) return s;
  return check_batch(p);
}

// ---- where the tokens are ----

struct Side {
  const ConstTensorView& tensor;
  const std::int32_t *cu_seqlens, *start, *seqused;
  std::int64_t max_seqlen;
  const char *rank_name, *cu_seqlens_name, *start_name, *seqused_name, *max_seqlen_name;
};

Side q_side(const ForwardProblem& p) {
  const Sequences& s = p.sequences;
  return {p.q,
          s.cu_seqlens_q,
          s.start_q,
          s.seqused_q,
          s.max_seqlen_q,
          "q.rank",
          "sequences.cu_seqlens_q",
          "sequences.start_q",
          "sequences.seqused_q",
          "sequences.max_seqlen_q"};
}
Side k_side(const ForwardProblem& p) {
  const Sequences& s = p.sequences;
  return {p.k,
          s.cu_seqlens_k,
          s.start_k,
          s.seqused_k,
          s.max_seqlen_k,
          "k.rank",
          "sequences.cu_seqlens_k",
          "sequences.start_k",
          "sequences.seqused_k",
          "sequences.max_seqlen_k"};
}

Status check_side(const Side& side) {
  const bool packed = is_packed(side.tensor);
  if (packed && side.cu_seqlens == nullptr)
    return invalid(side.cu_seqlens_name, " = null must not be null: ", side.rank_name,
                   " = 3 means packed");
  if (!packed && side.cu_seqlens != nullptr)
    return invalid(side.rank_name, " = 4 must be 3 (packed) when ", side.cu_seqlens_name,
                   " is given");
  if (packed && side.start != nullptr)
    return invalid(side.rank_name, " = 3 must be 4 (padded) when ", side.start_name, " is given");
  if (side.max_seqlen < 0 || side.max_seqlen > kMaxTokens)
    return invalid(side.max_seqlen_name, " = ", side.max_seqlen, " must be in [0, ", kMaxTokens,
                   "]");
  if (Status s = check_pointer(side.cu_seqlens_name, side.cu_seqlens, 4); !s.ok()) return s;
  if (Status s = check_pointer(side.start_name, side.start, 4); !s.ok()) return s;
  return check_pointer(side.seqused_name, side.seqused, 4);
}

Status check_pages(const ForwardProblem& p) {
  const std::int64_t max_pages = p.paged.max_pages;
  if (max_pages < 0 || (max_pages == 0 && p.paged.page_table != nullptr))
    return invalid("paged.max_pages = ", max_pages, " must be at least ",
                   p.paged.page_table == nullptr ? 0 : 1);
  if (!is_paged(p)) return {};
  if (is_packed(p.k))
    return invalid(
        "k.rank = 3 must be 4, [num_pages, page_size, heads, head_dim], when "
        "paged.page_table is given");
  if (p.sequences.start_k != nullptr)
    return invalid(
        "sequences.start_k must be null when paged.page_table is given: an entry begins "
        "at slot 0 of its first page");
  const std::int64_t page_size = p.k.seqlen();
  if (page_size < 1) return invalid("k.shape[1] = ", page_size, " (page_size) must be at least 1");
  if (max_pages > kMaxTokens / page_size)
    return invalid("paged.max_pages = ", max_pages, " must be at most ", kMaxTokens / page_size,
                   " with pages of k.shape[1] = ", page_size);
  const bool needed = batch_entries(p) > 0;
  if (Status s = require_pointer("paged.page_table", p.paged.page_table, needed,
                                 "paged.max_pages is given");
      !s.ok())
    return s;
  if (Status s = require_pointer("sequences.seqused_k", p.sequences.seqused_k, needed,
                                 "pages do not say how many keys they hold");
      !s.ok())
    return s;
  return check_pointer("paged.page_table", p.paged.page_table, 4);
}

// ---- masks, bias and scalars ----

Status check_batch_stride(const char* name, std::int64_t stride, std::int64_t entry) {
  if (stride == 0 || (stride >= entry && stride <= kMaxBytes / 8)) return {};
  return invalid(name, " = ", stride, " must be 0 (shared) or at least ", entry,
                 ", the elements of one batch entry");
}

Status check_intervals(const ForwardProblem& p) {
  const KeyIntervals& at = p.intervals;
  if (Status s = check_pointer("intervals.rows", at.rows, 4); !s.ok()) return s;
  if (at.rows != nullptr && !is_packed(p.q))
    if (Status s = check_batch_stride("intervals.rows_batch_stride", at.rows_batch_stride,
                                      2 * p.q.seqlen());
        !s.ok())
      return s;
  if (at.bits == nullptr) return {};
  if (Status s = check_pointer("intervals.bits", at.bits, 4); !s.ok()) return s;
  if (at.bits_words < 1 || at.bits_words > kMaxTokens)
    return invalid("intervals.bits_words = ", at.bits_words, " must be in [1, ", kMaxTokens,
                   "] when intervals.bits is given");
  return check_batch_stride("intervals.bits_batch_stride", at.bits_batch_stride, at.bits_words);
}

Status check_band(const Band& band) {
  const std::array<const char*, 3> names{"band.left", "band.right", "band.chunk"};
  const std::array<int, 3> values{band.left, band.right, band.chunk};
  for (std::size_t i = 0; i < 3; ++i)
    if (values[i] < 0 || values[i] > kUnbounded)
      return invalid(
          names[i], " = ", values[i], " must be in [0, ", kUnbounded, "], where ",
          i == 2 ? "0 means not chunked" : concat(kUnbounded, " (kUnbounded) means no limit"));
  return {};
}

Status check_scalars(const ForwardProblem& p) {
  if (p.score.scale && !std::isfinite(*p.score.scale))
    return invalid("score.scale = ", *p.score.scale, " must be finite");
  if (!std::isfinite(p.score.softcap) || p.score.softcap < 0.f)
    return invalid("score.softcap = ", p.score.softcap, " must be finite and at least 0 (none)");
  const float probability = p.dropout.probability;
  if (!(probability >= 0.f && probability < 1.f))
    return invalid("dropout.probability = ", probability, " must be in [0, 1)");
  if (Status s = require_pointer("dropout.seed", p.dropout.seed, probability > 0.f,
                                 "dropout.probability is above 0");
      !s.ok())
    return s;
  return check_pointer("dropout.seed", p.dropout.seed, 8);
}

Status check_bias(const ForwardProblem& p) {
  const Named bias{"bias", p.bias};
  if (!p.bias) return {};
  if (p.bias.rank != 4)
    return invalid("bias.rank = ", p.bias.rank,
                   " must be 4, [batch or 1, heads_q or 1, seqlen_q or 1, seqlen_k]");
  const Sequences& s = p.sequences;
  if (is_packed(p.q) && s.max_seqlen_q == 0)
    return invalid("sequences.max_seqlen_q = 0 must be at least 1 when q is packed and has a bias");
  if (is_packed(p.k) && s.max_seqlen_k == 0)
    return invalid("sequences.max_seqlen_k = 0 must be at least 1 when k is packed and has a bias");
  const std::array<std::int64_t, 4> full{batch_entries(p), p.q.heads(),
                                         is_packed(p.q) ? s.max_seqlen_q : p.q.seqlen(),
                                         is_packed(p.k) ? s.max_seqlen_k : key_capacity(p)};
  const std::array<const char*, 4> names{is_packed(p.q) ? "sequences.batch" : "q.batch", "q.heads",
                                         is_packed(p.q) ? "sequences.max_seqlen_q" : "q.seqlen",
                                         is_packed(p.k) ? "sequences.max_seqlen_k"
                                         : is_paged(p)  ? "paged.max_pages * k.shape[1]"
                                                        : "k.seqlen"};
  for (std::size_t d = 0; d < 4; ++d)
    if (p.bias.shape[d] != full[d] && (d == 3 || p.bias.shape[d] != 1))
      return invalid("bias.shape[", d, "] = ", p.bias.shape[d], " must be ", names[d], " = ",
                     full[d], d == 3 ? "" : " or 1");
  if (p.bias.dtype > DType::boolean)
    return invalid("bias.dtype = ", text_of(p.bias.dtype), " must be f32, bf16, f16, f64 or bool");
  if (Status status = check_strides(bias); !status.ok()) return status;
  return check_data(bias);
}

// ---- overlap ----

std::int64_t lse_bytes(const ForwardProblem& p) {
  return bytes_of(p.q.batch() * p.q.heads(), p.q.seqlen());
}

// What both passes read.
void read_inputs(Regions& regions, const ForwardProblem& p) {
  const std::int64_t batch = batch_entries(p);
  const Sequences& s = p.sequences;
  const KeyIntervals& at = p.intervals;
  regions.read("q", p.q);
  regions.read("k", p.k);
  regions.read("v", p.v);
  regions.read("bias", p.bias);
  regions.read("sink", p.sink, bytes_of(p.q.heads()));
  regions.read("sequences.cu_seqlens_q", s.cu_seqlens_q, bytes_of(batch + 1));
  regions.read("sequences.cu_seqlens_k", s.cu_seqlens_k, bytes_of(batch + 1));
  regions.read("sequences.start_q", s.start_q, bytes_of(batch));
  regions.read("sequences.start_k", s.start_k, bytes_of(batch));
  regions.read("sequences.seqused_q", s.seqused_q, bytes_of(batch));
  regions.read("sequences.seqused_k", s.seqused_k, bytes_of(batch));
  regions.read("intervals.rows", at.rows,
               bytes_of(p.q.batch() - 1, at.rows_batch_stride) + bytes_of(p.q.seqlen(), 2));
  regions.read("intervals.bits", at.bits,
               bytes_of(batch - 1, at.bits_batch_stride) + bytes_of(at.bits_words));
  regions.read("paged.page_table", p.paged.page_table, bytes_of(batch, p.paged.max_pages));
  regions.read("dropout.seed", p.dropout.seed, 8);
}

// Scratch memory and task counts are products of these numbers with head_dim and a few powers of 2.
Status check_size(const char* name, std::int64_t heads, std::int64_t entries, std::int64_t tokens) {
  constexpr std::int64_t kMostRows = std::int64_t{1} << 40, kMostHeads = std::int64_t{1} << 32;
  std::int64_t rows = 0, all_heads = 0;
  if (__builtin_mul_overflow(heads, entries, &all_heads) || all_heads > kMostHeads)
    return unsupported(name, ".heads = ", heads, " times ", entries,
                       " batch entries must be at most ", kMostHeads);
  if (__builtin_mul_overflow(heads, tokens, &rows) || rows > kMostRows)
    return unsupported(name, ".heads = ", heads, " times ", tokens,
                       " tokens of all batch entries must be at most ", kMostRows);
  return {};
}

Status check_size(const ForwardProblem& p) {
  // Extents are below 2^31, and key_capacity() is below 2^30.
  const std::int64_t entries = batch_entries(p);
  if (Status s = check_size("q", p.q.heads(), entries, p.q.batch() * p.q.seqlen()); !s.ok())
    return s;
  return check_size("k", p.k.heads(), entries,
                    p.k.rank == 3 ? p.k.seqlen() : entries * key_capacity(p));
}

// All but the overlap of outputs, which differs between the passes.
Status check_common(const ForwardProblem& p) {
  for (const auto& t : {Named{"q", p.q}, Named{"k", p.k}})
    if (Status s = check_rank(t); !s.ok()) return s;
  if (p.q.dtype > DType::f64)
    return invalid("q.dtype = ", text_of(p.q.dtype), " must be f32, bf16, f16 or f64");
  if (Status s = check_side(q_side(p)); !s.ok()) return s;
  if (Status s = check_side(k_side(p)); !s.ok()) return s;
  if (Status s = check_pages(p); !s.ok()) return s;
  if (Status s = check_tensors(p); !s.ok()) return s;
  if (Status s = check_band(p.band); !s.ok()) return s;
  if (Status s = check_scalars(p); !s.ok()) return s;
  if (Status s = check_intervals(p); !s.ok()) return s;
  if (Status s = check_bias(p); !s.ok()) return s;
  if (Status s = check_pointer("sink", p.sink, 4); !s.ok()) return s;
  if (Status s = check_pointer("lse", p.lse, 4); !s.ok()) return s;
  return check_size(p);
}

Status check_bias_gradient(const BackwardProblem& p) {
  if (!p.dbias) return {};
  const ConstTensorView& bias = p.forward.bias;
  const ConstTensorView view = p.dbias;
  const Named dbias{"dbias", view};
  if (!bias) return invalid("dbias must be null when bias is null");
  if (bias.dtype == DType::boolean)
    return invalid("dbias must be null when bias.dtype = bool: a mask has no gradient");
  if (view.dtype != DType::f32)
    return invalid("dbias.dtype = ", text_of(view.dtype), " must be f32");
  if (view.rank != 4) return invalid("dbias.rank = ", view.rank, " must be 4");
  for (std::size_t d = 0; d < 4; ++d)
    if (view.shape[d] != bias.shape[d])
      return invalid("dbias.shape[", d, "] = ", view.shape[d], " must be bias.shape[", d,
                     "] = ", bias.shape[d]);
  if (Status s = check_strides(dbias); !s.ok()) return s;
  if (Status s = check_data(dbias); !s.ok()) return s;
  return check_own_places(dbias);
}

}  // namespace

Status validate(const ForwardProblem& p) {
  if (Status s = check_common(p); !s.ok()) return s;
  const ConstTensorView out = p.out;
  if (Status s = check_own_places({"out", out}); !s.ok()) return s;
  Regions regions;
  read_inputs(regions, p);
  regions.write("out", out);
  regions.write("lse", p.lse, lse_bytes(p));
  return regions.check();
}

Status validate(const BackwardProblem& p) {
  const ForwardProblem& f = p.forward;
  if (is_paged(f))
    return unsupported(
        "paged.page_table must be null in a backward pass, which takes dense, padded "
        "or packed keys: gather the pages into a packed k and v");
  if (Status s = check_common(f); !s.ok()) return s;
  if (Status s = require_pointer("lse", f.lse, lse_bytes(f) > 0,
                                 "a backward pass reads what the forward pass wrote there");
      !s.ok())
    return s;

  const ConstTensorView out_view = f.out, dq_view = p.dq, dk_view = p.dk, dv_view = p.dv;
  const Named q{"q", f.q}, k{"k", f.k}, v{"v", f.v}, out{"out", out_view};
  const Named dout{"dout", p.dout}, dq{"dq", dq_view}, dk{"dk", dk_view}, dv{"dv", dv_view};
  for (const auto& [gradient, of] : {std::pair(&dout, &out), {&dq, &q}, {&dk, &k}, {&dv, &v}}) {
    if (Status s = check_tensor(*gradient, f.q); !s.ok()) return s;
    if (Status s = check_like(*gradient, *of, *of); !s.ok()) return s;
  }
  for (const Named* gradient : {&dq, &dk, &dv})
    if (Status s = check_own_places(*gradient); !s.ok()) return s;
  if (Status s = check_bias_gradient(p); !s.ok()) return s;
  if (p.dsink != nullptr && f.sink == nullptr)
    return invalid("dsink must be null when sink is null");
  if (Status s = check_pointer("dsink", p.dsink, 4); !s.ok()) return s;
  if (Status s = check_pointer("dlse", p.dlse, 4); !s.ok()) return s;

  Regions regions;
  read_inputs(regions, f);
  regions.read("out", out_view);
  regions.read("lse", f.lse, lse_bytes(f));
  regions.read("dout", p.dout);
  regions.read("dlse", p.dlse, lse_bytes(f));
  regions.write("dq", dq_view);
  regions.write("dk", dk_view);
  regions.write("dv", dv_view);
  regions.write("dbias", p.dbias);
  regions.write("dsink", p.dsink, bytes_of(f.q.heads()));
  return regions.check();
}

// ---- contents ----

namespace {

// One side's arrays of one batch entry.
Status check_entry(const Side& side, std::int64_t rows, std::size_t entry) {
  std::int64_t room = rows;
  if (side.cu_seqlens != nullptr) {
    const std::int64_t first = side.cu_seqlens[entry], end = side.cu_seqlens[entry + 1];
    if (entry == 0 && (first < 0 || first > rows))
      return invalid(side.cu_seqlens_name, "[0] = ", first, " must be in [0, ", rows, "]");
    if (end < first || end > rows)
      return invalid(side.cu_seqlens_name, "[", entry + 1, "] = ", end, " must be in [", first,
                     ", ", rows, "]");
    room = end - first;
    if (side.max_seqlen > 0 && side.seqused == nullptr && room > side.max_seqlen)
      return invalid(side.cu_seqlens_name, "[", entry + 1, "] = ", end, " must be at most ",
                     first + side.max_seqlen, ", ", side.max_seqlen_name, " = ", side.max_seqlen,
                     " tokens after the entry's first one");
    if (side.max_seqlen > 0 && room > side.max_seqlen) room = side.max_seqlen;
  }
  if (side.start != nullptr) {
    const std::int64_t start = side.start[entry];
    if (start < 0 || start > rows)
      return invalid(side.start_name, "[", entry, "] = ", start, " must be in [0, ", rows, "]");
    room = rows - start;
  }
  if (side.seqused != nullptr && (side.seqused[entry] < 0 || side.seqused[entry] > room))
    return invalid(side.seqused_name, "[", entry, "] = ", side.seqused[entry], " must be in [0, ",
                   room, "]");
  return {};
}

Status check_page_ids(const ForwardProblem& p, std::size_t entry) {
  const std::int64_t page_size = p.k.seqlen(), num_pages = p.k.batch();
  const std::int64_t live = (p.sequences.seqused_k[entry] + page_size - 1) / page_size;
  const std::int32_t* pages =
      p.paged.page_table + static_cast<std::int64_t>(entry) * p.paged.max_pages;
  for (std::int64_t i = 0; i < live; ++i)
    if (pages[i] < 0 || pages[i] >= num_pages)
      return invalid("paged.page_table[", entry, "][", i, "] = ", pages[i], " must be in [0, ",
                     num_pages, "), a page of k");
  return {};
}

}  // namespace

Status validate_contents(const ForwardProblem& p) {
  const Side q = q_side(p), k = k_side(p);
  const auto entries = static_cast<std::size_t>(batch_entries(p));
  for (std::size_t entry = 0; entry < entries; ++entry) {
    if (Status s = check_entry(q, p.q.seqlen(), entry); !s.ok()) return s;
    if (Status s = check_entry(k, key_capacity(p), entry); !s.ok()) return s;
    if (p.paged.page_table == nullptr) continue;
    if (Status s = check_page_ids(p, entry); !s.ok()) return s;
  }
  return {};
}

Status validate_contents(const BackwardProblem& p) { return validate_contents(p.forward); }

}  // namespace heed
