#!/usr/bin/env bash
# Sees to doxygen, which makes pages of the C++ and C headers: installs it as root, names it otherwise.
set -euo pipefail
command -v doxygen >/dev/null && exit
if ((EUID == 0)) && command -v apt-get >/dev/null; then
  echo "setup: installing doxygen"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends doxygen >/dev/null
else
  echo "setup: the pages of the C++ and C headers need doxygen (Debian): apt-get install doxygen" >&2
  exit 1
fi
