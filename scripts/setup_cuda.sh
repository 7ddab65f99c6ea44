#!/usr/bin/env bash
# Prints the path of an nvcc that is 12.8 or newer: $CUDACXX, that of PATH, that of /usr/local/cuda, or one
# that it installs into VENV/cuda. Not among the environment's packages: PyTorch pins other versions there.
#   scripts/setup_cuda.sh [VENV]
set -euo pipefail
venv=$(realpath -m "${1:-.venv}")
requirements=$(dirname "$0")/../requirements/cuda.txt

usable() {
  local version
  version=$("$1" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p')
  [[ -n $version && $(printf '%s\n' 12.8 "$version" | sort -V | head -1) == 12.8 ]]
}

if [[ -n ${CUDACXX:-} ]]; then
  usable "$CUDACXX" || { echo "setup: CUDACXX=$CUDACXX is no nvcc of CUDA 12.8 or newer" >&2; exit 1; }
  command -v "$CUDACXX"
  exit
fi
for nvcc in "$(command -v nvcc || true)" /usr/local/cuda/bin/nvcc; do
  if [[ -n $nvcc ]] && usable "$nvcc"; then echo "$nvcc"; exit; fi
done

nvcc=$venv/cuda/nvidia/cu13/bin/nvcc
if ! [[ -e $venv/cuda/.installed && ! $requirements -nt $venv/cuda/.installed ]]; then
  [[ -x $venv/bin/python ]] || { echo "setup: there is no $venv/bin/python: make sets it up" >&2; exit 1; }
  echo "setup: nvcc into $venv/cuda: about 130 MB to download, once, and 270 MB on disk" >&2
  rm -rf "$venv/cuda"
  "$venv/bin/python" -m pip --disable-pip-version-check --no-input install --quiet --no-deps \
    --target "$venv/cuda" -r "$requirements" >&2
  # What nvcc tells the linker, and what CMake looks for.
  ln -s lib "$venv/cuda/nvidia/cu13/lib64"
  ln -s libcudart.so.13 "$venv/cuda/nvidia/cu13/lib/libcudart.so"
  touch "$venv/cuda/.installed"
fi
usable "$nvcc" || { echo "setup: $nvcc does not run here: install CUDA 12.8 or newer, or set CUDACXX" >&2; exit 1; }
echo "$nvcc"
