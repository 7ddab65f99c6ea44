#include "support/shapes.hpp"

#include <algorithm>

namespace heed::test {
namespace {

constexpr Layout kLayoutsOfQ[] = {Layout::dense, Layout::packed, Layout::padded};

Shape named(std::string name) {
  Shape s;
  s.name = std::move(name);
  return s;
}

// 77 queries and 133 keys, two entries of different length, heads 2/1.
Shape ragged(std::string name) {
  Shape s = named(std::move(name));
  s.seqlens_q = {77, 30};
  s.seqlens_k = {133, 41};
  s.heads_q = 2;
  s.head_dim = 32;
  return s;
}

std::vector<Shape> make_curated() {
  std::vector<Shape> all;
  const auto add = [&](Shape s, auto... changes) {
    (changes(s), ...);
    all.push_back(std::move(s));
  };
  const auto lengths = [](int q, int k) {
    return [=](Shape& s) {
      s.seqlens_q = {q};
      s.seqlens_k = {k};
    };
  };
  const auto band = [](Band b) { return [=](Shape& s) { s.band = b; }; };

  // Sizes.
  for (const auto& [q, k] : {std::pair{1, 1},
                             {1, 2},
                             {2, 1},
                             {3, 5},
                             {1, 97},
                             {97, 1},
                             {95, 96},
                             {96, 96},
                             {97, 193},
                             {113, 203},
                             {128, 128},
                             {192, 192},
                             {193, 385},
                             {200, 70}}) {
    const std::string name = "size_" + std::to_string(q) + "x" + std::to_string(k);
    add(named(name + "_full"), lengths(q, k));
    add(named(name + "_causal"), lengths(q, k), band(kCausal), [](Shape& s) { s.head_dim = 40; });
  }
  for (const auto& [dim, dim_v] : {std::pair{1, 1},
                                   {2, 3},
                                   {7, 5},
                                   {8, 8},
                                   {16, 16},
                                   {40, 40},
                                   {64, 64},
                                   {72, 72},
                                   {80, 80},
                                   {96, 96},
                                   {128, 128},
                                   {192, 128},
                                   {128, 192},
                                   {31, 33},
                                   {100, 1},
                                   {1, 100},
                                   {256, 256},
                                   {512, 512},
                                   {511, 17}})
    add(named("dim_" + std::to_string(dim) + "_" + std::to_string(dim_v)), lengths(50, 101),
        band(kCausal), [&, d = dim, v = dim_v](Shape& s) {
          s.head_dim = d;
          s.head_dim_v = v;
          s.dlse = true;
        });
  for (const auto& [q, k] : {std::pair{3, 1}, {8, 1}, {8, 8}, {6, 2}, {12, 4}, {7, 7}, {16, 1}})
    add(named("heads_" + std::to_string(q) + "_" + std::to_string(k)), lengths(35, 61),
        band(kCausal), [&, hq = q, hk = k](Shape& s) {
          s.heads_q = hq;
          s.heads_k = hk;
        });

  // Masks.
  add(ragged("window"), band(sliding_window(20)));
  add(ragged("window_both"), band({.left = 9, .right = 5}));
  add(ragged("window_0"), band({.left = 0, .right = 0}));
  add(ragged("right_only"), band({.left = kUnbounded, .right = 13}));
  add(ragged("left_only"), band({.left = 13, .right = kUnbounded}));
  add(ragged("chunked"), band(chunked(16)));
  add(ragged("chunked_window"), band({.left = 20, .right = 7, .chunk = 33}));
  add(ragged("chunk_1"), band(chunked(1)));
  add(named("rows_without_keys"), lengths(150, 40), band(kCausal), [](Shape& s) { s.dlse = true; });
  add(named("rows_without_keys_window"), lengths(150, 40), band({.left = 3, .right = 2}));
  add(ragged("intervals"), [](Shape& s) { s.intervals = true; });
  add(ragged("intervals_causal"), band(kCausal), [](Shape& s) { s.intervals = true; });
  add(ragged("key_bits"), [](Shape& s) { s.key_bits = true; });
  add(ragged("key_bits_intervals_window"), band(sliding_window(40)), [](Shape& s) {
    s.key_bits = true;
    s.intervals = true;
    s.dlse = true;
  });
  // Few queries: more rows than a block of 16, several key heads and several steps to a task.
  add(named("decode_40_rows"), lengths(5, 700), band(kCausal), [](Shape& s) {
    s.heads_q = 16;
    s.heads_k = 2;
    s.head_dim = 32;
  });
  add(named("decode_heads_together"), lengths(2, 70), [](Shape& s) {
    s.heads_q = 6;
    s.heads_k = 3;
  });
  // The first key of some rows begins a panel, and a block of keys that all but few rows see whole.
  add(named("window_of_panels"), lengths(400, 400), band({.left = 160, .right = 0}));
  add(named("long_keys_window"), lengths(40, 1500), band(sliding_window(300)),
      [](Shape& s) { s.head_dim = 16; });

  // Layouts.
  for (const Layout q : kLayoutsOfQ)
    for (const Layout k : {Layout::dense, Layout::packed, Layout::padded, Layout::paged}) {
      constexpr const char* kNames[] = {"dense", "packed", "padded", "paged"};
      const std::string name =
          std::string("layout_") + kNames[static_cast<int>(q)] + "_" + kNames[static_cast<int>(k)];
      add(ragged(name), band(kCausal), [&](Shape& s) {
        s.seqlens_q = {33, 0, 97, 5};
        s.seqlens_k = {47, 20, 97, 0};
        s.layout_q = q;
        s.layout_k = k;
      });
      add(ragged(name + "_seqused"), [&](Shape& s) {
        s.seqlens_q = {1, 64, 0};
        s.seqlens_k = {100, 65, 0};
        s.layout_q = q;
        s.layout_k = k;
        s.seqused = true;
        s.dlse = true;
        s.key_bits = true;
      });
    }
  add(ragged("page_size_1"), [](Shape& s) {
    s.layout_k = Layout::paged;
    s.page_size = 1;
  });
  add(ragged("page_size_7"), [](Shape& s) {
    s.layout_k = Layout::paged;
    s.page_size = 7;
  });
  add(ragged("page_size_256"), [](Shape& s) {
    s.layout_k = Layout::paged;
    s.page_size = 256;
  });
  add(ragged("strided"), band(kCausal), [](Shape& s) { s.strided = true; });
  add(ragged("strided_packed"), [](Shape& s) {
    s.strided = true;
    s.layout_q = s.layout_k = Layout::packed;
  });
  add(ragged("no_lse"), [](Shape& s) { s.lse = false; });

  // Nothing to do.
  add(named("no_batch"), [](Shape& s) { s.seqlens_q = s.seqlens_k = {}; });
  for (const Layout layout : kLayoutsOfQ) {
    const std::string at = std::to_string(static_cast<int>(layout));
    const auto in = [=](Shape& s) {
      s.layout_q = s.layout_k = layout;
      s.sinks = Sinks::zero;
      s.dlse = true;
    };
    add(named("no_queries_" + at), lengths(0, 17), in);
    add(named("no_keys_" + at), lengths(17, 0), in);
    add(named("no_keys_no_sink_" + at), lengths(17, 0));
    add(named("nothing_" + at), lengths(0, 0), in);
  }
  add(named("no_heads"), lengths(5, 5), [](Shape& s) { s.heads_q = s.heads_k = 0; });

  // Scores.
  add(ragged("scale"), [](Shape& s) { s.scale = 0.37f; });
  add(ragged("scale_negative"), [](Shape& s) { s.scale = -0.2f; });
  add(ragged("scale_0"), [](Shape& s) { s.scale = 0.f; });
  add(ragged("softcap"), band(kCausal), [](Shape& s) { s.softcap = 2.f; });
  add(ragged("softcap_50"), [](Shape& s) { s.softcap = 50.f; });
  for (const BiasKind kind : {BiasKind::boolean, BiasKind::f32, BiasKind::tensor})
    for (int broadcast = 0; broadcast < 8; ++broadcast)
      add(ragged("bias_" + std::to_string(static_cast<int>(kind)) + "_" +
                 std::to_string(broadcast)),
          [&](Shape& s) {
            s.seqlens_q = {20, 20, 7};
            s.seqlens_k = {39, 17, 30};
            s.bias = kind;
            s.bias_batch = (broadcast & 1) != 0;
            s.bias_heads = (broadcast & 2) != 0;
            s.bias_rows = (broadcast & 4) != 0;
            s.layout_q = kLayoutsOfQ[broadcast % 3];
            s.layout_k = kLayoutsOfQ[(broadcast + 1) % 3];
          });
  add(ragged("bias_causal_softcap"), band(kCausal), [](Shape& s) {
    s.bias = BiasKind::f32;
    s.softcap = 3.f;
    s.dlse = true;
  });
  for (const Sinks sinks :
       {Sinks::minus_infinity, Sinks::low, Sinks::zero, Sinks::high, Sinks::dominant, Sinks::mixed})
    add(ragged("sinks_" + std::to_string(static_cast<int>(sinks))), band(sliding_window(12)),
        [&](Shape& s) {
          s.sinks = sinks;
          s.heads_q = 6;
          s.heads_k = 2;
          s.dlse = true;
        });
  add(ragged("dlse"), [](Shape& s) { s.dlse = true; });
  for (const float p : {0.1f, 0.5f, 0.9f})
    add(ragged("dropout_" + std::to_string(static_cast<int>(p * 10))), band(kCausal),
        [&](Shape& s) {
          s.dropout = p;
          s.sinks = Sinks::zero;
        });
  add(ragged("dropout_chunked_packed"), band(chunked(31)), [](Shape& s) {
    s.dropout = 0.3f;
    s.layout_q = s.layout_k = Layout::packed;
    s.dlse = true;
  });

  // Inputs; Gaussian ones large enough for the tensor statistics.
  for (int kind = 0; kind < kInputKinds; ++kind)
    for (const bool causal : {false, true})
      add(named(std::string("inputs_") + name_of(static_cast<Inputs>(kind)) +
                (causal ? "_causal" : "")),
          lengths(100, 260), band(causal ? kCausal : kFull), [&](Shape& s) {
            s.inputs = static_cast<Inputs>(kind);
            s.heads_q = 2;
            s.heads_k = 2;
            if (s.inputs == Inputs::softcap_saturating) s.softcap = 5.f;
          });
  add(named("gaussian_d128"), lengths(129, 300), band(kCausal), [](Shape& s) { s.head_dim = 128; });
  add(named("outlier_softcap"), lengths(40, 200), [](Shape& s) {
    s.inputs = Inputs::outlier;
    s.softcap = 30.f;
  });
  return all;
}

std::vector<Shape> make_decode() {
  std::vector<Shape> all;
  const auto add = [&](const char* name, auto change) {
    Shape s = named(name);
    s.heads_q = 8;
    s.heads_k = 2;
    s.seqlens_q = {1, 1};
    s.seqlens_k = {1200, 777};
    change(s);
    all.push_back(std::move(s));
  };
  add("decode", [](Shape&) {});
  add("decode_causal_3_rows", [](Shape& s) {
    s.seqlens_q = {3, 2};
    s.band = kCausal;
  });
  add("decode_softcap", [](Shape& s) { s.softcap = 10.f; });
  add("decode_softcap_window_d128", [](Shape& s) {
    s.softcap = 10.f;
    s.head_dim = 128;
    s.band = sliding_window(300);
  });
  add("decode_softcap_d192", [](Shape& s) {
    s.softcap = 5.f;
    s.head_dim = 192;
    s.seqlens_q = {2, 1};
    s.band = kCausal;
  });
  add("decode_softcap_paged_d256", [](Shape& s) {
    s.softcap = 5.f;
    s.head_dim = 256;
    s.layout_k = Layout::paged;
  });
  add("decode_softcap_24_rows", [](Shape& s) {
    s.softcap = 5.f;
    s.seqlens_q = {6, 5};
  });
  add("decode_window", [](Shape& s) { s.band = sliding_window(600); });
  add("decode_mqa_d128", [](Shape& s) {
    s.heads_k = 1;
    s.head_dim = 128;
  });
  add("decode_mla_dims", [](Shape& s) {
    s.head_dim = 192;
    s.head_dim_v = 128;
  });
  add("decode_paged", [](Shape& s) { s.layout_k = Layout::paged; });
  add("decode_paged_packed_q", [](Shape& s) {
    s.layout_k = Layout::paged;
    s.layout_q = Layout::packed;
    s.seqlens_q = {2, 1};
    s.band = kCausal;
    s.page_size = 64;
  });
  add("decode_padded_bits", [](Shape& s) {
    s.layout_k = Layout::padded;
    s.key_bits = true;
  });
  add("decode_sinks_softcap", [](Shape& s) {
    s.sinks = Sinks::mixed;
    s.softcap = 4.f;
  });
  add("decode_bias", [](Shape& s) {
    s.bias = BiasKind::tensor;
    s.bias_rows = false;
  });
  add("decode_dropout", [](Shape& s) { s.dropout = 0.2f; });
  add("decode_intervals", [](Shape& s) { s.intervals = true; });
  // Enough rows for a lane of a vector each.
  add("decode_24_rows_bits", [](Shape& s) {
    s.seqlens_q = {6, 4};
    s.layout_k = Layout::padded;
    s.key_bits = true;
    s.band = kCausal;
  });
  add("decode_24_rows_paged_intervals", [](Shape& s) {
    s.seqlens_q = {6, 5};
    s.layout_k = Layout::paged;
    s.intervals = true;
  });
  add("decode_16_rows_bias_dropout", [](Shape& s) {
    s.seqlens_q = {4, 3};
    s.bias = BiasKind::tensor;
    s.dropout = 0.2f;
  });
  add("decode_64_rows_softcap_window", [](Shape& s) {
    s.seqlens_q = {16, 13};
    s.softcap = 5.f;
    s.band = sliding_window(300);
  });
  add("decode_empty_and_short", [](Shape& s) { s.seqlens_k = {0, 3}; });
  add("decode_strided", [](Shape& s) { s.strided = true; });
  for (const Inputs inputs : {Inputs::peaky, Inputs::planted_max, Inputs::lse_low, Inputs::outlier,
                              Inputs::v_offset, Inputs::denormal})
    add((std::string("decode_") + name_of(inputs)).c_str(), [&](Shape& s) { s.inputs = inputs; });
  return all;
}

std::vector<Shape> make_larger() {
  std::vector<Shape> all;
  const auto add = [&](const char* name, std::vector<int> q, std::vector<int> k, int dim,
                       auto change) {
    Shape s;
    s.name = std::string(name) + "_d" + std::to_string(dim);
    s.seqlens_q = std::move(q);
    s.seqlens_k = std::move(k);
    s.head_dim = dim;
    change(s);
    all.push_back(std::move(s));
  };
  for (const int dim : {64, 96, 128, 192, 256}) {
    add("large_causal", {520}, {520}, dim, [](Shape& s) { s.band = kCausal; });
    add("large_full_gqa", {300}, {450}, dim, [](Shape& s) { s.heads_q = 2; });
    add("large_window", {400}, {700}, dim, [](Shape& s) { s.band = {.left = 150, .right = 20}; });
    add("large_chunked", {400}, {400}, dim, [](Shape& s) {
      s.band = chunked(150);
      s.dlse = true;
    });
    add("large_intervals", {400}, {500}, dim, [](Shape& s) { s.intervals = true; });
    add("large_bits", {300}, {500}, dim, [](Shape& s) {
      s.key_bits = true;
      s.band = kCausal;
    });
    add("large_packed", {260, 0, 130}, {300, 7, 129}, dim, [](Shape& s) {
      s.layout_q = s.layout_k = Layout::packed;
      s.heads_q = 4;
      s.heads_k = 2;
      s.dlse = true;
    });
    add("large_padded", {260, 130}, {300, 129}, dim, [](Shape& s) {
      s.layout_q = s.layout_k = Layout::padded;
      s.sinks = Sinks::zero;
      s.band = kCausal;
    });
    add("large_paged", {200, 60}, {400, 333}, dim, [](Shape& s) {
      s.layout_k = Layout::paged;
      s.page_size = 48;
    });
    add("large_softcap", {260}, {390}, dim, [](Shape& s) { s.softcap = 20.f; });
    add("large_bias", {260}, {390}, dim, [](Shape& s) { s.bias = BiasKind::tensor; });
    add("large_dropout", {260}, {390}, dim, [](Shape& s) {
      s.dropout = 0.2f;
      s.band = kCausal;
    });
  }
  return all;
}

}  // namespace

const std::vector<Shape>& curated_shapes() {
  static const std::vector<Shape> all = make_curated();
  return all;
}

const std::vector<Shape>& larger_shapes() {
  static const std::vector<Shape> all = make_larger();
  return all;
}

const std::vector<Shape>& decode_shapes() {
  static const std::vector<Shape> all = make_decode();
  return all;
}

Shape random_shape(std::uint64_t seed, std::int64_t pairs) {
  Random r(seed ^ 0xF022);
  Shape s;
  s.name = "random_" + std::to_string(seed);
  s.heads_k = r.pick(1, 1, 1, 2, 3);
  s.heads_q = s.heads_k * r.pick(1, 1, 2, 3, 4, 8);
  s.head_dim = r.chance(0.6) ? 8 * r.log_between(1, 32) : r.log_between(1, 130);
  if (r.chance(0.03)) s.head_dim = r.pick(320, 512, 509);
  if (r.chance(0.3)) s.head_dim_v = r.log_between(1, 200);
  s.layout_q = r.pick(Layout::dense, Layout::packed, Layout::padded);
  s.layout_k = r.pick(Layout::dense, Layout::packed, Layout::padded, Layout::padded);
  if (r.chance(0.15)) s.layout_k = Layout::paged;
  s.page_size = r.pick(1, 3, 16, 64, 128);
  s.seqused = r.chance(0.3);
  s.strided = r.chance(0.4);

  const int batch = r.chance(0.03) ? 0 : r.log_between(1, 5);
  s.seqlens_q.clear();
  s.seqlens_k.clear();
  const bool few_rows = r.chance(0.2);
  const auto length = [&](int most) {
    if (r.chance(0.08)) return 0;
    if (r.chance(0.15))
      return std::min(most, r.pick(63, 64, 65, 95, 96, 97, 191, 192, 193, 383, 385));
    return r.log_between(1, most);
  };
  const bool equal = r.chance(0.3);
  for (int entry = 0; entry < batch; ++entry) {
    const std::int64_t room = std::max<std::int64_t>(4, pairs / (s.heads_q * batch));
    int q = few_rows ? r.between(1, 3) : length(400);
    int k = length(few_rows ? 2000 : 400);
    while (std::int64_t{q} * k > room) (q > k ? q : k) = (q > k ? q : k) * 2 / 3;
    if (r.chance(0.3) && !few_rows) k = q;
    if (equal && entry > 0) {
      q = s.seqlens_q[0];
      k = s.seqlens_k[0];
    }
    s.seqlens_q.push_back(q);
    s.seqlens_k.push_back(k);
  }

  if (r.chance(0.5)) s.band.right = r.chance(0.7) ? 0 : r.log_between(1, 60);
  if (r.chance(0.3)) s.band.left = r.chance(0.1) ? 0 : r.log_between(1, 120);
  if (r.chance(0.15)) s.band.chunk = r.log_between(1, 130);
  if (r.chance(0.2)) s.scale = static_cast<float>(0.5 * r.uniform());
  if (r.chance(0.2)) s.softcap = r.pick(1.f, 5.f, 30.f);
  if (r.chance(0.2)) {
    s.bias = r.pick(BiasKind::boolean, BiasKind::f32, BiasKind::tensor);
    s.bias_batch = r.chance(0.5);
    s.bias_heads = r.chance(0.5);
    s.bias_rows = r.chance(0.7);
  }
  if (r.chance(0.25))
    s.sinks = r.pick(Sinks::minus_infinity, Sinks::low, Sinks::zero, Sinks::high, Sinks::dominant,
                     Sinks::mixed);
  if (r.chance(0.15)) s.dropout = r.pick(0.1f, 0.5f);
  s.intervals = r.chance(0.15);
  s.key_bits = r.chance(0.2);
  s.dlse = r.chance(0.4);
  s.lse = !r.chance(0.1);
  if (r.chance(0.6)) s.inputs = static_cast<Inputs>(r.between(0, kInputKinds - 1));
  if (s.inputs == Inputs::softcap_saturating) s.softcap = 5.f;
  if (s.inputs == Inputs::near_max) s.dropout = 0;
  return s;
}

}  // namespace heed::test
