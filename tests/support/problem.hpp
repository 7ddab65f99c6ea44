// A problem as one line of data, and its tensors: poisoned, guarded, in any layout.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "core/sequence.hpp"
#include "heed/heed.hpp"
#include "support/buffer.hpp"
#include "support/random.hpp"

namespace heed::test {

enum class Layout { dense, packed, padded, paged };
enum class Inputs {
  gaussian,
  peaky,        // large q and k: few keys matter
  v_offset,     // v = 8 + noise: delta cancels
  outlier,      // one massive channel, LSE near -150 or +150
  equal,        // all keys the same
  q_zero,       // all scores 0, small integers in v
  planted_max,  // every 24th and the last key exceed all keys before
  descending,   // the first key is the largest
  lse_low,      // LSE near -120: exp of it underflows
  lse_high,     // LSE near +120: exp of it overflows
  softcap_saturating,
  denormal,    // numbers below the smallest normal one
  integers,    // small, exact
  duplicated,  // eight keys alike
  near_max,    // v up to the largest f16
};
inline constexpr int kInputKinds = 15;
const char* name_of(Inputs inputs);

enum class Sinks { none, minus_infinity, low, zero, high, dominant, mixed };
enum class BiasKind { none, boolean, f32, tensor };  // tensor: q's dtype

struct Shape {
  std::string name;
  std::vector<int> seqlens_q{1};  // one per batch entry
  std::vector<int> seqlens_k{1};
  int heads_q = 1;
  int heads_k = 1;
  int head_dim = 64;
  int head_dim_v = 0;  // 0: head_dim
  Layout layout_q = Layout::dense;
  Layout layout_k = Layout::dense;
  bool seqused = false;  // lengths by seqused; always so where a dense tensor is ragged
  int page_size = 16;
  Band band = kFull;
  std::optional<float> scale = std::nullopt;
  float softcap = 0;
  BiasKind bias = BiasKind::none;
  bool bias_batch = true;  // false: that axis is broadcast
  bool bias_heads = true;
  bool bias_rows = true;
  Sinks sinks = Sinks::none;
  float dropout = 0;
  bool intervals = false;
  bool key_bits = false;
  bool dlse = false;
  bool strided = false;  // heads before tokens, gaps, odd strides
  bool lse = true;       // whether the forward returns it
  Inputs inputs = Inputs::gaussian;
  int first_entry = 0;  // entry e holds the values of entry first_entry + e

  int dim_v() const { return head_dim_v != 0 ? head_dim_v : head_dim; }
  bool paged() const { return layout_k == Layout::paged; }
};
std::string describe(const Shape& shape);
inline void PrintTo(const Shape& shape, std::ostream* out) { *out << describe(shape); }
// Query-key pairs over all heads: what a reference run costs.
std::int64_t pairs_of(const Shape& shape);

enum class Input { q, k, v, dout, dlse, bias, sink };

// Where an input element is, counted from its entry's first token.
struct Place {
  int entry = 0;
  int token = 0;
  int head = 0;
  int channel = 0;  // bias: key
};
// Replaces an input value by another.
using Override = std::function<double(Input, Place, double)>;

// A tensor and its memory.
struct Tensor {
  Buffer buffer;
  TensorView view;
};

double load(DType dtype, const void* data, std::int64_t index);
void store(DType dtype, void* data, std::int64_t index, double value);

// Calls body(offset) for every element, row-major over the logical shape.
template <class Body>
void for_each_element(const TensorView& t, const Body& body) {
  const bool packed = t.rank == 3;
  const std::int64_t batch = t.batch(), seqlen = t.seqlen(), heads = t.heads();
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t s = 0; s < seqlen; ++s)
      for (std::int64_t h = 0; h < heads; ++h)
        for (std::int64_t c = 0; c < t.head_dim(); ++c)
          body((packed ? 0 : b * t.stride[0]) + s * t.seqlen_stride() + h * t.head_stride() + c);
}

// A view of the same shape whose rows begin at multiples of 8 elements, a gap after each axis.
template <class View>
View aligned_strides(View view) {
  std::int64_t stride = (view.head_dim() + 7) / 8 * 8;
  view.stride[static_cast<std::size_t>(view.rank - 1)] = 1;
  for (int d = view.rank - 2; d >= 0; --d) {
    const auto at = static_cast<std::size_t>(d);
    view.stride[at] = stride;
    stride = stride * (view.shape[at] > 1 ? view.shape[at] : 1) + 8;
  }
  return view;
}

class Problem {
 public:
  // The same shape, dtype and seed hold the same numbers and lengths whatever the poison.
  Problem(const Shape& shape, DType dtype, std::uint64_t seed, Poison poison = Poison::nan,
          const Override& override_value = {});
  Problem(const Problem&) = delete;

  const Shape shape;
  const DType dtype;
  const std::uint64_t seed;
  const Poison poison;
  ForwardProblem forward;
  BackwardProblem backward;  // its `forward` is a copy of the above
  std::vector<SideSlice> q_slices, k_slices;

  // Puts the prefill back into everything that run() writes.
  void reset_outputs();
  // What was touched that must not be; empty: nothing.
  std::string damage() const;

  // Elements of a tensor laid out as q (or k): entry by entry, token, head, channel.
  std::vector<double> tokens(const TensorView& view, const std::vector<SideSlice>& side) const;
  // Elements of lse: entry by entry, head, row.
  std::vector<double> lse_values() const;

 private:
  struct Side;
  Side make_side(bool is_q, Random& random);
  Tensor tensor(std::array<std::int64_t, 4> axes, int rank, DType type, Random& random,
                bool odd_heads);
  template <class T>
  const T* array(const std::vector<T>& values);
  void fill_tokens(Input which, const TensorView& view, const std::vector<SideSlice>& side);
  void make_masks(const Side& q, const Side& k);
  void make_bias(Random& random);
  double value(Input which, const Place& place) const;  // before the override

  const Override override_;
  std::vector<std::int32_t> pages_;  // [entry][max_pages]
  Tensor q_, k_, v_, out_, dout_, dq_, dk_, dv_, bias_, dbias_;
  Buffer lse_, dlse_, sink_, dsink_;
  std::vector<Buffer> arrays_;
  std::uint64_t dropout_seed_ = 0;
};

}  // namespace heed::test
