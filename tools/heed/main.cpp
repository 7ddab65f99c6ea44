// The command `heed`: what runs on this machine, why, how exactly and how fast.
#include <CLI/CLI.hpp>
#include <cstdio>

#include "heed/heed.h"
#include "verbs.hpp"

void heed::tool::fail(const std::string& text) {
  std::fprintf(stderr, "heed: %s\n", text.c_str());
  throw CLI::RuntimeError(1);
}

int main(int argc, char** argv) {
  CLI::App app{
      "heed: exact attention. HEED_FORCE_ISA, HEED_FORCE_KERNEL and HEED_NUM_THREADS act "
      "on every verb."};
  app.set_version_flag("--version", HEED_VERSION);
  app.require_subcommand(1);
  app.option_defaults()->always_capture_default();
  heed::tool::add_list(app);
  heed::tool::add_explain(app);
  heed::tool::add_check(app);
  heed::tool::add_bench(app);
  CLI11_PARSE(app, argc, argv);
}
