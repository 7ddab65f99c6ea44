// Builds the sentences of a Status from text and numbers.
#pragma once

#include <concepts>
#include <cstdio>
#include <string>
#include <string_view>

#include "heed/status.hpp"

namespace heed {

inline void append(std::string& text, std::string_view part) { text += part; }
inline void append(std::string& text, std::floating_point auto value) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.9g", static_cast<double>(value));
  text += digits;
}
inline void append(std::string& text, std::integral auto value) { text += std::to_string(value); }

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  return text;
}

template <class... Parts>
Status invalid(const Parts&... parts) {
  return {Code::invalid, concat(parts...)};
}

template <class... Parts>
Status unsupported(const Parts&... parts) {
  return {Code::unsupported, concat(parts...)};
}

}  // namespace heed
