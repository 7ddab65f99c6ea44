"""What limits the forward: hardware counters of one launch each beside its peers (Nsight Compute).

python benchmarks/cuda/counters.py [--save]   needs ncu in PATH and leave to read the counters
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from kernels import HIDDEN, ROOT, TOKENS, forward_calls, mask_cases, randn, works
from machine import machine

# head_dim, seqlen, causal
CASES = (
    (64, 512, True),
    (128, 512, False),
    (128, 512, True),
    (256, 512, False),
    (256, 512, True),
    (64, 16384, False),
    (128, 8192, False),
    (128, 8192, True),
    (256, 8192, False),
)
MASKED = ((64, "window"), (128, "window"), (64, "packed"), (128, "packed"))  # of mask_cases
METRICS = {
    "us": "gpu__time_duration.sum",
    "cycles": "sm__cycles_elapsed.max",
    "active cycles": "sm__cycles_active.avg",
    "tensor pipe %": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue slots %": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "DRAM MB": "dram__bytes.sum",
    "L2 read MB": "lts__t_sectors_op_read.sum",
}
UNITS = {"us": 1e-3, "DRAM MB": 1e-6, "L2 read MB": 32e-6}  # from ns, bytes and sectors of 32 bytes
# In the mangled names of the peers' kernels, one of which each call launches: of other names ncu
# prints no namespaces.
KERNELS = {
    "heed": r"^_ZN4heed4sm\d\d7forward",
    "flash": r"flash_fwd_(splitkv_)?kernel",
    "cudnn": r"^cudnn_.*sdpa",
    "fa4": r"(?i)flash_?attention",
}


def cases() -> Iterator[tuple[str, dict[str, Callable]]]:
    """Names, and calls by peer."""
    for d, seqlen, causal in CASES:
        q, k, v = (randn(TOKENS // seqlen, seqlen, HIDDEN // d, d) for _ in range(3))
        name = f"d{d} {TOKENS // seqlen}x{seqlen} {'causal' if causal else 'full'}"
        yield name, forward_calls(q, k, v, causal)
    for d, which in MASKED:
        for name, case in mask_cases(d).items():
            if which in name:
                calls = {peer: partial(call, *case.tensors) for peer, call in case.calls.items()}
                yield f"d{d} {name}", calls


LAUNCHED = "launched "  # begins a line that says what was launched: case, peer


@torch.no_grad()
def launch_all() -> None:
    """What ncu looks at: every case by every peer, once. What comes before is not looked at."""
    for name, calls in cases():
        for peer, call in calls.items():
            if peer in KERNELS and works(call, f"{peer}, {name}"):
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
                print(f"{LAUNCHED}{name}, {peer}", flush=True)


def measure() -> list[dict]:
    """ncu's table of launch_all() in a process of its own, a dictionary per case."""
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv"]
    command += ["--page", "raw", "--print-units", "base", "--print-kernel-base", "mangled"]
    command += ["--metrics", ",".join(METRICS.values())]
    if shutil.which(command[0]) is None:
        sys.exit("ncu must be in PATH: a full CUDA installation has it")
    done = subprocess.run(
        [*command, sys.executable, __file__, "--launch"], capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    rows = [row for row in csv.reader(lines) if len(row) > len(METRICS)]
    if done.returncode or not rows:
        sys.exit(f"ncu measured nothing:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    head, launches = rows[0], [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    assert set(METRICS.values()) <= set(head), (
        f"ncu does not know {set(METRICS.values()) - set(head)}"
    )
    asked = [x.removeprefix(LAUNCHED).split(", ") for x in lines if x.startswith(LAUNCHED)]
    cells = {name: {"shape": name, "peers": {}} for name, _ in asked}
    names = sorted({launch["Kernel Name"] for launch in launches})
    for peer in KERNELS:
        own = [x for x in launches if peer_of(x["Kernel Name"]) == peer]
        shapes = [name for name, of in asked if of == peer]
        if len(own) != len(shapes):
            said = f"{peer}: {len(own)} launches, {len(shapes)} were expected, of {names}"
            if peer == "heed":
                sys.exit(said)
            print(f"left out: {said}")
            continue
        for shape, launch in zip(shapes, own, strict=True):
            cells[shape]["peers"][peer] = {
                name: float(launch[metric].replace(",", "")) * UNITS.get(name, 1.0)
                for name, metric in METRICS.items()
            }
    return list(cells.values())


def peer_of(kernel: str) -> str | None:
    """Whose kernel has this mangled name."""
    return next((peer for peer, own in KERNELS.items() if re.search(own, kernel)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="write results/cuda_counters.json")
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.launch:
        return launch_all()
    cells = measure()
    for cell in cells:
        for peer, values in cell["peers"].items():
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(f"{cell['shape']:22} {peer:6} {numbers}")
    if arguments.save:
        path = ROOT / "benchmarks" / "results" / "cuda_counters.json"
        data = {"machine": machine() | {"cudnn": torch.backends.cudnn.version()}, "cells": cells}
        path.write_text(json.dumps(data, indent=1) + "\n")
        print(path.relative_to(ROOT))
    return None


if __name__ == "__main__":
    main()
