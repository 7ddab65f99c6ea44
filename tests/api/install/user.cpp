// One call through the installed C++ headers.
#include <heed/heed.hpp>

#include <cstdio>
#include <cstdlib>
#include <vector>

int main() {
  std::vector<float> q(64, 1.f), k(64, 1.f), v(64, 2.f), out(64);
  const auto view = [](std::vector<float>& x) {
    return heed::contiguous(x.data(), heed::DType::f32, {1, 4, 2, 8});
  };
  const std::size_t bytes = std::size_t{1} << 24;
  const heed::Workspace workspace{std::aligned_alloc(heed::kWorkspaceAlignment, bytes), bytes};
  const heed::Status s = heed::forward(
      {.q = view(q), .k = view(k), .v = view(v), .out = view(out), .band = heed::kCausal},
      workspace);
  std::free(workspace.data);
  std::printf("%s out = %g\n", s.ok() ? "ok" : s.message().c_str(), double{out[0]});
  return s.ok() && out[0] > 1.999f && out[0] < 2.001f ? 0 : 1;
}
