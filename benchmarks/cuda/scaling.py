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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

from heed import sdpa

RESULT = Path(__file__).resolve().parents[1] / "results" / "cuda_scaling.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, KEY_HEADS, DIM = 32, 8, 128
SEQLENS = (8192, 32768, 65536)
SECONDS = 1.0  # of a measurement, unless 3 rounds take longer


def on_cpu(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
    """What PyTorch's function calls on a GPU; its operator for CPUs cannot go around."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # context_parallel replaces the attribute of F.
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def milliseconds(call: Callable[[], object], rounds: int, group: dist.ProcessGroup) -> float:
    """The first round counts for nothing; the second says how many fit into SECONDS."""
    times: list[float] = []
    count = rounds
    while len(times) <= count:
        dist.barrier(group)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        slowest = torch.tensor(time.perf_counter() - start, device=DEVICE)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
        times.append(slowest.item() * 1e3)
        if len(times) == 2:
            count = min(rounds, max(3, int(SECONDS * 1e3 / times[1])))
    return statistics.median(times[1:])


def measure(seqlen: int, rounds: int, mesh: DeviceMesh) -> dict[str, float]:
    """ms of a forward pass and of a forward with a backward pass, by the processes of a mesh."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, k, v = (
        torch.randn(1, heads, seqlen, DIM, device=DEVICE, dtype=dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    parts: contextlib.AbstractContextManager = contextlib.nullcontext()
    if mesh.size() > 1:
        parts = context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2])
    with parts:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        dout = torch.randn_like(q)

        def forward() -> None:
            with torch.no_grad():
                attend(*inputs)

        def training() -> None:
            torch.autograd.grad(attend(*inputs), inputs, dout)

        group = mesh.get_group()
        return {
            "forward": milliseconds(forward, rounds, group),
            "training": milliseconds(training, rounds, group),
        }


def line(cell: dict, name: str, alone: dict[str, float]) -> str:
    text = f"{cell['gpus']:4} {cell['seqlen']:8} {name:8}"
    for work, width in (("forward", 12), ("training", 13)):
        ms = cell[name][work]
        text += f"{ms:{width}.3f}{alone[work] / ms:6.2f}"
    return text


def process(
    rank: int, sizes: list[int], folder: str, rounds: int, seqlens: tuple[int, ...]
) -> None:
    """One of as many as the last of `sizes` says; while fewer are measured, the others wait."""
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        on_cpu.__name__ = "scaled_dot_product_attention"  # the name that context_parallel looks for
        F.scaled_dot_product_attention = on_cpu
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=sizes[-1],
    )
    waiting = dist.new_group(backend="gloo")
    meshes = [DeviceMesh(DEVICE, list(range(size))) for size in sizes]
    peers = {"heed": lambda: sdpa.activated(unsupported="error")}
    if DEVICE == "cuda":
        peers["torch"] = contextlib.nullcontext
    cells, alone = [], {}
    for seqlen in seqlens:
        for mesh in meshes:
            cell = {"gpus": mesh.size(), "seqlen": seqlen}
            for name, kernels in peers.items() if rank < mesh.size() else ():
                try:
                    with kernels(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                        cell[name] = measure(seqlen, rounds, mesh)
                except RuntimeError as error:
                    if name == "heed":
                        raise
                    print(f"  PyTorch's kernels fail: {str(error).splitlines()[0]}", flush=True)
                    continue
                if rank == 0:
                    own = alone.setdefault((seqlen, name), cell[name])
                    print(line(cell, name, own), flush=True)
            cells.append(cell)
            dist.barrier(waiting)
    if rank == 0:
        Path(folder, "cells.json").write_text(json.dumps(cells))
    dist.barrier(waiting)
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
    columns = f"{'forward ms':>12}{'x':>6}{'training ms':>13}{'x':>6}"
    print(f"{'GPUs':>4} {'seqlen':>8} {'kernels':8}{columns}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            process, (sizes, folder, args.rounds, seqlens), nprocs=sizes[-1], join=True
        )
        cells = json.loads(Path(folder, "cells.json").read_text())
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
