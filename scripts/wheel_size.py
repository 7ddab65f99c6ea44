#!/usr/bin/env python3
"""Prints how large a wheel and its library are; fails above LIMIT_MB."""

import sys
import zipfile
from pathlib import Path

LIMIT_MB = 40  # of the stripped library

wheel = Path(sys.argv[1])
with zipfile.ZipFile(wheel) as archive:
    library_mb = archive.getinfo("heed/_heed.so").file_size / 1e6
print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, heed/_heed.so {library_mb:.1f} MB")
if library_mb > LIMIT_MB:
    sys.exit(f"heed/_heed.so has {library_mb:.1f} MB, the limit is {LIMIT_MB} MB")
