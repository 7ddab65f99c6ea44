// What heed computes, as textbook fp64 loops, and how far a kernel's rounding may move each result.
//
// Every result is gathered: for one output element, the sum over everything that reaches it.
//
//   S_ij    = scale q_i·k_j;  with a softcap: softcap tanh(S_ij / softcap);  then + bias_ij
//   lse_i   = log(sum_j exp S_ij + exp sink)
//   P_ij    = exp(S_ij - lse_i)
//   keep_ij = 1, or with dropout 0 or 1 / (1 - p)
//   out_i   = sum_j keep_ij P_ij v_j
//
//   dP_ij   = keep_ij dout_i·v_j
//   delta_i = dout_i·out_i - dlse_i
//   dS_ij   = P_ij (dP_ij - delta_i)
//   dq_i    = scale sum_j slope_ij dS_ij k_j
//   dk_j    = scale sum_i slope_ij dS_ij q_i
//   dv_j    = sum_i keep_ij P_ij dout_i
//   dbias   = sum of dS_ij over the broadcast axes
//   dsink   = -sum_i exp(sink - lse_i) delta_i
//
// where j runs over the keys that row i sees and slope is dS / d(scale * q·k), 1 without softcap.
// The variances are first order in the roundings; docs/numerics.md derives them.
#include "cpu/reference.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "core/half.hpp"
#include "core/philox.hpp"
#include "core/sequence.hpp"
#include "core/workspace.hpp"
#include "cpu/rounded_sums.hpp"

namespace heed {

double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::f64: return 0x1p-53;
    case DType::f32: return 0x1p-24;
    case DType::bf16: return 0x1p-8;
    case DType::f16: return 0x1p-11;
    case DType::boolean: break;
  }
  return 0;
}

namespace {

double smallest_number(DType dtype) {
  switch (dtype) {
    case DType::f64: return std::numeric_limits<double>::denorm_min();
    case DType::f32: return 0x1p-149;
    case DType::bf16: return 0x1p-133;
    case DType::f16: return 0x1p-24;
    case DType::boolean: break;
  }
  return 0;
}

}  // namespace

Rounding rounding_of(const KernelRow& row) {
  Rounding r{.tensor = unit_roundoff(row.dtype), .smallest = smallest_number(row.dtype)};
  if (row.arch == Arch::reference) return r;
  r.operand = unit_roundoff(row.operand);
  r.delta = r.tensor;
  // BFDOT rounds its sums to odd: the error is spread over two spacings, and still without bias.
  const bool odd = row.arch == Arch::neon_bf16 && row.dtype == DType::bf16;
  // Tensor cores cut sums off: on an H100 a score of 182 from 240 products was 16 spacings short.
  const bool cut = row.arch >= Arch::sm80;
  r.accumulate = odd || cut ? 0x1p-23 : 0x1p-24;
  r.exp_ulp = 2;
  r.tanh_ulp = 4;
  r.flush = row.operand == DType::f16 ? 0x1p-24 : 0x1p-125;
  return r;
}

namespace {

using namespace sums;

// lse, dbias and dsink are always fp32.
double float_variance(double value) { return rho(0x1p-24) * square(value) + square(0x1p-149); }

constexpr double kNothing = -std::numeric_limits<double>::infinity();  // the log of an empty sum

template <class T>
T narrow(double x) {
  return from_float<T>(static_cast<float>(x));
}
template <>
double narrow<double>(double x) {
  return x;
}

// The score of one row and key.
struct Logit {
  int key;
  double value;     // S
  double slope;     // dS / d(scale * q·k)
  double variance;  // of S and of the exponent made from it
  double slope_variance;
  double size;  // scale * sum_c |q_c k_c|
};

// What the backward has to know about a row.
struct RowStats {
  double lse;
  double lse_variance;
  double delta;  // out·dout - dlse
  double delta_variance;
};

ChannelSums channel_sums(WorkspaceLayout& memory, std::int64_t channels) {
  double* all = memory.add<double>(3 * channels);
  const auto part = [&](std::int64_t i) { return all == nullptr ? nullptr : all + i * channels; };
  return {part(0), part(1), part(2), channels, 0};
}

struct Scratch {
  Logit* logits;          // of one row
  ChannelSums sums;       // of one row of out, dq or dk
  ChannelSums more_sums;  // of one row of dv, or of what dq adds up over delta's error
  RowStats* rows;         // indexed as lse; backward only

  Scratch(WorkspaceLayout& memory, const ForwardProblem& p, bool backward)
      : logits(memory.add<Logit>(max_seqlen_k(p))),
        sums(channel_sums(memory, std::max(p.q.head_dim(), p.v.head_dim()))),
        more_sums(channel_sums(memory, std::max(p.q.head_dim(), p.v.head_dim()))),
        rows(!backward ? nullptr : memory.add<RowStats>(p.q.batch() * p.q.heads() * p.q.seqlen())) {
  }
};

// Where a result goes: the tensor of a registry row, or the arrays of the oracle.
template <class T>
struct Target {
  TensorView tensor;
  Expected expected;

  explicit operator bool() const { return tensor || expected.value || expected.variance; }

  // One element by its logical coordinates; `batch` is 0 when packed.
  void put(std::int64_t batch, std::int64_t token, std::int64_t head, std::int64_t channel,
           double value, double variance) const {
    const TensorView& t = tensor;
    const std::int64_t index =
        ((batch * t.seqlen() + token) * t.heads() + head) * t.head_dim() + channel;
    if (t.data != nullptr)
      static_cast<T*>(t.data)[batch * t.batch_stride() + token * t.seqlen_stride() +
                              head * t.head_stride() + channel] = narrow<T>(value);
    if (expected.value != nullptr) expected.value[index] = value;
    if (expected.variance != nullptr) expected.variance[index] = variance;
  }
  void clear() const {
    if (!*this) return;
    for (std::int64_t b = 0; b < tensor.batch(); ++b)
      for (std::int64_t t = 0; t < tensor.seqlen(); ++t)
        for (std::int64_t h = 0; h < tensor.heads(); ++h)
          for (std::int64_t c = 0; c < tensor.head_dim(); ++c) put(b, t, h, c, 0, 0);
  }
};

// A tensor's shape without its memory.
TensorView shape_only(TensorView tensor) {
  tensor.data = nullptr;
  return tensor;
}

template <class T>
struct Reference {
  const ForwardProblem& p;
  const Rounding& rounding;
  Scratch& scratch;
  double scale =
      p.score.scale ? double{*p.score.scale} : 1 / std::sqrt(static_cast<double>(p.q.head_dim()));
  double softcap = double{p.score.softcap};
  double w = rounding.accumulate;
  int entries = static_cast<int>(batch_entries(p));
  std::int64_t heads = p.q.heads();
  std::int64_t group = p.k.heads() == 0 ? 1 : heads / p.k.heads();

  // ---- the problem's elements ----

  static const T* row_at(const ConstTensorView& x, const SideSlice& at, std::int64_t head,
                         std::int64_t row) {
    return static_cast<const T*>(x.data) + at.batch * x.batch_stride() +
           (at.token + row) * x.seqlen_stride() + head * x.head_stride();
  }

  // nullptr: the key's page is unmapped.
  const T* key_at(const ConstTensorView& x, const SequenceSlice& at, std::int64_t head,
                  int key) const {
    if (p.paged.page_table == nullptr) return row_at(x, at.k, head / group, key);
    const std::int64_t page_size = x.shape[1];
    const std::int64_t page = p.paged.page_table[at.entry * p.paged.max_pages + key / page_size];
    if (page < 0 || page >= x.shape[0]) return nullptr;
    return static_cast<const T*>(x.data) + page * x.stride[0] + key % page_size * x.stride[1] +
           head / group * x.stride[2];
  }

  // What is added to the score of a row and key; -inf hides the key.
  double bias_at(const SequenceSlice& at, std::int64_t head, int row, int key) const {
    if (!p.bias) return 0;
    std::int64_t i = at.k.slot + key;
    if (p.bias.shape[0] != 1) i += at.entry * p.bias.stride[0];
    if (p.bias.shape[1] != 1) i += head * p.bias.stride[1];
    if (p.bias.shape[2] != 1) i += (at.q.slot + row) * p.bias.stride[2];
    switch (p.bias.dtype) {
      case DType::f64: return static_cast<const double*>(p.bias.data)[i];
      case DType::f32: return wide(static_cast<const float*>(p.bias.data)[i]);
      case DType::bf16: return wide(static_cast<const bf16*>(p.bias.data)[i]);
      case DType::f16: return wide(static_cast<const f16*>(p.bias.data)[i]);
      case DType::boolean:
        return static_cast<const std::uint8_t*>(p.bias.data)[i] != 0 ? 0 : kNothing;
    }
    return 0;
  }

  bool sees(const SequenceSlice& at, std::int64_t head, int row, int key) const {
    const std::int64_t position = row + at.diagonal();
    const Band& band = p.band;
    if (key < position - band.left || key > position + band.right) return false;
    if (band.chunk > 0) {
      const double chunk = std::floor(static_cast<double>(position) / band.chunk);
      if (key < chunk * band.chunk) return false;
    }
    const std::int64_t slot = at.k.slot + key;
    if (p.intervals.rows != nullptr) {
      const std::int32_t* interval =
          p.intervals.rows + at.q.batch * p.intervals.rows_batch_stride + 2 * (at.q.token + row);
      if (slot < interval[0] || slot >= interval[1]) return false;
    }
    if (p.intervals.bits != nullptr) {
      if (slot / 32 >= p.intervals.bits_words) return false;
      const std::uint32_t word =
          p.intervals.bits[at.entry * p.intervals.bits_batch_stride + slot / 32];
      if ((word >> (slot % 32) & 1) == 0) return false;
    }
    if (key_at(p.k, at, head, key) == nullptr) return false;
    return bias_at(at, head, row, key) != kNothing;
  }

  double sink_of(std::int64_t head) const {
    return p.sink != nullptr ? wide(p.sink[head]) : kNothing;
  }

  // What dropout multiplies P by.
  double keep(const SequenceSlice& at, std::int64_t head, int row, int key) const {
    const float probability = p.dropout.probability;
    if (probability == 0) return 1;
    const PhiloxBlock words =
        dropout_words(*p.dropout.seed, at.entry, static_cast<int>(head), row, key / 4);
    const bool kept = words[static_cast<std::size_t>(key % 4)] >= dropout_threshold(probability);
    return kept ? 1 / (1 - double{probability}) : 0;
  }

  // ---- forward ----

  Logit logit(const SequenceSlice& at, std::int64_t head, int row, int key) const {
    const std::int64_t head_dim = p.q.head_dim();
    const Dot qk = dot(row_at(p.q, at.q, head, row), key_at(p.k, at, head, key), head_dim);
    Logit s{.key = key,
            .value = scale * qk.value,
            .slope = 1,
            .variance = 0,
            .slope_variance = 0,
            .size = scale * qk.size};
    s.variance = square(scale) * qk.variance(w, static_cast<int>(head_dim)) + square(w * s.value);
    if (softcap > 0) {
      const double t = std::tanh(s.value / softcap);
      s.value = softcap * t;
      s.slope = 1 - t * t;
      s.slope_variance = square(2 * t) * (square(w * rounding.tanh_ulp * t) +
                                          square(s.slope / softcap) * s.variance) +
                         square(w * s.slope);
      s.variance = square(s.slope) * s.variance + square(w * rounding.tanh_ulp * s.value);
    }
    if (p.bias) {
      const double bias = bias_at(at, head, row, key);
      s.value += bias;
      s.variance += square(w) * (square(bias) + square(s.value));
    }
    s.variance += square(w) * (square(s.value) + square(rounding.exp_ulp));
    return s;
  }

  // The scores of a row's visible keys, in scratch.logits; returns how many.
  int logits_of(const SequenceSlice& at, std::int64_t head, int row) const {
    int count = 0;
    for (int key = 0; key < at.k.length; ++key)
      if (sees(at, head, row, key)) scratch.logits[count++] = logit(at, head, row, key);
    return count;
  }

  // What the sink's own exponential adds to the relative variance of a row's sum.
  double sink_variance(std::int64_t head, double lse) const {
    const double sink = sink_of(head);
    if (sink == kNothing) return 0;
    return square(std::exp(sink - lse) * w) * (2 * square(sink) + square(rounding.exp_ulp));
  }

  // Logarithm of the sum of the row's exponentials, and its variance.
  RowStats softmax(std::int64_t head, int count) const {
    const double sink = sink_of(head);
    if (count == 0 && sink == kNothing)
      return {.lse = kNothing, .lse_variance = 0, .delta = 0, .delta_variance = 0};
    double max = sink;
    for (int i = 0; i < count; ++i) max = std::max(max, scratch.logits[i].value);
    double sum = std::exp(sink - max);
    for (int i = 0; i < count; ++i) sum += std::exp(scratch.logits[i].value - max);
    const double lse = max + std::log(sum);
    double variance = square(w) * (square(lse) + square(max) + 4) + float_variance(lse);
    for (int i = 0; i < count; ++i)
      variance += square(std::exp(scratch.logits[i].value - lse)) * scratch.logits[i].variance;
    variance += sink_variance(head, lse);
    return {.lse = lse, .lse_variance = variance, .delta = 0, .delta_variance = 0};
  }

  // Variance of keep * P when it is multiplied: exponent, rounding to the operand, underflow.
  double weight_variance(double weight, const Logit& s) const {
    return square(weight) * (rho(rounding.operand) + s.variance) + square(rounding.flush);
  }

  // Adds up out of one row in scratch.sums.
  void accumulate_out(const SequenceSlice& at, std::int64_t head, int row, int count,
                      const RowStats& stats) const {
    scratch.sums.channels = p.v.head_dim();
    scratch.sums.clear();
    for (int i = 0; i < count; ++i) {
      const Logit& s = scratch.logits[i];
      const double weight = std::exp(s.value - stats.lse) * keep(at, head, row, s.key);
      scratch.sums.add(weight, weight_variance(weight, s), key_at(p.v, at, head, s.key));
    }
  }

  // The part of out's relative variance that comes from the row's normaliser.
  double normaliser_variance(std::int64_t head, int count, const RowStats& stats) const {
    double variance = 4 * square(w) + sink_variance(head, stats.lse);
    for (int i = 0; i < count; ++i)
      variance +=
          square(std::exp(scratch.logits[i].value - stats.lse)) * scratch.logits[i].variance;
    return variance;
  }

  void forward(const Target<T>& out, float* lse, const ForwardExpected& expected) const {
    out.clear();
    const std::int64_t rows = p.q.batch() * heads * p.q.seqlen();
    for (std::int64_t i = 0; i < rows; ++i) put_lse(i, kNothing, 0, 0, lse, expected);
    for (int entry = 0; entry < entries; ++entry) {
      const SequenceSlice at = slice_of(p, entry);
      for (std::int64_t head = 0; head < heads; ++head)
        for (int row = 0; row < at.q.length; ++row) {
          const int count = logits_of(at, head, row);
          const RowStats stats = softmax(head, count);
          double size = 0;
          for (int i = 0; i < count; ++i) size = std::max(size, scratch.logits[i].size);
          put_lse(lse_index(p, at, static_cast<int>(head), row), stats.lse, stats.lse_variance,
                  size, lse, expected);
          if (count == 0) continue;
          accumulate_out(at, head, row, count, stats);
          const double normaliser = normaliser_variance(head, count, stats);
          for (std::int64_t c = 0; c < p.v.head_dim(); ++c) {
            const double value = scratch.sums.value[c];
            out.put(at.q.batch, at.q.token + row, head, c, value,
                    scratch.sums.total_variance(c, w) +
                        square(value) * (normaliser + rho(rounding.tensor)) + floor_variance());
          }
        }
    }
  }

  static void put_lse(std::int64_t index, double value, double variance, double size, float* lse,
                      const ForwardExpected& expected) {
    if (lse != nullptr) lse[index] = static_cast<float>(value);
    if (expected.lse.value != nullptr) expected.lse.value[index] = value;
    if (expected.lse.variance != nullptr) expected.lse.variance[index] = variance;
    if (expected.score_size != nullptr) expected.score_size[index] = size;
  }

  // Rounding among the tensors' smallest numbers, and results flushed to zero.
  double floor_variance() const { return square(rounding.smallest) + square(rounding.flush); }

  // ---- backward ----

  const ConstTensorView* dout = nullptr;
  const float* dlse = nullptr;

  // The gradient of the score of one row and key.
  struct Gradient {
    double probability;  // P
    double weight;       // keep * P
    double weight_variance;
    double dbias;           // dS
    double dbias_variance;  // of what no other key of the row shares
    double dscore;          // slope * dS
    double dscore_variance;
    double per_delta;  // slope * P = -d dscore / d delta
  };

  Gradient gradient(const SequenceSlice& at, std::int64_t head, int row, const Logit& s,
                    const RowStats& stats) const {
    const std::int64_t head_dim_v = p.v.head_dim();
    const Dot gv = dot(row_at(*dout, at.q, head, row), key_at(p.v, at, head, s.key), head_dim_v);
    const double probability = std::exp(s.value - stats.lse);
    const double kept = keep(at, head, row, s.key);
    const double dprobability = kept * gv.value;
    Gradient g;
    g.probability = probability;
    g.weight = probability * kept;
    g.weight_variance = weight_variance(g.weight, s);
    g.dbias = probability * (dprobability - stats.delta);
    g.dbias_variance =
        square(g.dbias) * s.variance + square(rounding.flush) +
        square(probability) * (square(kept) * gv.variance(w, static_cast<int>(head_dim_v)) +
                               square(w) * (square(dprobability) + square(stats.delta)));
    g.dscore = g.dbias * s.slope;
    g.dscore_variance = square(s.slope) * g.dbias_variance + square(g.dbias) * s.slope_variance +
                        square(g.dscore) * rho(rounding.operand) + square(rounding.flush);
    g.per_delta = probability * s.slope;
    return g;
  }

  // lse, delta and their variances for one row.
  RowStats row_stats(const SequenceSlice& at, std::int64_t head, int row) const {
    const int count = logits_of(at, head, row);
    RowStats stats = softmax(head, count);
    if (dlse != nullptr) stats.delta = -wide(dlse[lse_index(p, at, static_cast<int>(head), row)]);
    if (count == 0) return stats;
    accumulate_out(at, head, row, count, stats);
    const std::int64_t head_dim_v = p.v.head_dim();
    const T* g = row_at(*dout, at.q, head, row);
    const double* out = scratch.sums.value;
    const Dot og = dot(out, g, head_dim_v);
    stats.delta += og.value;
    stats.delta_variance = og.variance(w, static_cast<int>(head_dim_v)) +
                           square(w) * (4 * square(og.value) + square(stats.delta));
    if (rounding.delta == 0) return stats;
    // Errors of out: each key's weight moves all channels at once, additions and rounding one each.
    for (int i = 0; i < count; ++i) {
      const Logit& s = scratch.logits[i];
      const double weight = std::exp(s.value - stats.lse);
      const double kept = keep(at, head, row, s.key);
      const double dprobability = kept * dot(g, key_at(p.v, at, head, s.key), head_dim_v).value;
      stats.delta_variance += square(weight) * (square(dprobability) * rho(rounding.operand) +
                                                square(dprobability - og.value) * s.variance);
    }
    for (std::int64_t c = 0; c < head_dim_v; ++c) {
      const double additions =
          w * w * scratch.sums.terms / 3 * (square(out[c]) + scratch.sums.squares[c]);
      stats.delta_variance += square(wide(g[c])) *
                              (additions + square(out[c]) * rho(rounding.delta) + floor_variance());
    }
    return stats;
  }

  RowStats& stats_at(const SequenceSlice& at, std::int64_t head, int row) const {
    return scratch.rows[lse_index(p, at, static_cast<int>(head), row)];
  }

  void backward(const Target<T>& dq, const Target<T>& dk, const Target<T>& dv,
                const Target<float>& dbias, float* dsink, const Expected& expected_dsink) const {
    for (const Target<T>* target : {&dq, &dk, &dv}) target->clear();
    for (int entry = 0; entry < entries; ++entry) {
      const SequenceSlice at = slice_of(p, entry);
      for (std::int64_t head = 0; head < heads; ++head)
        for (int row = 0; row < at.q.length; ++row) {
          stats_at(at, head, row) = row_stats(at, head, row);
          put_dq(dq, at, head, row);
        }
      for (std::int64_t head = 0; head < p.k.heads(); ++head)
        for (int key = 0; key < at.k.length; ++key) put_dk_dv(dk, dv, at, head, key);
    }
    if (dbias) put_dbias(dbias);
    if (dsink != nullptr || expected_dsink.value != nullptr) put_dsink(dsink, expected_dsink);
  }

  void put_dq(const Target<T>& dq, const SequenceSlice& at, std::int64_t head, int row) const {
    if (!dq) return;
    const RowStats& stats = stats_at(at, head, row);
    ChannelSums& sums = scratch.sums;
    ChannelSums& per_delta = scratch.more_sums;
    for (ChannelSums* s : {&sums, &per_delta}) {
      s->channels = p.q.head_dim();
      s->clear();
    }
    for (int key = 0; key < at.k.length; ++key) {
      if (!sees(at, head, row, key)) continue;
      const Gradient g = gradient(at, head, row, logit(at, head, row, key), stats);
      const T* k = key_at(p.k, at, head, key);
      sums.add(scale * g.dscore, square(scale) * g.dscore_variance, k);
      per_delta.add(scale * g.per_delta, 0, k);
    }
    if (sums.terms == 0) return;
    for (std::int64_t c = 0; c < p.q.head_dim(); ++c) {
      const double value = sums.value[c];
      dq.put(at.q.batch, at.q.token + row, head, c, value,
             sums.total_variance(c, w) + square(per_delta.value[c]) * stats.delta_variance +
                 square(value) * (stats.lse_variance + rho(rounding.tensor)) + floor_variance());
    }
  }

  void put_dk_dv(const Target<T>& dk, const Target<T>& dv, const SequenceSlice& at,
                 std::int64_t head_k, int key) const {
    ChannelSums& sums_k = scratch.sums;
    ChannelSums& sums_v = scratch.more_sums;
    sums_k.channels = p.k.head_dim();
    sums_v.channels = p.v.head_dim();
    sums_k.clear();
    sums_v.clear();
    for (std::int64_t head = head_k * group; head < (head_k + 1) * group; ++head)
      for (int row = 0; row < at.q.length; ++row) {
        if (!sees(at, head, row, key)) continue;
        const RowStats& stats = stats_at(at, head, row);
        const Gradient g = gradient(at, head, row, logit(at, head, row, key), stats);
        sums_k.add(scale * g.dscore,
                   square(scale) * (g.dscore_variance + square(g.per_delta) * stats.delta_variance +
                                    square(g.dscore) * stats.lse_variance),
                   row_at(p.q, at.q, head, row));
        sums_v.add(g.weight, g.weight_variance + square(g.weight) * stats.lse_variance,
                   row_at(*dout, at.q, head, row));
      }
    const auto put = [&](const Target<T>& target, const ChannelSums& sums) {
      if (!target || sums.terms == 0) return;
      for (std::int64_t c = 0; c < sums.channels; ++c)
        target.put(at.k.batch, at.k.token + key, head_k, c, sums.value[c],
                   sums.total_variance(c, w) + square(sums.value[c]) * rho(rounding.tensor) +
                       floor_variance());
    };
    put(dk, sums_k);
    put(dv, sums_v);
  }

  // Everything that read element (b, h, r, slot) of the bias.
  void put_dbias(const Target<float>& dbias) const {
    const auto& shape = dbias.tensor.shape;
    for (std::int64_t b = 0; b < shape[0]; ++b)
      for (std::int64_t h = 0; h < shape[1]; ++h)
        for (std::int64_t r = 0; r < shape[2]; ++r)
          for (std::int64_t slot = 0; slot < shape[3]; ++slot) {
            Sum sum;
            for (int entry = 0; entry < entries; ++entry) {
              if (shape[0] != 1 && entry != b) continue;
              const SequenceSlice at = slice_of(p, entry);
              const std::int64_t key = slot - at.k.slot;
              if (key < 0 || key >= at.k.length) continue;
              for (std::int64_t head = 0; head < heads; ++head) {
                if (shape[1] != 1 && head != h) continue;
                for (int row = 0; row < at.q.length; ++row) {
                  if (shape[2] != 1 && at.q.slot + row != r) continue;
                  if (!sees(at, head, row, static_cast<int>(key))) continue;
                  const RowStats& stats = stats_at(at, head, row);
                  const Gradient g =
                      gradient(at, head, row, logit(at, head, row, static_cast<int>(key)), stats);
                  sum.add(g.dbias, g.dbias_variance + square(g.probability) * stats.delta_variance +
                                       square(g.dbias) * stats.lse_variance);
                }
              }
            }
            const double variance =
                sum.terms == 0
                    ? 0
                    : sum.total_variance(w) + float_variance(sum.value) + square(rounding.flush);
            dbias.put(b, h, r, slot, sum.value, variance);
          }
  }

  void put_dsink(float* dsink, const Expected& expected) const {
    for (std::int64_t head = 0; head < heads; ++head) {
      const double sink = sink_of(head);
      Sum sum;
      for (int entry = 0; entry < entries && sink != kNothing; ++entry) {
        const SequenceSlice at = slice_of(p, entry);
        for (int row = 0; row < at.q.length; ++row) {
          const RowStats& stats = stats_at(at, head, row);
          const double probability = std::exp(sink - stats.lse);
          sum.add(-probability * stats.delta,
                  square(probability) * (stats.delta_variance +
                                         square(stats.delta) * (stats.lse_variance +
                                                                square(w) * (4 + square(sink)))) +
                      square(rounding.flush));
        }
      }
      if (dsink != nullptr) dsink[head] = static_cast<float>(sum.value);
      if (expected.value != nullptr) expected.value[head] = sum.value;
      if (expected.variance != nullptr)
        expected.variance[head] = sum.total_variance(w) + float_variance(sum.value);
    }
  }
};

template <class T>
void forward(const ForwardProblem& p, const Rounding& rounding, const Target<T>& out, float* lse,
             const ForwardExpected& expected, Workspace memory) {
  WorkspaceLayout layout(memory);
  Scratch scratch(layout, p, false);
  Reference<T>{p, rounding, scratch}.forward(out, lse, expected);
}

template <class T>
void backward(const BackwardProblem& b, const Rounding& rounding, const Target<T>& dq,
              const Target<T>& dk, const Target<T>& dv, const Target<float>& dbias, float* dsink,
              const Expected& expected_dsink, Workspace memory) {
  WorkspaceLayout layout(memory);
  Scratch scratch(layout, b.forward, true);
  Reference<T> reference{b.forward, rounding, scratch};
  reference.dout = &b.dout;
  reference.dlse = b.dlse;
  reference.backward(dq, dk, dv, dbias, dsink, expected_dsink);
}

template <class Body>
void with_element(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f64: return body(double{});
    case DType::f32: return body(float{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
    case DType::boolean: return;
  }
}

// ---- registry rows: the same text, rounded to the tensors' type ----

template <class T>
Status run_forward(const Plan& plan, const ForwardProblem& p, Workspace memory, Queue) {
  forward<T>(p, rounding_of(*plan.row), {p.out, {}}, p.lse, {}, memory);
  return {};
}

template <class T>
Status run_backward(const Plan& plan, const BackwardProblem& b, Workspace memory, Queue) {
  backward<T>(b, rounding_of(*plan.row), {b.dq, {}}, {b.dk, {}}, {b.dv, {}}, {b.dbias, {}}, b.dsink,
              {}, memory);
  return {};
}

std::size_t forward_bytes(const Plan&, const ForwardProblem& p) { return reference_bytes(p); }
std::size_t backward_bytes(const Plan&, const BackwardProblem& b) { return reference_bytes(b); }

constexpr KernelRow row_of(Pass pass, DType dtype) {
  return {.arch = Arch::reference,
          .pass = pass,
          .dtype = dtype,
          .operand = DType::f64,
          .tile_m = 0,
          .tile_n = 0,
          .max_head_dim = 512,
          .max_query_rows = 0,
          .forward_bytes = nullptr,
          .forward = nullptr,
          .backward_bytes = nullptr,
          .backward = nullptr};
}

template <class T>
constexpr KernelRow forward_row(DType dtype) {
  KernelRow row = row_of(Pass::forward, dtype);
  row.forward_bytes = forward_bytes;
  row.forward = run_forward<T>;
  return row;
}

template <class T>
constexpr KernelRow backward_row(DType dtype) {
  KernelRow row = row_of(Pass::backward, dtype);
  row.backward_bytes = backward_bytes;
  row.backward = run_backward<T>;
  return row;
}

}  // namespace

std::size_t reference_bytes(const ForwardProblem& p) {
  WorkspaceLayout layout;
  Scratch(layout, p, false);
  return layout.bytes();
}

std::size_t reference_bytes(const BackwardProblem& b) {
  WorkspaceLayout layout;
  Scratch(layout, b.forward, true);
  return layout.bytes();
}

void reference(const ForwardProblem& p, const Rounding& rounding, const ForwardExpected& expected,
               Workspace scratch) {
  with_element(p.q.dtype, [&]<class T>(T) {
    forward<T>(p, rounding, {shape_only(p.out), expected.out}, nullptr, expected, scratch);
  });
}

void reference(const BackwardProblem& b, const Rounding& rounding, const BackwardExpected& expected,
               Workspace scratch) {
  with_element(b.forward.q.dtype, [&]<class T>(T) {
    backward<T>(b, rounding, {shape_only(b.dq), expected.dq}, {shape_only(b.dk), expected.dk},
                {shape_only(b.dv), expected.dv}, {shape_only(b.dbias), expected.dbias}, nullptr,
                expected.dsink, scratch);
  });
}

std::span<const KernelRow> cpu_reference_rows() {
  static constexpr std::array kRows{
      forward_row<double>(DType::f64),  forward_row<float>(DType::f32),
      forward_row<bf16>(DType::bf16),   forward_row<f16>(DType::f16),
      backward_row<double>(DType::f64), backward_row<float>(DType::f32),
      backward_row<bf16>(DType::bf16),  backward_row<f16>(DType::f16)};
  return kRows;
}

}  // namespace heed
