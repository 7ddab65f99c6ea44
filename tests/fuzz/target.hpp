// What every fuzz target expects of the library, and the entry that libFuzzer and replay.cpp call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "heed/heed.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace heed::fuzz {

inline void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

// Every answer is a code and, unless it is HEED_OK, a sentence.
inline bool ok(const heed_status& status) {
  expect(status.code >= HEED_OK && status.code <= HEED_DEVICE, "a status has a code");
  expect(std::memchr(status.message, 0, HEED_MESSAGE_BYTES) != nullptr, "a message ends");
  expect((status.code == HEED_OK) == (status.message[0] == '\0'), "a refusal has a sentence");
  return status.code == HEED_OK;
}

}  // namespace heed::fuzz
