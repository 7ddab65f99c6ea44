#!/usr/bin/env bash
# Installs Debian packages as root, names them otherwise.
#   scripts/setup_debian.sh "WHAT NEEDS THEM" PACKAGES...
set -euo pipefail
what=$1
shift
if ((EUID == 0)) && command -v apt-get >/dev/null; then
  echo "setup: installing $*"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
else
  echo "setup: $what (Debian): apt-get install $*" >&2
  exit 1
fi
