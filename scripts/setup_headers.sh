#!/usr/bin/env bash
# Sees to the Debian packages whose headers the tests include: installs them as root, names them otherwise.
#   scripts/setup_headers.sh PYTHON
set -euo pipefail

declare -A package_of=(
  [gtest/gtest.h]=libgtest-dev
  [CLI/CLI.hpp]=libcli11-dev
  [fmt/format.h]=libfmt-dev
  [nlohmann/json.hpp]=nlohmann-json3-dev
  [Python.h]=python3-dev # what torch.compile makes includes it
)
python_include=$("$1" -c 'import sysconfig; print(sysconfig.get_path("include"))')
missing=()
for header in "${!package_of[@]}"; do
  echo "#include <$header>" |
    "${CXX:-c++}" -std=c++20 -I"$python_include" -E -x c++ - >/dev/null 2>&1 ||
    missing+=("${package_of[$header]}")
done
((${#missing[@]})) || exit 0
"$(dirname "$0")/setup_debian.sh" "the tests need these headers" "${missing[@]}"
