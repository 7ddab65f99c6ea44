"""Times causal attention on one GPU and, by PyTorch's context parallelism, on several.

A process per GPU has its part of the tokens; keys and values go around. A time is the median of the
rounds, each that of the slowest process, from idle GPUs to idle GPUs. Projections, loss and
optimizer are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import machine
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

from heed import sdpa

RESULT = Path(__file__).resolve().parents[1] / "results" / "cuda_scaling.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KEY_HEADS, DIM = 32, 8, 128
SEQLENS = (8192, 32768, 131072)


def on_cpu(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
    """What PyTorch's function calls on a GPU; its operator for CPUs cannot go around."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # context_parallel replaces the attribute of F.
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def milliseconds(call: Callable[[], object], rounds: int) -> float:
    times = torch.zeros(rounds)
    for index in range(-2, rounds):
        dist.barrier()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        if index >= 0:
            times[index] = (time.perf_counter() - start) * 1e3
    times = times.to(DEVICE)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return statistics.median(times.tolist())


def measure(seqlen: int, rounds: int) -> dict[str, float]:
    """ms of a forward pass and of a forward with a backward pass, in this process group."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, k, v = (
        torch.randn(1, heads, seqlen, DIM, device=DEVICE, dtype=dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    parts: contextlib.AbstractContextManager = contextlib.nullcontext()
    if dist.get_world_size() > 1:
        mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
        parts = context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2])
    with parts:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        dout = torch.randn_like(q)

        def forward() -> None:
            with torch.no_grad():
                attend(*inputs)

        def training() -> None:
            torch.autograd.grad(attend(*inputs), inputs, dout)

        return {
            "forward": milliseconds(forward, rounds),
            "training": milliseconds(training, rounds),
        }


def process(rank: int, size: int, folder: str, rounds: int, seqlens: tuple[int, ...]) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        on_cpu.__name__ = "scaled_dot_product_attention"  # the name that context_parallel looks for
        F.scaled_dot_product_attention = on_cpu
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo",
        init_method=f"file://{folder}/store{size}",
        rank=rank,
        world_size=size,
    )
    cells = []
    for seqlen in seqlens:
        cell = {"gpus": size, "seqlen": seqlen}
        with sdpa.activated(unsupported="error"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            cell["heed"] = measure(seqlen, rounds)
        if DEVICE == "cuda":
            try:
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    cell["torch"] = measure(seqlen, rounds)
            except RuntimeError as error:
                print(f"  PyTorch's kernels fail: {str(error).splitlines()[0]}")
        cells.append(cell)
    if rank == 0:
        Path(folder, f"{size}.json").write_text(json.dumps(cells))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: a check")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args()
    there = torch.cuda.device_count() if DEVICE == "cuda" else 2
    sizes = [size for size in (1, 2, 4, 8) if size <= there]
    if len(sizes) < 2:
        raise SystemExit("this needs two GPUs, and PyTorch sees one")
    seqlens = (64, 128) if args.tiny else SEQLENS
    cells = []
    columns = f"{'forward ms':>12}{'x':>6}{'training ms':>13}{'x':>6}"
    print(f"{'GPUs':>4} {'seqlen':>8} {'kernels':8}{columns}")
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            torch.multiprocessing.spawn(
                process, (size, folder, args.rounds, seqlens), nprocs=size, join=True
            )
            cells += json.loads(Path(folder, f"{size}.json").read_text())
    alone = {cell["seqlen"]: cell for cell in cells if cell["gpus"] == 1}
    for cell in cells:
        for name in ("heed", "torch"):
            if name not in cell:
                continue
            text = f"{cell['gpus']:4} {cell['seqlen']:8} {name:8}"
            for work, width in (("forward", 12), ("training", 13)):
                ms = cell[name][work]
                text += f"{ms:{width}.3f}{alone[cell['seqlen']][name][work] / ms:6.2f}"
            print(text)
    if args.save:
        about = machine()
        if DEVICE == "cuda":
            about["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        shape = {"heads": HEADS, "key_heads": KEY_HEADS, "head_dim": DIM}
        data = {"machine": about, "shape": shape, "cells": cells}
        RESULT.write_text(json.dumps(data, indent=1) + "\n")
        print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
