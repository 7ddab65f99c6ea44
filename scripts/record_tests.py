#!/usr/bin/env python3
"""Writes what a test run ran on, and how many tests passed, to benchmarks/results/tests.json.

    make test RECORD=1
    scripts/record_tests.py NAME --command COMMAND [--build BUILD_DIR] REPORT.xml ...

The reports are JUnit's: of ctest, whose tests are programs, and of pytest. Run by the Python that
ran the tests.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

import torch

import heed.doctor

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "tests.json"


def counts(report: Path) -> dict:
    """Programs of ctest or tests of pytest, by how they ended."""
    root = ElementTree.parse(report).getroot()
    suite = root if root.tag == "testsuite" else root[0]
    number = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    skipped = number["skipped"] + int(suite.get("disabled", 0))
    return {
        "kind": "Python tests" if suite.get("name") == "pytest" else "C++ programs",
        "passed": number["tests"] - failed - skipped,
        "skipped": skipped,
        "failed": failed,
    }


def said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def compilers(build: Path | None) -> dict:
    """What CMake found there; nothing where the library was not built here."""
    if build is None or not (cache := build / "CMakeCache.txt").exists():
        return {}
    found = dict(re.findall(r"^CMAKE_(\w+)_COMPILER:\w+=(.*)$", cache.read_text(), re.M))
    result = {}
    if "CXX" in found:
        result["compiler"] = said(found["CXX"], "--version").partition("\n")[0]
    if "CUDA" in found:
        result["nvcc"] = re.search(r"V([\d.]+)", said(found["CUDA"], "--version"))[1]
    return result


def environment() -> dict:
    here = heed.doctor.machine()
    gpus = sorted({k.family for k in here.kernels if k.on_gpu})
    result = {
        "os": platform.freedesktop_os_release()["PRETTY_NAME"],
        "glibc": platform.libc_ver()[1],
        "processor": platform.machine(),
        "kernels": here.isa,
        "gpu_kernels": gpus,  # of the build; empty: without CUDA
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }
    if here.gpu and torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
        result["cuda"] = torch.version.cuda
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="newest, oldest or gpu")
    parser.add_argument("--command", required=True)
    parser.add_argument("--build", type=Path)
    parser.add_argument("reports", nargs="+", type=Path)
    args = parser.parse_args()
    run = {
        **environment(),
        **compilers(args.build),
        "parts": [counts(report) for report in args.reports],
        "date": datetime.date.today().isoformat(),
        "commit": said(str(ROOT / "scripts" / "commit.sh")),
        "command": args.command,
    }
    if any(part["failed"] for part in run["parts"]):
        sys.exit("nothing is recorded of a run that failed")
    data = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": {}}
    data["runs"][args.name] = run
    RESULT.write_text(json.dumps(data, indent=1) + "\n")
    print(f"wrote {RESULT.relative_to(ROOT)}: {args.name}")


if __name__ == "__main__":
    main()
