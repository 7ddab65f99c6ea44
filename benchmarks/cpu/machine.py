"""Where numbers come from, and what that machine can do at most."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def cpu_model() -> str:
    """The name of /proc/cpuinfo with family and model, which tell generations of a name apart."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields['cpu family']} model {fields['model']})"


def commit() -> str:
    command = [ROOT / "scripts" / "commit.sh"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> dict[str, str]:
    """What a reader must know about where the numbers come from."""
    return {
        "cpu": cpu_model(),
        "kernels": torch.ops.heed.kernels().splitlines()[0].split("\t")[1],
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


@dataclass
class Peaks:
    """What `heed bench --peaks` measures."""

    fma: float  # GFLOP/s of fp32 multiply-adds
    dot: float  # GFLOP/s of bf16 dot products; where there are none, of fp32 multiply-adds
    read: float  # GB/s from memory

    def compute(self, dtype: str) -> float:
        return max(self.dot, self.fma) if dtype == "bf16" else self.fma


def mean(a: Peaks, b: Peaks) -> Peaks:
    return Peaks((a.fma + b.fma) / 2, (a.dot + b.dot) / 2, (a.read + b.read) / 2)


class Tool:
    """The `heed` command, run on as many threads as torch has."""

    def __init__(self, path: str | None) -> None:
        found = [Path(path)] if path else sorted(ROOT.glob("build/*/tools/heed/heed"))
        if not found or not found[0].exists():
            sys.exit(
                "this needs the `heed` command: cmake --preset cpu && "
                "cmake --build --preset cpu --target heed_cli, or --tool PATH"
            )
        self.path = str(found[0])

    def bench(self, *flags: str, isa: str = "") -> dict:
        env = dict(os.environ, HEED_NUM_THREADS=str(torch.get_num_threads()), HEED_FORCE_ISA=isa)
        command = [self.path, "bench", "--json", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        return json.loads(done.stdout)

    def peaks(self) -> Peaks:
        r = self.bench("--peaks", "--seqlen-q", "1", "--heads-q", "1", "--seconds", "0")
        fma = r["peak_fma_gflops"]
        return Peaks(fma, r["peak_bf16_gflops"] or fma, r["peak_read_gbs"])

    def host_us(self) -> float:
        """Microseconds of planning and running one query row against one key."""
        r = self.bench("--seqlen-q", "1", "--heads-q", "1", "--seconds", "0.2")
        return (r["seconds_plan"] + r["seconds_median"]) * 1e6
