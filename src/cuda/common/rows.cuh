// Addresses of a problem's rows on the device: layouts, pages and validity bits end here.
#pragma once

#include <cstdint>

#include "core/layout.hpp"
#include "core/mask.hpp"
#include "core/sequence.hpp"
#include "heed/problem.hpp"

namespace heed::cuda {

// Element (0, 0) of one head of one entry, in a tensor laid out as q, out, dout, dq.
template <class Element, class View>
__device__ __forceinline__ Element* first_row(const View& x, const SideSlice& at, int head) {
  return static_cast<Element*>(const_cast<void*>(static_cast<const void*>(x.data))) +
         at.batch * x.batch_stride() + at.token * x.seqlen_stride() + head * x.head_stride();
}

// One head of k or v as a kernel reads it: row(key) is nullptr where nothing may be read.
template <class Element>
struct KeyRows {
  const Element* first;  // key 0, or page 0
  std::int64_t stride;   // between keys
  std::int64_t page_stride;
  const std::int32_t* pages;  // of this entry; nullptr: the keys stand one after another
  int num_pages;
  int page_size;
  int length;

  __device__ __forceinline__ const Element* row(int key) const {
    if (key >= length) return nullptr;
    if (pages == nullptr) return first + key * stride;
    const int page = pages[key / page_size];
    if (page < 0 || page >= num_pages) return nullptr;
    return first + page * page_stride + key % page_size * stride;
  }
};

template <class Element>
__device__ __forceinline__ KeyRows<Element> key_rows(const ForwardProblem& p,
                                                     const ConstTensorView& x,
                                                     const SequenceSlice& at, int head) {
  const auto* data = static_cast<const Element*>(x.data) + head * x.head_stride();
  if (p.paged.page_table == nullptr)
    return {data + at.k.batch * x.batch_stride() + at.k.token * x.seqlen_stride(),
            x.seqlen_stride(),
            0,
            nullptr,
            0,
            1,
            at.k.length};
  return {data,
          x.stride[1],
          x.stride[0],
          p.paged.page_table + at.entry * p.paged.max_pages,
          static_cast<int>(x.shape[0]),
          static_cast<int>(x.shape[1]),
          at.k.length};
}

// Whether keys of an entry can be missing: their pages unmapped or their validity bits clear.
__device__ __forceinline__ bool may_have_holes(const ForwardProblem& p) {
  return p.paged.page_table != nullptr || p.intervals.bits != nullptr;
}

// The share of one of `threads` threads in the question whether any of the keys [begin, end) is
// missing.
__device__ __forceinline__ bool any_missing(const ForwardProblem& p, const SequenceSlice& at,
                                            int begin, int end, int thread, int threads) {
  if (begin >= end) return false;
  bool missing = false;
  if (p.paged.page_table != nullptr) {
    const int page_size = static_cast<int>(p.k.shape[1]);
    const std::int32_t* pages = p.paged.page_table + at.entry * p.paged.max_pages;
    for (int i = begin / page_size + thread; i <= (end - 1) / page_size;
         i += threads)
      missing = missing || pages[i] < 0 || pages[i] >= p.k.shape[0];
  }
  if (p.intervals.bits != nullptr) {
    // Each thread looks at the keys of one word, cut to the range.
    const int first_word = (at.k.slot + begin) / 32, last_word = (at.k.slot + end - 1) / 32;
    for (int word = first_word + thread; word <= last_word; word += threads)
      missing = missing || !all_keys_valid(p.intervals, at, max_of(begin, 32 * word - at.k.slot),
                                           min_of(end, 32 * word + 32 - at.k.slot));
  }
  return missing;
}

// Whether a key is there at all; such keys are not read and no row sees them.
template <class Element>
__device__ __forceinline__ bool key_present(const ForwardProblem& p, const SequenceSlice& at,
                                            const KeyRows<Element>& rows, int key) {
  return rows.row(key) != nullptr && key_valid(p.intervals, at, key);
}

}  // namespace heed::cuda
