#include "support/problem.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <sstream>

#include "core/half.hpp"

namespace heed::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

std::int64_t extent_in_memory(const TensorView& t) {
  std::int64_t last = 0;
  for (int d = 0; d < t.rank; ++d) {
    const auto at = static_cast<std::size_t>(d);
    if (t.shape[at] == 0) return 0;
    last += (t.shape[at] - 1) * t.stride[at];
  }
  return last + 1;
}

const char* name_of(Layout layout) {
  constexpr const char* kNames[] = {"dense", "packed", "padded", "paged"};
  return kNames[static_cast<int>(layout)];
}

}  // namespace

const char* name_of(Inputs inputs) {
  constexpr const char* kNames[kInputKinds] = {
      "gaussian", "peaky",       "v_offset",   "outlier",    "equal",
      "q_zero",   "planted_max", "descending", "lse_low",    "lse_high",
      "softcap",  "denormal",    "integers",   "duplicated", "near_max"};
  return kNames[static_cast<int>(inputs)];
}

std::string describe(const Shape& s) {
  std::ostringstream text;
  const auto lengths = [&](const std::vector<int>& all) {
    for (std::size_t i = 0; i < all.size(); ++i) text << (i == 0 ? "" : ",") << all[i];
    if (all.empty()) text << "none";
  };
  text << (s.name.empty() ? "shape" : s.name) << ": q ";
  lengths(s.seqlens_q);
  text << " k ";
  lengths(s.seqlens_k);
  text << " heads " << s.heads_q << "/" << s.heads_k << " head_dim " << s.head_dim << "/"
       << s.dim_v() << " " << name_of(s.layout_q) << "/" << name_of(s.layout_k) << " "
       << name_of(s.inputs);
  if (s.paged()) text << " page_size " << s.page_size;
  if (s.seqused) text << " seqused";
  if (s.band.left != kUnbounded) text << " left " << s.band.left;
  if (s.band.right != kUnbounded) text << " right " << s.band.right;
  if (s.band.chunk != 0) text << " chunk " << s.band.chunk;
  if (s.scale) text << " scale " << *s.scale;
  if (s.softcap != 0) text << " softcap " << s.softcap;
  if (s.bias != BiasKind::none)
    text << " bias "
         << (s.bias == BiasKind::boolean ? "bool"
             : s.bias == BiasKind::f32   ? "f32"
                                         : "own")
         << "[" << (s.bias_batch ? "b" : "1") << (s.bias_heads ? "h" : "1")
         << (s.bias_rows ? "q" : "1") << "k]";
  if (s.sinks != Sinks::none) text << " sinks " << static_cast<int>(s.sinks);
  if (s.dropout != 0) text << " dropout " << s.dropout;
  if (s.intervals) text << " intervals";
  if (s.key_bits) text << " key_bits";
  if (s.dlse) text << " dlse";
  if (s.strided) text << " strided";
  if (s.first_entry != 0) text << " first_entry " << s.first_entry;
  if (!s.lse) text << " no_lse";
  return text.str();
}

std::int64_t pairs_of(const Shape& shape) {
  std::int64_t pairs = 0;
  for (std::size_t i = 0; i < shape.seqlens_q.size(); ++i)
    pairs += std::int64_t{shape.seqlens_q[i]} * shape.seqlens_k[i];
  return pairs * shape.heads_q;
}

double load(DType dtype, const void* data, std::int64_t i) {
  switch (dtype) {
    case DType::f64: return static_cast<const double*>(data)[i];
    case DType::f32: return double{static_cast<const float*>(data)[i]};
    case DType::bf16: return double{to_float(static_cast<const bf16*>(data)[i])};
    case DType::f16: return double{to_float(static_cast<const f16*>(data)[i])};
    case DType::boolean: return static_cast<const std::uint8_t*>(data)[i];
  }
  return 0;
}

void store(DType dtype, void* data, std::int64_t i, double value) {
  const auto narrow = static_cast<float>(value);
  switch (dtype) {
    case DType::f64: static_cast<double*>(data)[i] = value; return;
    case DType::f32: static_cast<float*>(data)[i] = narrow; return;
    case DType::bf16: static_cast<bf16*>(data)[i] = from_float<bf16>(narrow); return;
    case DType::f16: static_cast<f16*>(data)[i] = from_float<f16>(narrow); return;
    case DType::boolean: static_cast<std::uint8_t*>(data)[i] = value != 0; return;
  }
}

// ---- values ----

double Problem::value(Input which, const Place& place) const {
  Place at = place;
  if (which != Input::sink) at.entry += shape.first_entry;
  const int group = shape.heads_k == 0 ? 1 : shape.heads_q / shape.heads_k;
  const int head_k = which == Input::q ? at.head / group : at.head;
  const auto hash = [&](Input tensor, int entry, int token, int head, int channel) {
    std::uint64_t h = mix(seed * 8 + static_cast<std::uint64_t>(tensor));
    for (const int x : {entry, token, head, channel}) h = mix(h ^ static_cast<std::uint32_t>(x));
    return h;
  };
  const auto noise = [&](int token) {
    return Random(hash(which, at.entry, token, at.head, at.channel)).normal();
  };
  const double n = noise(at.token);
  // One direction per key head, of length sqrt(head_dim): q and k along it score amount *
  // sqrt(head_dim).
  const double direction = (hash(Input::q, at.entry, -1, head_k, at.channel) & 1) != 0 ? 1. : -1.;
  const double root = std::sqrt(static_cast<double>(shape.head_dim));
  const auto along = [&](double score) { return direction * score / root + 0.3 * n; };
  const auto keys = [&] { return shape.seqlens_k[static_cast<std::size_t>(place.entry)]; };
  const bool q = which == Input::q, k = which == Input::k, v = which == Input::v;
  if (which == Input::sink || which == Input::bias || which == Input::dlse) return n;

  switch (shape.inputs) {
    case Inputs::gaussian: return n;
    case Inputs::peaky: return q ? 4 * n : k ? 2 * n : n;
    case Inputs::v_offset: return v ? 8 + n : n;
    case Inputs::outlier:
      if (at.channel != 0 || !(q || k)) return n;
      if (q) return 30 + n;
      return ((hash(Input::k, at.entry, -1, at.head, 0) & 1) != 0 ? 5. : -5.) * root + 0.1 * n;
    case Inputs::equal: return k ? noise(0) : n;
    case Inputs::q_zero: return q ? 0 : v ? std::round(2 * n) : n;
    case Inputs::planted_max: {
      if (q) return direction + 0.1 * n;
      const bool planted = at.token % 24 == 23 || at.token == keys() - 1;
      return k ? along(planted ? 2 + 1.5 * (at.token / 24.) : 0) : n;
    }
    case Inputs::descending: return q ? direction + 0.1 * n : k ? along(-0.3 * at.token) : n;
    case Inputs::lse_low: return q ? direction + 0.02 * n : k ? along(-120) : n;
    case Inputs::lse_high: return q ? direction + 0.02 * n : k ? along(120) : n;
    case Inputs::softcap_saturating: return q ? 6 * n : n;
    case Inputs::denormal:
      return which == Input::dout ? n : n * (dtype == DType::f16 ? 0x1p-20 : 0x1p-130);
    case Inputs::integers: return std::clamp(std::round(n), -2., 2.);
    case Inputs::duplicated: return k ? noise(at.token / 8) : n;
    case Inputs::near_max: return v ? std::clamp(n * 3e4, -6e4, 6e4) : n;
  }
  return n;
}

void Problem::fill_tokens(Input which, const TensorView& view, const std::vector<SideSlice>& side) {
  for (std::size_t entry = 0; entry < side.size(); ++entry) {
    const SideSlice& at = side[entry];
    for (int t = 0; t < at.length; ++t) {
      std::int64_t row = at.batch * view.batch_stride() + (at.token + t) * view.seqlen_stride();
      if (shape.paged() && (which == Input::k || which == Input::v)) {
        const std::int32_t page = pages_[entry * static_cast<std::size_t>(forward.paged.max_pages) +
                                         static_cast<std::size_t>(t / shape.page_size)];
        row = page * view.stride[0] + t % shape.page_size * view.stride[1];
      }
      for (int h = 0; h < view.heads(); ++h)
        for (int c = 0; c < view.head_dim(); ++c) {
          const Place place{static_cast<int>(entry), t, h, c};
          double x = value(which, place);
          if (override_) x = override_(which, place, x);
          store(view.dtype, view.data, row + h * view.head_stride() + c, x);
        }
    }
  }
}

// ---- layouts ----

struct Problem::Side {
  int rank = 4;
  std::int64_t batch = 0, rows = 0;
  const std::int32_t *cu_seqlens = nullptr, *start = nullptr, *seqused = nullptr;
  std::int64_t max_seqlen = 0;
  std::vector<SideSlice> slices;
};

template <class T>
const T* Problem::array(const std::vector<T>& values) {
  Buffer& buffer = arrays_.emplace_back(Buffer(values.size() * sizeof(T), true, sizeof(T)));
  if (!values.empty()) std::memcpy(buffer.data(), values.data(), buffer.size());
  return buffer.as<const T>().data();
}

Problem::Side Problem::make_side(bool is_q, Random& random) {
  const std::vector<int>& lengths = is_q ? shape.seqlens_q : shape.seqlens_k;
  const Layout layout = is_q ? shape.layout_q : shape.layout_k;
  const std::size_t batch = lengths.size();
  const int longest = batch == 0 ? 0 : *std::ranges::max_element(lengths);
  const bool ragged = std::ranges::any_of(lengths, [&](int n) { return n != longest; });
  const bool seqused =
      layout == Layout::paged || (layout == Layout::dense && ragged) || shape.seqused;
  Side side;
  side.batch = static_cast<std::int64_t>(batch);
  side.slices.resize(batch);
  std::vector<std::int32_t> cu(1, 0), start, used(lengths.begin(), lengths.end());

  if (layout == Layout::packed) {
    side.rank = 3;
    cu[0] = batch == 0 ? 0 : random.between(0, 3);
    int widest = 0;
    for (std::size_t i = 0; i < batch; ++i) {
      const int extent = lengths[i] + (seqused ? random.between(0, 5) : 0);
      side.slices[i] = {0, cu.back(), lengths[i], 0};
      cu.push_back(cu.back() + extent);
      widest = std::max(widest, extent);
    }
    side.rows = cu.back() + (batch == 0 ? 0 : random.between(0, 3));
    side.cu_seqlens = array(cu);
    if (random.chance(0.7) || shape.bias != BiasKind::none)
      side.max_seqlen = std::max(1, widest + random.between(0, 2));
  } else {
    side.rows = longest + (seqused ? random.between(0, 5) : 0);
    for (std::size_t i = 0; i < batch; ++i) {
      int first = 0;
      if (layout == Layout::padded) {
        const int room = static_cast<int>(side.rows) - lengths[i];
        first = seqused ? random.between(0, room) : room;
      }
      start.push_back(first);
      side.slices[i] = {static_cast<std::int64_t>(i), first, lengths[i], first};
    }
    if (layout == Layout::padded) side.start = array(start);
  }
  if (seqused) side.seqused = array(used);
  return side;
}

Tensor Problem::tensor(std::array<std::int64_t, 4> axes, int rank, DType type, Random& random,
                       bool odd_heads) {
  // axes: batch, seqlen, heads, head_dim. Packed tensors have no batch axis.
  const std::int64_t head_gap = odd_heads       ? random.between(1, 3)
                                : shape.strided ? random.between(0, 9)
                                                : 0;
  const bool heads_first = shape.strided && random.chance(0.5);
  const std::int64_t row_gap = shape.strided ? random.between(0, 17) : 0;
  std::array<std::int64_t, 4> stride{0, 0, 0, 1};
  const std::size_t inner = heads_first ? 1 : 2, outer = heads_first ? 2 : 1;
  stride[inner] = axes[3] + head_gap;
  stride[outer] = stride[inner] * std::max<std::int64_t>(1, axes[inner]) + row_gap;
  stride[0] = stride[outer] * std::max<std::int64_t>(1, axes[outer]) + row_gap;
  TensorView view{nullptr, type, rank, axes, stride};
  if (rank == 3) {
    view.shape = {axes[1], axes[2], axes[3], 0};
    view.stride = {stride[1], stride[2], stride[3], 0};
  }
  Buffer buffer(static_cast<std::size_t>(extent_in_memory(view)) * size_of(type),
                random.chance(0.7), size_of(type));
  buffer.fill(type, poison);
  view.data = buffer.data();
  return {std::move(buffer), view};
}

// Draws nothing that depends on the layout.
void Problem::make_masks(const Side& q, const Side& k) {
  Random random(seed ^ 0x3A5C);
  if (shape.intervals) {
    const std::int64_t stride = 2 * q.rows;
    std::vector<std::int32_t> rows(
        static_cast<std::size_t>(q.rank == 3 ? stride : stride * q.batch),
        poison == Poison::nan ? std::numeric_limits<std::int32_t>::min()
                              : std::numeric_limits<std::int32_t>::max());
    for (std::size_t e = 0; e < q.slices.size(); ++e)
      for (int row = 0; row < q.slices[e].length; ++row) {
        const SideSlice& at = q.slices[e];
        const int length = k.slices[e].length;
        const int first = random.between(-3, length / 2);
        int end = first + random.between(0, length + 3);
        if (random.chance(0.1)) end = first - random.between(0, 4);
        const auto i = static_cast<std::size_t>(at.batch * stride + 2 * (at.token + row));
        rows[i] = k.slices[e].slot + first;
        rows[i + 1] = k.slices[e].slot + end;
      }
    forward.intervals.rows = array(rows);
    forward.intervals.rows_batch_stride = q.rank == 3 ? 0 : stride;
  }
  if (shape.key_bits) {
    // Sometimes a word short: the slots past the last word are not valid.
    const bool one_less = random.chance(0.2),
               shared = random.chance(0.3) && !k.slices.empty() && shape.layout_k != Layout::padded;
    const std::int64_t words =
        std::max<std::int64_t>(1, (key_capacity(forward) + 31) / 32 - (one_less ? 1 : 0));
    std::vector<std::uint32_t> bits(static_cast<std::size_t>(
        shared ? words : words * static_cast<std::int64_t>(k.slices.size())));
    for (std::size_t e = 0; e < k.slices.size(); ++e)
      for (int key = 0; key < k.slices[e].length; ++key) {
        const std::int64_t slot = k.slices[e].slot + key;
        const std::uint64_t draw =
            mix(mix(seed ^ (shared ? 0 : e)) ^ static_cast<std::uint32_t>(key));
        if (slot / 32 >= words || draw % 4 == 0) continue;
        bits[static_cast<std::size_t>(
            slot / 32 + (shared ? 0 : static_cast<std::int64_t>(e) * words))] |= 1u << (slot % 32);
      }
    forward.intervals.bits = array(bits);
    forward.intervals.bits_batch_stride = shared ? 0 : words;
    forward.intervals.bits_words = words;
  }
}

void Problem::make_bias(Random& random) {
  if (shape.bias == BiasKind::none) return;
  const DType type = shape.bias == BiasKind::boolean ? DType::boolean
                     : shape.bias == BiasKind::f32   ? DType::f32
                                                     : dtype;
  const std::int64_t rows =
      shape.layout_q == Layout::packed ? forward.sequences.max_seqlen_q : forward.q.seqlen();
  const std::int64_t keys =
      shape.layout_k == Layout::packed ? forward.sequences.max_seqlen_k : key_capacity(forward);
  const std::array<std::int64_t, 4> axes{shape.bias_batch ? batch_entries(forward) : 1,
                                         shape.bias_heads ? shape.heads_q : 1,
                                         shape.bias_rows ? rows : 1, keys};
  bias_ = tensor(axes, 4, type, random, false);
  for (int e = 0; e < static_cast<int>(q_slices.size()); ++e) {
    const SideSlice& at = q_slices[static_cast<std::size_t>(e)];
    const SideSlice& of = k_slices[static_cast<std::size_t>(e)];
    for (int h = 0; h < axes[1]; ++h)
      for (int r = 0; r < (shape.bias_rows ? at.length : 1); ++r)
        for (int key = 0; key < of.length; ++key) {
          // Broadcast axes take the same number whoever writes it last.
          const Place place{shape.bias_batch ? e : 0, shape.bias_rows ? r : 0, h, key};
          double x = value(Input::bias, place);
          if (type == DType::boolean)
            x = x < 0.8 ? 1 : 0;
          else if (x > 1.8)
            x = -kInf;
          if (override_) x = override_(Input::bias, place, x);
          store(type, bias_.view.data,
                place.entry * bias_.view.stride[0] + h * bias_.view.stride[1] +
                    (shape.bias_rows ? at.slot + r : 0) * bias_.view.stride[2] +
                    (of.slot + key) * bias_.view.stride[3],
                x);
        }
  }
  forward.bias = bias_.view;
  if (type == DType::boolean) return;
  dbias_ = tensor(axes, 4, DType::f32, random, false);
}

Problem::Problem(const Shape& s, DType type, std::uint64_t seed_in, Poison poison_in,
                 const Override& override_value)
    : shape(s), dtype(type), seed(seed_in), poison(poison_in), override_(override_value) {
  set_crash_context(
      (describe(shape) + " " + heed::name_of(dtype) + " seed " + std::to_string(seed)).c_str());
  Random random(seed ^ 0x5EED);
  const Side q = make_side(true, random);
  Side k = make_side(false, random);
  q_slices = q.slices;
  k_slices = k.slices;

  if (shape.paged()) {
    const int longest = shape.seqlens_k.empty() ? 0 : *std::ranges::max_element(shape.seqlens_k);
    const int max_pages = (longest + shape.page_size - 1) / shape.page_size + random.between(1, 2);
    const int num_pages = max_pages * static_cast<int>(k.batch) + 2;
    std::vector<std::int32_t> order(static_cast<std::size_t>(num_pages));
    std::iota(order.begin(), order.end(), 0);
    for (std::size_t i = order.size(); i > 1; --i)
      std::swap(order[i - 1],
                order[static_cast<std::size_t>(random.between(0, static_cast<int>(i) - 1))]);
    std::size_t next = 0;
    for (std::size_t e = 0; e < k.slices.size(); ++e)
      for (int i = 0; i < max_pages; ++i) {
        const bool live = i * shape.page_size < k.slices[e].length;
        pages_.push_back(live ? order[next++] : poison == Poison::nan ? -7 : 1 << 30);
      }
    k.batch = num_pages;
    k.rows = shape.page_size;
    forward.paged = {array(pages_), max_pages};
  }

  const std::int64_t dim = shape.head_dim, dim_v = shape.dim_v();
  q_ = tensor({q.batch, q.rows, shape.heads_q, dim}, q.rank, dtype, random, false);
  k_ = tensor({k.batch, k.rows, shape.heads_k, dim}, k.rank, dtype, random, true);
  v_ = tensor({k.batch, k.rows, shape.heads_k, dim_v}, k.rank, dtype, random, false);
  out_ = tensor({q.batch, q.rows, shape.heads_q, dim_v}, q.rank, dtype, random, false);
  dout_ = tensor({q.batch, q.rows, shape.heads_q, dim_v}, q.rank, dtype, random, false);
  dq_ = tensor({q.batch, q.rows, shape.heads_q, dim}, q.rank, dtype, random, false);
  dk_ = tensor({k.batch, k.rows, shape.heads_k, dim}, k.rank, dtype, random, false);
  dv_ = tensor({k.batch, k.rows, shape.heads_k, dim_v}, k.rank, dtype, random, true);

  ForwardProblem& f = forward;
  f.q = q_.view;
  f.k = k_.view;
  f.v = v_.view;
  f.out = out_.view;
  f.band = shape.band;
  f.score = {shape.scale, shape.softcap};
  f.sequences = {.batch = q.rank == 3 ? q.batch : 0,
                 .cu_seqlens_q = q.cu_seqlens,
                 .cu_seqlens_k = k.cu_seqlens,
                 .start_q = q.start,
                 .start_k = k.start,
                 .seqused_q = q.seqused,
                 .seqused_k = k.seqused,
                 .max_seqlen_q = q.max_seqlen,
                 .max_seqlen_k = k.max_seqlen};
  fill_tokens(Input::q, q_.view, q_slices);
  fill_tokens(Input::k, k_.view, k_slices);
  fill_tokens(Input::v, v_.view, k_slices);
  fill_tokens(Input::dout, dout_.view, q_slices);
  make_masks(q, k);
  make_bias(random);

  const auto rows = static_cast<std::size_t>(f.q.batch() * f.q.heads() * f.q.seqlen());
  lse_ = Buffer(rows * sizeof(float), true, sizeof(float));
  if (shape.lse) f.lse = lse_.as<float>().data();
  if (shape.dlse) {
    dlse_ = Buffer(rows * sizeof(float), true, sizeof(float));
    dlse_.fill(DType::f32, poison);
    for (int e = 0; e < static_cast<int>(q_slices.size()); ++e)
      for (int h = 0; h < shape.heads_q; ++h)
        for (int r = 0; r < q_slices[static_cast<std::size_t>(e)].length; ++r) {
          const Place place{e, r, h, 0};
          double x = value(Input::dlse, place);
          if (override_) x = override_(Input::dlse, place, x);
          store(DType::f32, dlse_.data(), lse_index(f, slice_of(f, e), h, r), x);
        }
  }
  if (shape.sinks != Sinks::none) {
    constexpr double kValues[] = {-kInf, -20, 0, 20, 300};
    const auto heads = static_cast<std::size_t>(shape.heads_q);
    sink_ = Buffer(heads * sizeof(float), true, sizeof(float));
    dsink_ = Buffer(heads * sizeof(float), true, sizeof(float));
    for (std::size_t h = 0; h < heads; ++h) {
      const std::size_t kind =
          shape.sinks == Sinks::mixed ? (h + seed) % 5 : static_cast<std::size_t>(shape.sinks) - 1;
      const Place place{0, 0, static_cast<int>(h), 0};
      double x = kValues[kind] + (kind == 0 ? 0 : value(Input::sink, place));
      if (override_) x = override_(Input::sink, place, x);
      store(DType::f32, sink_.data(), static_cast<std::int64_t>(h), x);
    }
    f.sink = sink_.as<const float>().data();
  }
  if (shape.dropout > 0) {
    dropout_seed_ = mix(seed);
    f.dropout = {shape.dropout, array(std::vector<std::uint64_t>{dropout_seed_})};
  }

  backward.forward = f;
  backward.dout = dout_.view;
  backward.dlse = shape.dlse ? dlse_.as<const float>().data() : nullptr;
  backward.dq = dq_.view;
  backward.dk = dk_.view;
  backward.dv = dv_.view;
  backward.dbias = dbias_.view;
  backward.dsink = f.sink == nullptr ? nullptr : dsink_.as<float>().data();
  reset_outputs();
}

void Problem::reset_outputs() {
  for (Tensor* t : {&out_, &dq_, &dk_, &dv_, &dbias_}) t->buffer.fill(t->view.dtype, poison);
  lse_.fill(DType::f32, poison);
  dsink_.fill(DType::f32, poison);
}

// ---- inspection ----

std::string Problem::damage() const {
  const std::pair<const char*, const Buffer*> buffers[] = {
      {"q", &q_.buffer},         {"k", &k_.buffer},       {"v", &v_.buffer},
      {"out", &out_.buffer},     {"dout", &dout_.buffer}, {"dq", &dq_.buffer},
      {"dk", &dk_.buffer},       {"dv", &dv_.buffer},     {"bias", &bias_.buffer},
      {"dbias", &dbias_.buffer}, {"lse", &lse_},          {"dlse", &dlse_},
      {"sink", &sink_},          {"dsink", &dsink_}};
  for (const auto& [name, buffer] : buffers)
    if (!buffer->intact()) return std::string("wrote outside ") + name;
  for (const Buffer& buffer : arrays_)
    if (!buffer.intact()) return "wrote outside an index array";
  const std::pair<const char*, const Tensor*> outputs[] = {
      {"out", &out_}, {"dq", &dq_}, {"dk", &dk_}, {"dv", &dv_}, {"dbias", &dbias_}};
  for (const auto& [name, t] : outputs) {
    if (t->view.data == nullptr) continue;
    const std::size_t size = size_of(t->view.dtype);
    std::vector<bool> element(t->buffer.size() / size, false);
    for_each_element(t->view, [&](std::int64_t i) { element[static_cast<std::size_t>(i)] = true; });
    const std::uint64_t bits = poison_bits(t->view.dtype, poison);
    for (std::size_t i = 0; i < element.size(); ++i)
      if (!element[i] && std::memcmp(t->buffer.data() + i * size, &bits, size) != 0)
        return std::string("wrote between the elements of ") + name;
  }
  return {};
}

std::vector<double> Problem::tokens(const TensorView& view,
                                    const std::vector<SideSlice>& side) const {
  std::vector<double> all;
  for (const SideSlice& at : side)
    for (int t = 0; t < at.length; ++t)
      for (int h = 0; h < view.heads(); ++h)
        for (int c = 0; c < view.head_dim(); ++c)
          all.push_back(load(view.dtype, view.data,
                             at.batch * view.batch_stride() +
                                 (at.token + t) * view.seqlen_stride() + h * view.head_stride() +
                                 c));
  return all;
}

std::vector<double> Problem::lse_values() const {
  std::vector<double> all;
  for (int e = 0; e < static_cast<int>(q_slices.size()); ++e)
    for (int h = 0; h < shape.heads_q; ++h)
      for (int r = 0; r < q_slices[static_cast<std::size_t>(e)].length; ++r)
        all.push_back(double{forward.lse[lse_index(forward, slice_of(forward, e), h, r)]});
  return all;
}

}  // namespace heed::test
