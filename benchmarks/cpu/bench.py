"""Times heed beside torch's scaled_dot_product_attention on this CPU, in turns in one process."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import heed

RESULTS = Path(__file__).resolve().parent.parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Cell:
    """One measured case; times are medians in milliseconds."""

    work: str
    shape: str
    dtype: str
    heed_ms: float
    torch_ms: float
    gflops: float  # of the visible scores, by heed
    gbytes: float  # keys and values read once per second, by heed; decode only

    @property
    def ratio(self) -> float:
        return self.torch_ms / self.heed_ms


def interleaved(
    a: Callable[[], object], b: Callable[[], object], seconds: float
) -> tuple[float, float]:
    """Medians in ms of two functions called in turn for about `seconds`, at least seven times."""
    times: tuple[list[float], list[float]] = ([], [])
    for f in (a, b):
        f()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[1]) < 7:
        for f, log in zip((a, b), times, strict=True):
            start = time.perf_counter()
            f()
            log.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def tensors(
    batch: int, seqlen: int, heads: int, dim: int, dtype: torch.dtype, n: int = 3
) -> list[torch.Tensor]:
    """n tensors [batch, seqlen, heads, dim], as a model's projections leave them."""
    return [torch.randn(batch, seqlen, heads, dim, dtype=dtype) for _ in range(n)]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    """torch's attention on heed's layout."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options
    )
    return out.transpose(1, 2)


def dense(dtype: str, dim: int, causal: bool, seconds: float) -> list[Cell]:
    """Forward and backward, batch 1, 8 heads, 2048 tokens."""
    q, k, v = tensors(1, 2048, 8, dim, DTYPES[dtype])
    dout = torch.randn_like(q)
    shape = f"B1 H8 S2048 D{dim} {'causal' if causal else 'full'}"
    flops = 4 * 8 * 2048 * 2048 * dim * (0.5 if causal else 1.0)

    def ours() -> torch.Tensor:
        return heed.attention(q, k, v, causal=causal)

    def theirs() -> torch.Tensor:
        return sdpa(q, k, v, is_causal=causal)

    with torch.no_grad():
        a, b = interleaved(ours, theirs, seconds)
    cells = [Cell("forward", shape, dtype, a, b, flops / a * 1e-6, 0.0)]
    for x in (q, k, v):
        x.requires_grad_()
    outs = [ours(), theirs()]
    a, b = interleaved(
        *(
            lambda o=o: torch.autograd.grad(o, (q, k, v), dout, retain_graph=True)  # type: ignore[misc]
            for o in outs
        ),
        seconds,
    )
    return [*cells, Cell("backward", shape, dtype, a, b, 2.5 * flops / a * 1e-6, 0.0)]


def padded(dtype: str, seconds: float) -> list[Cell]:
    """Right-padded batch, 8 x 512 at 55 % fill: heed takes lengths, torch a bool mask."""
    q, k, v = tensors(8, 512, 12, 64, DTYPES[dtype])
    lengths = torch.tensor([512, 430, 380, 300, 230, 180, 130, 91], dtype=torch.int32)
    mask = torch.arange(512)[None, :] < lengths[:, None]
    flops = float(4 * 12 * 64 * (lengths.double() ** 2).sum())

    def ours() -> torch.Tensor:
        return heed.attention(q, k, v, seqused_q=lengths, seqused_k=lengths)

    with torch.no_grad():
        a, b = interleaved(ours, lambda: sdpa(q, k, v, attn_mask=mask[:, None, None, :]), seconds)
    fill = float(mask.double().mean())
    return [Cell("padded", f"B8 S512 H12 D64 {fill:.0%} fill", dtype, a, b, flops / a * 1e-6, 0.0)]


def decode(dtype: str, heads_first: bool, seconds: float) -> list[Cell]:
    """One query against 8192 keys, 32 query and 8 key heads, rotating over caches that leave L3.

    heads_first: a cache in memory as [batch, heads, seqlen, dim], as Transformers keeps it.
    """
    caches = [
        tensors(1, 8192, 8, 128, DTYPES[dtype], 2) for _ in range(4 if dtype == "fp32" else 8)
    ]
    if heads_first:
        caches = [
            [x.transpose(1, 2).contiguous().transpose(1, 2) for x in cache] for cache in caches
        ]
    q = torch.randn(1, 1, 32, 128, dtype=DTYPES[dtype])
    turn = {"ours": 0, "theirs": 0}

    def next_cache(who: str) -> list[torch.Tensor]:
        turn[who] += 1
        return caches[turn[who] % len(caches)]

    with torch.no_grad():
        a, b = interleaved(
            lambda: heed.attention(q, *next_cache("ours")),
            lambda: sdpa(q, *next_cache("theirs"), enable_gqa=True),
            seconds,
        )
    bytes_read = 2 * 8192 * 8 * 128 * q.element_size()
    flops = 4 * 32 * 8192 * 128
    layout = "heads first" if heads_first else "tokens first"
    return [
        Cell(
            "decode",
            f"1 x 8192 H32/8 D128 {layout}",
            dtype,
            a,
            b,
            flops / a * 1e-6,
            bytes_read / a * 1e-6,
        )
    ]


def machine() -> dict[str, str]:
    """What a reader must know about where the numbers come from."""
    model = platform.processor()
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    ):
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "cpu": model,
        "kernels": torch.ops.heed.kernels().splitlines()[0].split("\t")[1],
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "command": shlex.join(["python", *sys.argv]),
    }


def geomean(values: list[float]) -> float:
    return statistics.geometric_mean(values) if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="per measured pair")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=["dense", "padded", "decode"])
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    cells: list[Cell] = []
    head = f"{'work':9} {'shape':32} {'dtype':5} {'heed ms':>9} {'torch ms':>9} {'ratio':>6}"
    print(f"{head} {'GFLOP/s':>8}")
    for dtype in DTYPES:
        runs: list[Callable[[], list[Cell]]] = []
        if args.only in (None, "dense"):
            runs += [
                lambda t=dtype, d=d, c=c: dense(t, d, c, args.seconds)  # type: ignore[misc]
                for d in (64, 128)
                for c in (False, True)
            ]
        if args.only in (None, "padded"):
            runs.append(lambda t=dtype: padded(t, args.seconds))  # type: ignore[misc]
        if args.only in (None, "decode"):
            runs += [
                lambda t=dtype, h=h: decode(t, h, args.seconds)  # type: ignore[misc]
                for h in (True, False)
            ]
        for run in runs:
            for cell in run():
                cells.append(cell)
                print(
                    f"{cell.work:9} {cell.shape:32} {cell.dtype:5} {cell.heed_ms:9.2f} "
                    f"{cell.torch_ms:9.2f} {cell.ratio:6.2f} {cell.gflops:8.1f}",
                    flush=True,
                )
    for work in dict.fromkeys(cell.work for cell in cells):
        mean = geomean([c.ratio for c in cells if c.work == work])
        print(f"{work}: geometric mean {mean:.2f}x torch")
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{args.save}.json"
        rows = [{**asdict(c), "ratio": round(c.ratio, 3)} for c in cells]
        path.write_text(json.dumps({"machine": machine(), "cells": rows}, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
