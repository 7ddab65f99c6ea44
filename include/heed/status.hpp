// How heed reports failure: a code and one sentence, never an exception, a print or an exit.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace heed {

enum class Code : std::uint8_t {
  ok,
  invalid,      // the request contradicts itself: another value of the named field is needed
  unsupported,  // a legal request that no kernel of this build or device serves
  device,       // the device or its driver failed, or is missing
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == Code::ok; }
  Code code() const { return code_; }
  // One sentence that names the field, its value and the allowed values; empty when ok.
  const std::string& message() const { return message_; }

 private:
  Code code_ = Code::ok;
  std::string message_;
};

// A value, or the Status that says why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}             // NOLINT(google-explicit-constructor)
  Result(Status status) : status_(std::move(status)) {}     // NOLINT(google-explicit-constructor)

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  // Requires ok().
  const T& value() const { return *value_; }
  const T& operator*() const { return *value_; }
  const T* operator->() const { return &*value_; }

 private:
  std::optional<T> value_;
  Status status_;
};

}  // namespace heed
