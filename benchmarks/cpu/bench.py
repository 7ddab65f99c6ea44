"""Times heed beside torch's scaled_dot_product_attention on this CPU, in turns in one process, and
sets it beside what the machine can do at most, measured before and after each case.

--save keeps a set of results per CPU and number of threads in benchmarks/results/cpu.json: parts
may be run one by one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import torch
from machine import ROOT, Peaks, Tool, machine, mean
from timing import alone
from work import WORKS, Cell, square, tensors

import heed

RESULTS = ROOT / "benchmarks" / "results"


def bound(cell: Cell, peaks: Peaks) -> tuple[str, float]:
    """What limits a case, and the least time in ms that it allows."""
    compute = peaks.compute(cell.dtype)
    limits = {"compute": cell.flops / compute * 1e-6, "read": cell.bytes / peaks.read * 1e-6}
    name = max(limits, key=lambda key: limits[key])
    return name, limits[name]


def measure(name: str, tool: Tool, seconds: float) -> list[dict]:
    """The cells of one work as they are saved."""

    def peaks() -> Peaks:
        threads = torch.get_num_threads()
        if name == "1 thread":
            torch.set_num_threads(1)
        try:
            return tool.peaks()
        finally:
            torch.set_num_threads(threads)

    cells = []
    before = peaks()
    for cell in WORKS[name](seconds):
        after = before if name == "short" else peaks()
        around = mean(before, after)
        before = after
        limit, least = bound(cell, around)
        row = asdict(cell) | {
            "bound": limit,
            "share": round(least / cell.heed_ms, 4),
            "torch_share": round(least / cell.torch_ms, 4) if cell.torch_ms else 0.0,
            "ratio": round(cell.torch_ms / cell.heed_ms, 3),
            "peaks": {key: round(value, 1) for key, value in asdict(around).items()},
        }
        cells.append(row)
        print(
            f"{cell.work:9} {cell.shape:28} {cell.dtype:5} {cell.heed_ms:10.3f} "
            f"{cell.torch_ms:10.3f} {row['ratio']:7.2f} {row['share']:7.1%} {limit:8}"
            + (f" goal {cell.goal:.0%}" if cell.goal else ""),
            flush=True,
        )
    return cells


def avx2(tool: Tool, seconds: float) -> list[dict]:
    """The forward on AVX2 alone, in C++, as a share of AVX2's own peak."""
    cells = []
    for dtype, name in (("fp32", "f32"), ("bf16", "bf16"), ("fp16", "f16")):
        for dim in (128, 64):
            flags = ["--dtype", name, "--head-dim", str(dim), "--seconds", str(seconds)]
            r = tool.bench("--peaks", *flags, isa="avx2")
            cell = {
                "work": "avx2",
                "shape": square(dim, False),
                "dtype": dtype,
                "heed_ms": r["seconds_median"] * 1e3,
                "torch_ms": 0.0,
                "goal": 0.75,
                "bound": "compute",
                "share": round(r["share_of_fma_peak"], 4),
                "ratio": 0.0,
            }
            cells.append(cell)
            print(f"{cell['work']:9} {cell['shape']:28} {dtype:5} {cell['share']:.1%}", flush=True)
    return cells


def host(tool: Tool) -> dict[str, float]:
    """Microseconds of a call that computes next to nothing."""
    q, k, v = tensors(1, 1, 1, 64, "fp32")
    return {
        "cpp_us": round(tool.host_us(), 2),
        "torch_us": round(alone(lambda: heed.attention(q, k, v), 0.5) * 1e3, 2),
    }


def save(path: Path, result: dict) -> None:
    """Replaces what the file has of the same works on as many threads of the same CPU, of which a
    virtual machine may show a part. What stays and was measured at another commit says at which."""
    data = json.loads(path.read_text()) if path.exists() else {"machines": []}
    same = [
        m
        for m in data["machines"]
        if all(m["machine"][key] == result["machine"][key] for key in ("cpu", "threads", "kernels"))
    ]
    if same:
        old = same[0]["machine"]
        result["host"] = result["host"] or same[0]["host"]
        commands = [*old["command"].split(" && "), result["machine"]["command"]]
        result["machine"]["command"] = " && ".join(dict.fromkeys(commands))
        new = {cell["work"] for cell in result["cells"]}
        kept = [cell for cell in same[0]["cells"] if cell["work"] not in new]
        if old["commit"] != result["machine"]["commit"]:
            kept = [{"commit": old["commit"]} | cell for cell in kept]
        result["cells"] = kept + result["cells"]
        order = [*WORKS, "avx2"]
        result["cells"].sort(key=lambda cell: order.index(cell["work"]))
    if same:
        data["machines"][data["machines"].index(same[0])] = result
    else:
        data["machines"].append(result)
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="per measured pair")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--only", action="append", choices=[*WORKS, "avx2", "host"], help="repeat for several"
    )
    parser.add_argument("--tool", help="the heed command; build/*/tools/heed/heed")
    parser.add_argument("--save", action="store_true", help="into benchmarks/results/cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    tool = Tool(args.tool)
    wanted = args.only or [*WORKS, "avx2", "host"]
    print(f"{'work':9} {'shape':28} {'dtype':5} {'heed ms':>10} {'torch ms':>10} ratio   share")
    cells = [cell for name in WORKS if name in wanted for cell in measure(name, tool, args.seconds)]
    if "avx2" in wanted:
        cells += avx2(tool, args.seconds)
    for work in dict.fromkeys(cell["work"] for cell in cells if cell["ratio"]):
        ratios = [c["ratio"] for c in cells if c["work"] == work]
        print(f"{work}: {statistics.geometric_mean(ratios):.2f}x torch, least {min(ratios):.2f}x")
    calls = host(tool) if "host" in wanted else {}
    if calls:
        print(f"host time: {calls['cpp_us']} us in C++, {calls['torch_us']} us in PyTorch")
    if args.save:
        save(RESULTS / "cpu.json", {"machine": machine(), "host": calls, "cells": cells})


if __name__ == "__main__":
    main()
