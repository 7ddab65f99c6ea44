#include "problem.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <utility>

#include "core/half.hpp"
#include "core/mask.hpp"
#include "verbs.hpp"

namespace heed::tool {
namespace {

// The longest entries fill their row; shorter ones are spread evenly around the mean.
std::int64_t length_of(const ProblemFlags& flags, std::int64_t seqlen, std::int64_t entry) {
  const double longest = std::min(1.0, 2 * flags.fill);
  const double shortest = 2 * flags.fill - longest;
  const double at = (static_cast<double>(entry) + 0.5) / static_cast<double>(flags.batch);
  const double share = flags.fill >= 1 ? 1.0 : longest - (longest - shortest) * at;
  return std::llround(share * static_cast<double>(seqlen));
}

void fill_normal(void* data, DType dtype, std::int64_t count, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  std::vector<float> table(4099);  // prime: rows of any usual length start at different places
  for (float& x : table) x = normal(generator);
  for (std::int64_t i = 0; i < count; ++i) {
    const float x = table[static_cast<std::size_t>(i) % table.size()];
    switch (dtype) {
      case DType::f32: static_cast<float*>(data)[i] = x; break;
      case DType::f64: static_cast<double*>(data)[i] = double{x}; break;
      case DType::bf16: static_cast<bf16*>(data)[i] = from_float<bf16>(x); break;
      case DType::f16: static_cast<f16*>(data)[i] = from_float<f16>(x); break;
      case DType::boolean: static_cast<bool*>(data)[i] = x > -1.f; break;
    }
  }
}

class Builder {
 public:
  Builder(const ProblemFlags& flags, Arena& arena) : flags_(flags), arena_(arena) {}

  TensorView tensor(std::int64_t rows, std::int64_t heads, std::int64_t head_dim, bool packed) {
    const std::int64_t batch = packed ? 1 : flags_.batch;
    const std::int64_t count = batch * rows * heads * head_dim;
    void* data = numbers(flags_.dtype, count);
    if (packed) return contiguous(data, flags_.dtype, std::array{rows, heads, head_dim});
    return contiguous(data, flags_.dtype, std::array{batch, rows, heads, head_dim});
  }
  TensorView pages(std::int64_t count, std::int64_t heads, std::int64_t head_dim) {
    void* data = numbers(flags_.dtype, count * flags_.page_size * heads * head_dim);
    return contiguous(data, flags_.dtype, std::array{count, flags_.page_size, heads, head_dim});
  }
  void* numbers(DType dtype, std::int64_t count) {
    void* data = arena_.take(count * static_cast<std::int64_t>(size_of(dtype)));
    if (arena_.real()) fill_normal(data, dtype, count, generator_);
    return data;
  }
  // value(i) for every i in [0, count).
  template <class Value>
  std::int32_t* indices(std::int64_t count, const Value& value) {
    auto* data = static_cast<std::int32_t*>(arena_.take(count * 4));
    if (arena_.real())
      for (std::int64_t i = 0; i < count; ++i) data[i] = static_cast<std::int32_t>(value(i));
    return data;
  }
  std::int32_t* cu_seqlens(std::int64_t seqlen) {
    return indices(flags_.batch + 1, [&](std::int64_t entries) {
      std::int64_t total = 0;
      for (std::int64_t b = 0; b < entries; ++b) total += length_of(flags_, seqlen, b);
      return total;
    });
  }
  std::int64_t total(std::int64_t seqlen) const {
    std::int64_t tokens = 0;
    for (std::int64_t b = 0; b < flags_.batch; ++b) tokens += length_of(flags_, seqlen, b);
    return tokens;
  }

 private:
  const ProblemFlags& flags_;
  Arena& arena_;
  std::mt19937 generator_{1};
};

void place_tokens(const ProblemFlags& flags, Builder& build, std::int64_t seqlen_q,
                  std::int64_t seqlen_k, ForwardProblem& p) {
  const auto lengths = [&](std::int64_t seqlen) {
    return build.indices(flags.batch, [&](std::int64_t b) { return length_of(flags, seqlen, b); });
  };
  const auto starts = [&](std::int64_t seqlen) {
    return build.indices(flags.batch,
                         [&](std::int64_t b) { return seqlen - length_of(flags, seqlen, b); });
  };
  switch (flags.layout) {
    case Layout::dense: return;
    case Layout::padded:
      p.sequences.start_q = starts(seqlen_q);
      p.sequences.start_k = starts(seqlen_k);
      return;
    case Layout::packed:
      p.sequences.batch = flags.batch;
      p.sequences.cu_seqlens_q = build.cu_seqlens(seqlen_q);
      p.sequences.cu_seqlens_k = build.cu_seqlens(seqlen_k);
      p.sequences.max_seqlen_q = seqlen_q;
      p.sequences.max_seqlen_k = seqlen_k;
      return;
    case Layout::paged: {
      p.sequences.seqused_k = lengths(seqlen_k);
      p.paged.max_pages = (seqlen_k + flags.page_size - 1) / flags.page_size;
      const std::int64_t pages = flags.batch * p.paged.max_pages;
      // Descending, so that no two pages of an entry follow each other in memory.
      p.paged.page_table = build.indices(pages, [&](std::int64_t i) { return pages - 1 - i; });
      return;
    }
  }
}

// The first choice is the default.
template <class T>
void add_choice(CLI::App& verb, const std::string& name, T& value,
                const std::vector<std::pair<std::string, T>>& choices) {
  std::vector<std::string> names;
  for (const auto& [choice, unused] : choices) names.push_back(choice);
  verb.add_option_function<std::string>(name,
                                        [&value, choices](const std::string& given) {
                                          for (const auto& [choice, chosen] : choices)
                                            if (choice == given) value = chosen;
                                        })
      ->check(CLI::IsMember(names))
      ->default_str(names.front());
}

}  // namespace

void ProblemFlags::add_to(CLI::App& verb) {
  add_choice<Direction>(verb, "--pass", pass,
                        {{"forward", Direction::forward}, {"backward", Direction::backward}});
  add_choice<DType>(
      verb, "--dtype", dtype,
      {{"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}, {"f64", DType::f64}});
  add_choice<Layout>(verb, "--layout", layout,
                     {{"dense", Layout::dense},
                      {"padded", Layout::padded},
                      {"packed", Layout::packed},
                      {"paged", Layout::paged}});
  verb.add_option("--fill", fill, "mean length of an entry, as a share of the seqlen")
      ->check(CLI::Range(0.0, 1.0));
  verb.add_option("--batch", batch)->check(CLI::NonNegativeNumber);
  verb.add_option("--seqlen-q", seqlen_q)->check(CLI::NonNegativeNumber);
  verb.add_option("--seqlen-k", seqlen_k, "0: as --seqlen-q")->check(CLI::NonNegativeNumber);
  verb.add_option("--heads-q", heads_q)->check(CLI::NonNegativeNumber);
  verb.add_option("--heads-k", heads_k, "0: as --heads-q")->check(CLI::NonNegativeNumber);
  verb.add_option("--head-dim", head_dim)->check(CLI::NonNegativeNumber);
  verb.add_option("--head-dim-v", head_dim_v, "0: as --head-dim")->check(CLI::NonNegativeNumber);
  verb.add_option("--page-size", page_size)->check(CLI::PositiveNumber);
  verb.add_flag("--causal", causal);
  verb.add_option("--window", window, "causal; a row sees itself and this many keys before it");
  verb.add_option("--chunk", chunk, "causal; a row sees its own chunk of this many keys");
  verb.add_option("--scale", scale, "0: 1 / sqrt(head_dim)");
  verb.add_option("--softcap", softcap, "0: none");
  verb.add_option("--dropout", dropout, "probability");
  verb.add_flag("--sink", sink, "one more logit per row");
  verb.add_flag("--bias", bias, "a tensor [1, heads_q, seqlen_q, seqlen_k] of the dtype");
  verb.add_option("--splits", splits, "of the keys, for decode; 0: chosen from the shape");
  verb.add_option("--force", force, "a kernel's name, or how it begins");
}

Options ProblemFlags::options() const {
  return {
      .splits = splits, .deterministic = true, .force = force.empty() ? nullptr : force.c_str()};
}

Band ProblemFlags::band() const {
  Band band = causal || window >= 0 || chunk > 0 ? kCausal : kFull;
  if (window >= 0) band.left = window;
  band.chunk = chunk;
  return band;
}

std::string ProblemFlags::text() const {
  const auto or_else = [](std::int64_t x, std::int64_t y) { return x > 0 ? x : y; };
  const char* layouts[] = {"dense", "padded", "packed", "paged"};
  std::string text = fmt::format(
      "{} {} {} B{} H{}/{} S{}/{} D{}/{}", pass == Direction::forward ? "forward" : "backward",
      name_of(dtype), layouts[static_cast<int>(layout)], batch, heads_q, or_else(heads_k, heads_q),
      seqlen_q, or_else(seqlen_k, seqlen_q), head_dim, or_else(head_dim_v, head_dim));
  if (band().right == 0) text += " causal";
  if (window >= 0) text += fmt::format(" window {}", window);
  if (chunk > 0) text += fmt::format(" chunk {}", chunk);
  if (softcap > 0) text += fmt::format(" softcap {}", softcap);
  if (dropout > 0) text += fmt::format(" dropout {}", dropout);
  if (sink) text += " sink";
  if (bias) text += " bias";
  if (layout != Layout::dense) text += fmt::format(" fill {}", fill);
  return text;
}

void Arena::Free::operator()(void* data) const { std::free(data); }

void* Arena::take(std::int64_t bytes) {
  const std::size_t rounded = (static_cast<std::size_t>(bytes) / 64 + 1) * 64;
  if (real_) {
    blocks_.emplace_back(std::aligned_alloc(64, rounded));
    if (blocks_.back() == nullptr) fail(fmt::format("{} bytes of memory are not there", rounded));
    return blocks_.back().get();
  }
  void* data = reinterpret_cast<void*>(next_);
  next_ += rounded;
  return data;
}

Problem make_problem(const ProblemFlags& flags, Arena& arena) {
  const std::int64_t seqlen_q = flags.seqlen_q;
  const std::int64_t seqlen_k = flags.seqlen_k > 0 ? flags.seqlen_k : seqlen_q;
  const std::int64_t heads_k = flags.heads_k > 0 ? flags.heads_k : flags.heads_q;
  const std::int64_t head_dim_v = flags.head_dim_v > 0 ? flags.head_dim_v : flags.head_dim;
  const bool packed = flags.layout == Layout::packed;
  Builder build(flags, arena);
  const std::int64_t rows_q = packed ? build.total(seqlen_q) : seqlen_q;
  const std::int64_t rows_k = packed ? build.total(seqlen_k) : seqlen_k;

  Problem made;
  ForwardProblem& p = made.forward;
  place_tokens(flags, build, seqlen_q, seqlen_k, p);
  const auto keys = [&](std::int64_t dim) {
    return flags.layout == Layout::paged
               ? build.pages(flags.batch * p.paged.max_pages, heads_k, dim)
               : build.tensor(rows_k, heads_k, dim, packed);
  };
  const auto queries = [&](std::int64_t dim) {
    return build.tensor(rows_q, flags.heads_q, dim, packed);
  };
  p.q = queries(flags.head_dim);
  p.k = keys(flags.head_dim);
  p.v = keys(head_dim_v);
  p.out = queries(head_dim_v);
  const std::int64_t rows = (packed ? 1 : flags.batch) * flags.heads_q * rows_q;
  p.lse = static_cast<float*>(build.numbers(DType::f32, rows));
  p.band = flags.band();
  if (flags.scale != 0.f) p.score.scale = flags.scale;
  p.score.softcap = flags.softcap;
  if (flags.sink) p.sink = static_cast<float*>(build.numbers(DType::f32, flags.heads_q));
  if (flags.bias)
    p.bias =
        contiguous(build.numbers(flags.dtype, flags.heads_q * seqlen_q * seqlen_k), flags.dtype,
                   std::array<std::int64_t, 4>{1, flags.heads_q, seqlen_q, seqlen_k});
  p.dropout.probability = flags.dropout;
  p.dropout.seed = static_cast<std::uint64_t*>(build.numbers(DType::f64, 1));
  if (flags.pass == Direction::forward) return made;

  made.backward.dout = queries(head_dim_v);
  made.backward.dq = queries(flags.head_dim);
  made.backward.dk = keys(flags.head_dim);
  made.backward.dv = keys(head_dim_v);
  if (flags.sink)
    made.backward.dsink = static_cast<float*>(build.numbers(DType::f32, flags.heads_q));
  made.backward.forward = p;
  return made;
}

Cost cost_of(const ForwardProblem& p, Direction pass) {
  double pairs = 0, tokens_q = 0, tokens_k = 0;
  for (int entry = 0; entry < batch_entries(p); ++entry) {
    const SequenceSlice at = slice_of(p, entry);
    tokens_q += at.q.length;
    tokens_k += at.k.length;
    for (int row = 0; row < at.q.length; ++row) {
      const RowLimits keys = row_limits(p.band, at, p.intervals, row);
      pairs += keys.end - keys.first;
    }
  }
  const auto dim = static_cast<double>(p.q.head_dim()), dim_v = static_cast<double>(p.v.head_dim());
  const auto heads_q = static_cast<double>(p.q.heads()), heads_k = static_cast<double>(p.k.heads());
  const bool backward = pass == Direction::backward;
  // Products of a pair: S and out; backward S, dP, dv, dq and dk. Tensors: q, k, v, out; backward
  // those and their gradients.
  const double per_pair = backward ? 3 * dim + 2 * dim_v : dim + dim_v;
  const double elements = (dim + dim_v) * (tokens_q * heads_q + tokens_k * heads_k);
  return {2 * pairs * heads_q * per_pair,
          (backward ? 2 : 1) * elements * static_cast<double>(size_of(p.q.dtype))};
}

}  // namespace heed::tool
