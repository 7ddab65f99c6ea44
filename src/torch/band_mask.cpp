// The operator heed::band_mask: a padding mask and a band as one tensor.
#include "band_mask.hpp"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstdint>
#include <optional>

#include "api/message.hpp"
#include "arguments.hpp"
#include "core/band_mask.hpp"
#include "cuda/common/band_mask.cuh"
#include "target.hpp"
#include "tensors.hpp"

namespace heed::operators {
namespace {

void write_on_cpu(const BandMask& m) {
  for (std::int64_t entry = 0; entry < m.batch; ++entry) {
    SlotRange valid{0, m.slots};
    if (m.padding != nullptr) {
      SlotRange found{m.slots, 0};
      std::int32_t* words = m.words(entry);
      for (std::int64_t word = 0; word < 2 * m.bit_rows(); ++word) {
        std::uint32_t bits = 0;
        for (int bit = 0; bit < 32; ++bit) {
          const std::int64_t slot = 32 * word + bit;
          if (!slot_valid(m, entry, slot)) continue;
          bits |= 1u << bit;
          if (found.end == 0) found.first = slot;
          found.end = slot + 1;
        }
        words[word] = static_cast<std::int32_t>(bits);
      }
      if (found.end > 0) valid = found;
    }
    for (std::int64_t row = 0; row < m.seqlen_q; ++row) write_row(m, entry, row, valid);
  }
}

// A tensor of the band's arithmetic: int64, contiguous; null without one.
struct Positions {
  Positions(const char* name, const std::optional<Tensor>& tensor, const Tensor& out) {
    if (!tensor) return;
    check_device(name, *tensor, "device", out);
    values = cast(*tensor, dtype_codes().int64);
    if (!values->is_contiguous()) values = torch::stable::contiguous(*values);
  }
  const std::int64_t* data() const {
    return values ? static_cast<const std::int64_t*>(values->const_data_ptr()) : nullptr;
  }
  std::int64_t count() const { return values ? values->numel() : 0; }

  std::optional<Tensor> values;
};

}  // namespace

void band_mask(StableIValue* stack, std::uint64_t, std::uint64_t) {
  Arguments a(stack);
  std::optional<Tensor> padding = a.optional_tensor();
  const auto given_positions = a.optional_tensor(), given_start = a.optional_tensor();
  BandMask m;
  m.batch = a.take<std::int64_t>();
  m.seqlen_q = a.take<std::int64_t>();
  m.q_offset = a.take<std::int64_t>();
  m.slots = a.take<std::int64_t>();
  m.kv_offset = a.take<std::int64_t>();
  m.left = a.take<std::int64_t>();
  m.right = a.take<std::int64_t>();
  m.chunk = a.take<std::int64_t>();
  m.rows_are_slots = a.take<bool>();
  const auto device = a.take<torch::stable::Device>();
  if (m.batch < 0 || m.seqlen_q < 0 || m.slots < 0 || m.kv_offset < 0)
    raise(invalid("batch = ", m.batch, ", seqlen_q = ", m.seqlen_q, ", slots = ", m.slots,
                  ", kv_offset = ", m.kv_offset, " must be at least 0"));
  if (m.rows_are_slots && m.seqlen_q != m.slots)
    raise(invalid("seqlen_q = ", m.seqlen_q, " must be slots = ", m.slots,
                  " with rows_are_slots = true"));

  const std::int64_t bit_rows =
      padding ? (m.slots + BandMask::kSlotsPerRow - 1) / BandMask::kSlotsPerRow : 0;
  const std::array<std::int64_t, 4> shape{m.batch, 1, m.seqlen_q + bit_rows, 2};
  const Tensor out = empty(shape, dtype_codes().int32, device);
  m.out = static_cast<std::int32_t*>(out.mutable_data_ptr());

  if (padding) {
    check_device("padding", *padding, "device", out);
    const Shape of = shape_of(*padding);
    if (of.size() != 2 || (of[0] != 1 && of[0] != m.batch))
      raise(invalid("padding.shape = ", text_of(of),
                    " must be [batch or 1, keys], batch = ", m.batch));
    padding = cast(*padding, dtype_codes().boolean);
    m.padding = static_cast<const bool*>(padding->const_data_ptr());
    m.padding_batch_stride = of[0] == 1 ? 0 : padding->stride(0);
    m.padding_stride = padding->stride(1);
    m.known = of[1];
  }
  const Positions positions("positions", given_positions, out),
      chunk_start("chunk_start", given_start, out);
  if (given_positions && positions.count() != 1 && positions.count() != m.seqlen_q)
    raise(invalid("positions has ", positions.count(),
                  " elements, must have 1 or seqlen_q = ", m.seqlen_q));
  if (given_start && chunk_start.count() != m.batch)
    raise(
        invalid("chunk_start has ", chunk_start.count(), " elements, must have batch = ", m.batch));
  m.positions = positions.data();
  m.per_row = positions.count() > 1;
  m.chunk_start = chunk_start.data();

  // Without a tensor argument PyTorch does not ask the fake kernel.
  const std::int32_t type = device_type(out);
  if (type == aoti_torch_device_type_cpu()) {
    write_on_cpu(m);
  } else if (type != aoti_torch_device_type_meta()) {
    Target target;
    aim_at(target, out);
    check(cuda::write_band_mask(m, target.queue.stream));
  }
  stack[0] = torch::stable::detail::from(out);
}

}  // namespace heed::operators
