#!/usr/bin/env python3
"""Gives a wheel the manylinux tag that its symbols allow, and prints what it is.

    scripts/tag_wheel.py RAW.whl OUT_DIR

Fails where no manylinux policy fits, the wheel needs a library beside PyTorch's and the system's,
is not for the stable ABI, or is too large.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL_MB = 50
LIBRARY_MB = 40  # of the stripped library
# PyTorch's own, which is loaded before heed is.
NOT_PACKED = ["libtorch_cpu.so"]


def library(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
        if libraries != ["heed/_heed.so"]:
            sys.exit(f"{wheel} has {libraries}, not heed/_heed.so alone")
        return archive.read(libraries[0])


def main() -> None:
    raw, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("heed-*.whl"):
        old.unlink()
    excluded = [word for name in NOT_PACKED for word in ("--exclude", name)]
    audit = [sys.executable, "-m", "auditwheel"]
    done = subprocess.run(
        [*audit, "repair", *excluded, "--wheel-dir", out, raw], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr + done.stdout)
    wheel = next(out.glob("heed-*.whl"))
    tag = re.fullmatch(r"heed-[\d.]+-(cp310-abi3-manylinux_\d+_\d+_\w+)\.whl", wheel.name)
    if not tag:
        sys.exit(f"{wheel} must be for cp310-abi3 and a manylinux policy")
    code = library(wheel)
    if code != library(raw):
        sys.exit("auditwheel has changed heed/_heed.so")
    wheel_mb, library_mb = wheel.stat().st_size / 1e6, len(code) / 1e6
    print(f"{wheel}: {wheel_mb:.1f} MB, heed/_heed.so {library_mb:.1f} MB")
    if wheel_mb > WHEEL_MB or library_mb > LIBRARY_MB:
        sys.exit(f"the limits are {WHEEL_MB} MB and {LIBRARY_MB} MB")


if __name__ == "__main__":
    main()
