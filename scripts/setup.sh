#!/usr/bin/env bash
# Creates a virtual environment with pinned packages, or says in one line what the machine lacks.
#   scripts/setup.sh VENV "PYTHON..." REQUIREMENTS...     takes the first Python of the list that is 3.10 to 3.14
set -euo pipefail
venv=$1 candidates=$2
shift 2

fail() { echo "setup: $*" >&2; exit 1; }

usable() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' 2>/dev/null; }

python=
for name in $candidates; do
  if usable "$name"; then python=$name; break; fi
done
[[ -n $python ]] ||
  fail "none of these is Python 3.10 to 3.14: $candidates (Debian: apt-get install python3 python3-venv)"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$python has no venv module (Debian: apt-get install python3-venv)"
command -v "${CXX:-c++}" >/dev/null ||
  fail "no C++ compiler named ${CXX:-c++} (Debian: apt-get install g++)"

echo "setup: $venv from $("$python" --version)"
"$python" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input install)
files=()
for file in "$@"; do files+=(-r "$file"); done
if [[ $(uname -m) == x86_64 ]]; then
  echo "setup: PyTorch brings its CUDA libraries: about 3.2 GB to download, once, and 6 GB on disk"
fi
"${pip[@]}" "${files[@]}"
