// The verbs of the command; each adds itself to the application, and its callback runs it.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "heed/status.hpp"

namespace heed::tool {

// Ends the verb with exit code 1 and this line on stderr.
[[noreturn]] void fail(const std::string& text);
template <class T>
const T& value_or_fail(const Result<T>& result) {
  if (!result.ok()) fail(result.status().message());
  return result.value();
}

void add_list(CLI::App& app);
void add_explain(CLI::App& app);
void add_check(CLI::App& app);
void add_bench(CLI::App& app);

}  // namespace heed::tool
