#!/usr/bin/env python3
"""Compiles the CUDA kernels and reports what each costs: registers, spills, seconds, memory.

    scripts/cuda_report.py [--save] [--build-dir build/report] [--jobs 2] [-- -DHEED_CUDA_ARCHS=90]

What stands after -- goes to CMake. nvcc is the one that CMake finds ($CUDACXX first). A table
of the slowest files and of all kernels that spill is printed; --save writes everything to
benchmarks/results/cuda_build.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "cuda_build.json"
LIMITS = {"minutes": 15, "file_seconds": 25, "file_mb": 1500, "library_mb": 40}

COMPILED = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.S,
)
# A kernel's template arguments: element, tile, score.
ATTENTION = re.compile(
    r"4heed4(?P<family>sm80|sm90)\d+(?P<kernel>forward|decode|backward)I\w*?Config"
    r"INS_\d(?P<dtype>b?f16)E\w*?TileE(?P<tile>(?:L[ib]\d+E)+)E\w*?\d(?P<score>Plain|Softcap|General)Score"
)
HOPPER_FORWARD = (
    "head_dim",
    "head_dim_v",
    "consumers",
    "tile_n",
    "stages",
    "own_out",
    "chained",
    "q_slots",
)
FORWARD = ("head_dim", "tile_m", "tile_n", "warps", "ctas", "packed", "stages", "key_warps")
HOPPER_BACKWARD = ("head_dim", "tile_m", "tile_n", "stages")
BACKWARD = ("head_dim", "tile_m", "tile_n", "keys", "share", "stages")


# ---- around one compilation ----


def compile_one(command: list[str]) -> int:
    """Runs nvcc with a report of its assembler; leaves both beside the object file."""
    target = Path(command[command.index("-o") + 1])
    if "-c" not in command or target.suffix != ".o":
        return subprocess.run(command).returncode
    start = time.perf_counter()
    done = subprocess.run([*command, "-Xptxas=-v"], capture_output=True, text=True)
    wall = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        return done.returncode
    # Products of Hopper's tensor cores that the assembler puts one after another.
    if re.search(r"C75\d\d", done.stderr + done.stdout):
        sys.stderr.write(done.stderr + done.stdout)
        return 1
    report = {
        "file": Path(command[command.index("-c") + 1]).name,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_seconds": round(wall, 2),
        "mb": round(usage.ru_maxrss / 1024),  # of its largest process
        "kernels": kernels_in(done.stderr + done.stdout),
    }
    target.with_suffix(".report.json").write_text(json.dumps(report))
    return 0


def kernels_in(text: str) -> list[dict]:
    kernels = []
    for match in COMPILED.finditer(text):
        kernel: dict = {"arch": match["arch"]}
        if found := ATTENTION.search(match["symbol"]):
            tile = [int(n) for n in re.findall(r"L[ib](\d+)E", found["tile"])]
            backward = "Backward" in match["symbol"]
            if found["family"] == "sm90":
                names = HOPPER_BACKWARD if backward else HOPPER_FORWARD
            else:
                names = BACKWARD if backward else FORWARD
            kernel |= {
                "family": found["family"],
                "kernel": found["kernel"],
                "dtype": found["dtype"],
                "score": found["score"].lower(),
                "tile": dict(zip(names, tile, strict=True)),
            }
        else:
            kernel["kernel"] = match["symbol"]
        kernel |= {
            "registers": int(match["registers"]),
            "spill_bytes": int(match["stores"]) + int(match["loads"]),
        }
        kernels.append(kernel)
    return kernels


# ---- all of them ----


def said(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip()


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def build(build_dir: Path, jobs: int, options: list[str]) -> float:
    """Minutes of the whole build: the library with all kernels, its tool, the operators."""
    launcher = f"{sys.executable};{Path(__file__).resolve()};--compile"
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_COMPILER_LAUNCHER": launcher,
        "Python_EXECUTABLE": sys.executable,
        "HEED_CUDA": "ON",
        "HEED_BUILD_TORCH": "ON",
        "HEED_BUILD_TESTS": "OFF",
        "HEED_BUILD_EXAMPLES": "OFF",
    }
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", build_dir, "-G", "Ninja", *defines, *options], check=True
    )
    start = time.perf_counter()
    subprocess.run(
        ["cmake", "--build", build_dir, "-j", str(jobs), "--target", "_heed", "heed_cli"],
        check=True,
    )
    return (time.perf_counter() - start) / 60


def collect(build_dir: Path) -> tuple[list[dict], list[dict]]:
    """Files, slowest first, and kernels: what a kernel is, and what each GPU's code of it costs."""
    files = [json.loads(p.read_text()) for p in sorted(build_dir.rglob("*.report.json"))]
    kernels: dict[tuple, dict] = {}
    for file in files:
        for k in file.pop("kernels"):
            cost = {"registers": k.pop("registers"), "spill_bytes": k.pop("spill_bytes")}
            arch = k.pop("arch")
            name = file["file"].removesuffix(".cu")
            key = (name, k["kernel"], k.get("dtype"))
            kernels.setdefault(key, {"file": name, **k, "archs": {}})["archs"][arch] = cost
    return sorted(files, key=lambda f: -f["cpu_seconds"]), list(kernels.values())


def to_text(data: dict) -> str:
    """JSON with a line per file and per kernel."""
    lines = []
    for name, value in data.items():
        if isinstance(value, list):
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f" {json.dumps(name)}: [\n  {items}\n ]")
        else:
            lines.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.relative_to(ROOT)}")
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "report")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("options", nargs="*", help="for CMake, after --")
    args = parser.parse_args()
    build_dir = args.build_dir.resolve()

    minutes = build(build_dir, args.jobs, args.options)
    files, kernels = collect(build_dir)
    library = next(build_dir.rglob("_heed.so"))
    stripped = build_dir / "stripped.so"
    subprocess.run(["strip", "-o", stripped, library], check=True)
    rows = json.loads(said(next(build_dir.rglob("tools/heed/heed")), "list", "--json"))["kernels"]
    cache = (build_dir / "CMakeCache.txt").read_text()
    nvcc = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache, re.M)[1]
    archs = re.search(r"^HEED_CUDA_ARCHS:\w+=(.*)$", cache, re.M)[1]
    totals = {
        "minutes": round(minutes, 1),
        "cuda_cpu_minutes": round(sum(f["cpu_seconds"] for f in files) / 60, 1),
        "files": len(files),
        "file_seconds": files[0]["cpu_seconds"],
        "file_mb": max(f["mb"] for f in files),
        "library_mb": round(stripped.stat().st_size / 1e6, 1),
        "kernels": len(kernels),
        "spilling": sum(any(c["spill_bytes"] for c in k["archs"].values()) for k in kernels),
    }
    data = {
        "machine": {
            "cpu": cpu_name(),
            "jobs": args.jobs,
            "load": round(os.getloadavg()[2], 1),  # of the last 15 minutes
            "nvcc": re.search(r"V([\d.]+)", said(nvcc, "--version"))[1],
            "archs": archs,
            "date": datetime.date.today().isoformat(),
            "commit": said(ROOT / "scripts" / "commit.sh"),
            "command": shlex.join(  # where it was built says nothing elsewhere
                ["python", "scripts/cuda_report.py", "--save", "--jobs", str(args.jobs)]
                + (["--", *args.options] if args.options else [])
            ),
        },
        "limits": LIMITS,
        "totals": totals,
        "smem_bytes": {row["name"]: row["smem_bytes"] for row in rows if row["smem_bytes"]},
        "files": files,
        "kernels": kernels,
    }

    print(f"\n{'file':42}{'cpu s':>8}{'wall s':>8}{'MB':>7}")
    for f in files[:10]:
        print(f"{f['file']:42}{f['cpu_seconds']:8.1f}{f['wall_seconds']:8.1f}{f['mb']:7}")
    print(f"\n{'kernels that spill':52}{'arch':>8}{'registers':>11}{'spill bytes':>13}")
    for k in kernels:
        for arch, cost in k["archs"].items():
            if cost["spill_bytes"]:
                name = f"{k['file']} {k['kernel']} {k.get('dtype', '')}"
                print(f"{name:52}{arch:>8}{cost['registers']:11}{cost['spill_bytes']:13}")
    print("\n" + ", ".join(f"{name} {value}" for name, value in totals.items()))
    if args.save:
        RESULT.write_text(to_text(data))
        print(f"wrote {RESULT.relative_to(ROOT)}")
    broken = [
        f"{name} = {totals[name]}, the limit is {m}"
        for name, m in LIMITS.items()
        if totals[name] > m
    ]
    if broken:
        sys.exit("; ".join(broken))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        sys.exit(compile_one(sys.argv[2:]))
    main()
