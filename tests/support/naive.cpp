#include "support/naive.hpp"

#include <cmath>

#include "core/mask.hpp"
#include "core/philox.hpp"
#include "core/sequence.hpp"
#include "support/problem.hpp"

namespace heed::test {
namespace {

class Composition {
 public:
  explicit Composition(const BackwardProblem& b, bool gradients)
      : b_(b), p_(b.forward), gradients_(gradients) {
    scale_ = p_.score.scale.value_or(1.f / std::sqrt(static_cast<float>(p_.q.head_dim())));
    result_.out.assign(static_cast<std::size_t>(p_.out.numel()), 0);
    if (!gradients) return;
    result_.dq.assign(static_cast<std::size_t>(p_.q.numel()), 0);
    result_.dk.assign(static_cast<std::size_t>(p_.k.numel()), 0);
    result_.dv.assign(static_cast<std::size_t>(p_.v.numel()), 0);
  }

  Naive run() {
    const std::int64_t group = p_.k.heads() == 0 ? 1 : p_.q.heads() / p_.k.heads();
    for (int entry = 0; entry < batch_entries(p_); ++entry) {
      const SequenceSlice at = slice_of(p_, entry);
      for (std::int64_t head_k = 0; head_k < p_.k.heads(); ++head_k) {
        const auto size = [&](std::int64_t dim) {
          return static_cast<std::size_t>(at.k.length * dim);
        };
        dk_.assign(size(p_.k.head_dim()), 0);
        dv_.assign(size(p_.v.head_dim()), 0);
        for (std::int64_t head = head_k * group; head < (head_k + 1) * group; ++head)
          for (int row = 0; row < at.q.length; ++row) add_row(at, head, head_k, row);
        if (gradients_) put_keys(at, head_k);
      }
    }
    return std::move(result_);
  }

 private:
  float round(float x) const {
    std::uint32_t memory = 0;
    if (p_.q.dtype == DType::f32 || p_.q.dtype == DType::f64) return x;
    store(p_.q.dtype, &memory, 0, double{x});
    return static_cast<float>(load(p_.q.dtype, &memory, 0));
  }

  std::vector<float> row_of(const ConstTensorView& x, const SideSlice& at, std::int64_t head,
                            std::int64_t row) const {
    return read(x, at.batch * x.batch_stride() + (at.token + row) * x.seqlen_stride() +
                       head * x.head_stride());
  }
  std::vector<float> key_of(const ConstTensorView& x, const SequenceSlice& at, std::int64_t head,
                            std::int64_t key) const {
    if (p_.paged.page_table == nullptr) return row_of(x, at.k, head, key);
    const std::int32_t page = p_.paged.page_table[at.entry * p_.paged.max_pages + key / x.shape[1]];
    return read(x, page * x.stride[0] + key % x.shape[1] * x.stride[1] + head * x.stride[2]);
  }
  static std::vector<float> read(const ConstTensorView& x, std::int64_t offset) {
    std::vector<float> row(static_cast<std::size_t>(x.head_dim()));
    for (std::size_t c = 0; c < row.size(); ++c)
      row[c] = static_cast<float>(load(x.dtype, x.data, offset + static_cast<std::int64_t>(c)));
    return row;
  }
  static float dot(const std::vector<float>& a, const std::vector<float>& b) {
    float sum = 0;
    for (std::size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
    return sum;
  }
  static std::size_t index(const ConstTensorView& x, const SideSlice& at, std::int64_t head,
                           std::int64_t row) {
    return static_cast<std::size_t>(((at.batch * x.seqlen() + at.token + row) * x.heads() + head) *
                                    x.head_dim());
  }

  float bias_of(const SequenceSlice& at, std::int64_t head, int row, int key) const {
    if (!p_.bias) return 0;
    const auto stride = [&](std::size_t d) {
      return p_.bias.shape[d] == 1 ? 0 : p_.bias.stride[d];
    };
    const double x = load(p_.bias.dtype, p_.bias.data,
                          at.entry * stride(0) + head * stride(1) + (at.q.slot + row) * stride(2) +
                              (at.k.slot + key) * p_.bias.stride[3]);
    if (p_.bias.dtype != DType::boolean) return static_cast<float>(x);
    return x != 0 ? 0.f : -INFINITY;
  }

  void add_row(const SequenceSlice& at, std::int64_t head, std::int64_t head_k, int row) {
    const std::vector<float> q = row_of(p_.q, at.q, head, row);
    const RowLimits limits = row_limits(p_.band, at, p_.intervals, row);
    std::vector<int> keys;
    std::vector<float> s, slope;
    float max = p_.sink != nullptr ? p_.sink[head] : -INFINITY;
    for (int key = limits.first; key < limits.end; ++key) {
      const float bias = bias_of(at, head, row, key);
      if (!key_valid(p_.intervals, at, key) || bias == -INFINITY) continue;
      float x = round(round(dot(q, key_of(p_.k, at, head_k, key))) * scale_);
      slope.push_back(1);
      if (p_.score.softcap > 0) {
        const float t = std::tanh(x / p_.score.softcap);
        slope.back() = 1 - t * t;
        x = round(p_.score.softcap * t);
      }
      keys.push_back(key);
      s.push_back(round(x + bias));
      max = std::max(max, s.back());
    }
    if (keys.empty()) return;
    float sum = p_.sink != nullptr ? std::exp(p_.sink[head] - max) : 0.f;
    for (const float x : s) sum += std::exp(x - max);
    std::vector<float> weight, kept;
    std::vector<float> out(static_cast<std::size_t>(p_.v.head_dim()), 0);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      weight.push_back(round(std::exp(s[i] - max) / sum));
      kept.push_back(keep(at, head, row, keys[i]));
      const std::vector<float> v = key_of(p_.v, at, head_k, keys[i]);
      const float factor = round(weight[i] * kept[i]);
      for (std::size_t c = 0; c < v.size(); ++c) out[c] += factor * v[c];
    }
    const std::size_t at_out = index(p_.out, at.q, head, row);
    for (std::size_t c = 0; c < out.size(); ++c) result_.out[at_out + c] = double{round(out[c])};
    if (gradients_) add_gradients(at, head, head_k, row, q, keys, slope, weight, kept);
  }

  void add_gradients(const SequenceSlice& at, std::int64_t head, std::int64_t head_k, int row,
                     const std::vector<float>& q, const std::vector<int>& keys,
                     const std::vector<float>& slope, const std::vector<float>& weight,
                     const std::vector<float>& kept) {
    const std::vector<float> g = row_of(b_.dout, at.q, head, row);
    std::vector<float> dp(keys.size());
    float delta =
        b_.dlse == nullptr ? 0.f : -b_.dlse[lse_index(p_, at, static_cast<int>(head), row)];
    for (std::size_t i = 0; i < keys.size(); ++i) {
      dp[i] = round(round(dot(g, key_of(p_.v, at, head_k, keys[i]))) * kept[i]);
      delta += weight[i] * dp[i];
    }
    std::vector<float> dq(q.size(), 0);
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const float ds = round(round(round(weight[i] * (dp[i] - delta)) * slope[i]) * scale_);
      const float factor = round(weight[i] * kept[i]);
      const std::vector<float> k = key_of(p_.k, at, head_k, keys[i]);
      const auto key = static_cast<std::size_t>(keys[i]);
      for (std::size_t c = 0; c < q.size(); ++c) {
        dq[c] += ds * k[c];
        dk_[key * q.size() + c] += ds * q[c];
      }
      for (std::size_t c = 0; c < g.size(); ++c) dv_[key * g.size() + c] += factor * g[c];
    }
    const std::size_t at_q = index(p_.q, at.q, head, row);
    for (std::size_t c = 0; c < q.size(); ++c) result_.dq[at_q + c] = double{round(dq[c])};
  }

  void put_keys(const SequenceSlice& at, std::int64_t head_k) {
    const auto put = [&](const ConstTensorView& x, const std::vector<float>& from,
                         std::vector<double>& to) {
      const auto width = static_cast<std::size_t>(x.head_dim());
      for (int key = 0; key < at.k.length; ++key)
        for (std::size_t c = 0; c < width; ++c)
          to[index(x, at.k, head_k, key) + c] =
              double{round(from[static_cast<std::size_t>(key) * width + c])};
    };
    put(p_.k, dk_, result_.dk);
    put(p_.v, dv_, result_.dv);
  }

  float keep(const SequenceSlice& at, std::int64_t head, int row, int key) const {
    const Dropout& dropout = p_.dropout;
    if (dropout.probability == 0) return 1;
    const PhiloxBlock words =
        dropout_words(*dropout.seed, at.entry, static_cast<int>(head), row, key / 4);
    return words[static_cast<std::size_t>(key % 4)] >= dropout_threshold(dropout.probability)
               ? 1 / (1 - dropout.probability)
               : 0.f;
  }

  const BackwardProblem& b_;
  const ForwardProblem& p_;
  const bool gradients_;
  float scale_ = 1;
  std::vector<float> dk_, dv_;
  Naive result_;
};

}  // namespace

Naive naive(const BackwardProblem& problem, bool gradients) {
  return Composition(problem, gradients).run();
}

}  // namespace heed::test
