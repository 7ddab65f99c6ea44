#!/usr/bin/env python3
"""Writes a wheel of heed as a repository that the `kernels` package loads.

    scripts/hub.py build/wheel/heed-0.1.0-cp310-abi3-linux_x86_64.whl build/hub --cuda 13.0

Each variant is the wheel, unpacked, between an __init__.py and a metadata.json.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import platform
import re
import shutil
import zipfile
from pathlib import Path

NAME = "heed-flash-attn"
VERSION = 1  # of the functions' parameters; Transformers asks for 1 of names that it does not know
STABLE_ABI = "210"  # of PyTorch, which the operators are compiled for

INIT = '''\
"""The functions of FlashAttention, computed by heed {version}."""

import sys
from pathlib import Path

_FOLDER = str(Path(__file__).resolve().parent)
sys.path.insert(0, _FOLDER)
try:
    import heed  # this folder's, or the one that this process has: operators exist only once
    from heed.flash_api import *  # noqa: F403
    from heed.flash_api import __all__  # noqa: F401
finally:
    sys.path.remove(_FOLDER)

if heed.__version__ != "{version}":
    raise ImportError(
        f"heed.__version__ = {{heed.__version__}} must be {version}: this process imported another "
        "heed before this kernel; install heed {version} or do not import heed"
    )
'''

README = """\
---
library_name: kernels
license: apache-2.0
tags:
- kernels
---
heed {version}: exact attention, forward and backward, under FlashAttention's names. Load it with
`kernels.get_kernel`, or in Transformers as `attn_implementation`.
"""


def capabilities(archs: str) -> list[str] | None:
    """What the CUDA build runs on, in the words of metadata.json; None where it does not say.

    The PTX of compute_80 is in a build that has machine code for a GPU older than sm_90.
    """
    numbers = {"all": [80, 90, 100, 120], "native": []}.get(archs)
    if numbers is None:
        numbers = [int(number) for number in archs.split(";")]
    names = [f"{number // 10}.{number % 10}" for number in numbers]
    return names + ["8.0+PTX"] * any(number < 90 for number in numbers) or None


def variants(cuda: str | None) -> list[tuple[str, str]]:
    """Folder and backend. Code of one CUDA major version runs on all its minor versions."""
    system = f"{platform.machine()}-{platform.system().lower()}"
    backends = [("cpu", "cpu")] + ([(f"cu{cuda.split('.')[0]}0", "cuda")] if cuda else [])
    return [(f"torch-stable-abi{STABLE_ABI}-{tag}-{system}", name) for tag, name in backends]


def digest(folder: Path) -> dict:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "algorithm": "sha256",
        "files": {
            path.relative_to(folder).as_posix(): base64.b64encode(
                hashlib.sha256(path.read_bytes()).digest()
            ).decode()
            for path in files
        },
    }


def write(wheel: Path, target: Path, cuda: str | None = None, archs: str = "all") -> None:
    """Replaces the folder `target`. `cuda` is the version of the compiler of CUDA kernels."""
    shutil.rmtree(target, ignore_errors=True)
    for variant, backend in variants(cuda):
        folder = target / "build" / variant
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        version = next(folder.glob("heed-*.dist-info")).stem.split("-")[1]
        (folder / "__init__.py").write_text(INIT.format(version=version))
        hashes = digest(folder)
        unique = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:7]
        metadata = {
            "name": NAME,
            "id": f"_{NAME.replace('-', '_')}_{backend}_{unique}",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": hashes,
        }
        if backend == "cuda" and capabilities(archs):
            metadata["backend"]["archs"] = capabilities(archs)
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (target / "README.md").write_text(README.format(version=version))


def compiler_version(build: Path) -> str | None:
    """Of the nvcc that a build directory of CMake used; None without CUDA."""
    for file in build.glob("CMakeFiles/*/CMakeCUDACompiler.cmake"):
        return re.search(r'CMAKE_CUDA_COMPILER_VERSION "([0-9.]+)"', file.read_text())[1]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--cuda", help="version of the nvcc that compiled the wheel")
    parser.add_argument("--build", type=Path, help="build directory of CMake that says it")
    parser.add_argument("--archs", default="all", help="as in make wheel")
    args = parser.parse_args()
    cuda = args.cuda or (args.build and compiler_version(args.build))
    write(args.wheel, args.target, cuda, args.archs)
    for variant, _ in variants(cuda):
        print(args.target / "build" / variant)


if __name__ == "__main__":
    main()
