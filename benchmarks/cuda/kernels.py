"""Forward, backward and decode on one GPU beside PyTorch's SDPA backends, interleaved.

python3 benchmarks/cuda/kernels.py [--save] [--quick] [--passes forward,backward,decode,masks]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import machine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import heed

ROOT = Path(__file__).resolve().parent.parent.parent
TOKENS, HIDDEN = 16384, 2048
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
# batch, keys, query heads, key heads, head_dim
DECODE = (
    (1, 8192, 32, 8, 128),
    (16, 8192, 32, 8, 128),
    (64, 8192, 32, 8, 128),
    (1, 131072, 32, 8, 128),
    (64, 2048, 64, 8, 64),
)
PASSES = ("forward", "backward", "decode", "masks")
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def milliseconds(call: Callable, times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def medians(calls: dict[str, Callable], rounds: int = 7, at_least: float = 5.0) -> dict[str, float]:
    """Milliseconds of each call; the calls take turns, so that clocks change for all of them.

    A turn takes `at_least` ms, so that the host's time before its first kernel does not count.
    """
    for call in calls.values():
        call()
    times = max(4, math.ceil(at_least / min(milliseconds(call, 3) for call in calls.values())))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(milliseconds(call, times))
    return {name: statistics.median(t) for name, t in taken.items()}


def sdpa(backend: str, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)),
            is_causal=causal,
            enable_gqa=q.shape[2] != k.shape[2],
        )


try:
    from flash_attn.cute import flash_attn_func as fa4
except ImportError:
    fa4 = None

MATMUL = 8192  # rows and columns of both matrices


def matmul_call() -> Callable:
    a, b = randn(MATMUL, MATMUL), randn(MATMUL, MATMUL)
    return lambda: a @ b


def works(call: Callable, name: str) -> bool:
    try:
        call()
    except Exception as error:  # whatever a peer may raise
        print(f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return False
    return True


def forward_call(q: Tensor, k: Tensor, v: Tensor, **options) -> Callable:
    return lambda: heed.attention(q, k, v, **options)


def forward_calls(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Callable]:
    """Of heed, PyTorch's backends, and FlashAttention-4 where it is there and takes the problem."""
    calls = {"heed": forward_call(q, k, v, causal=causal)}
    calls |= {b: (lambda b=b: sdpa(b, q, k, v, causal)) for b in BACKENDS}
    if fa4 is not None and works(lambda: fa4(q, k, v, causal=causal), f"FA4 at d{q.shape[-1]}"):
        calls["fa4"] = lambda: fa4(q, k, v, causal=causal)
    return calls


def backward_call(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options) -> Callable:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = heed.attention(*leaves, **options)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def sdpa_backward_call(backend: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = sdpa(backend, *leaves, causal)
    grad = dout.transpose(1, 2)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def fa4_backward_call(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> Callable:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = fa4(*leaves, causal=causal)
    out = out[0] if isinstance(out, tuple) else out
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def backward_calls(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool
) -> dict[str, Callable]:
    """As forward_calls."""
    calls = {"heed": backward_call(q, k, v, dout, causal=causal)}
    calls |= {b: sdpa_backward_call(b, q, k, v, dout, causal) for b in BACKENDS}
    name = f"FA4's backward at d{q.shape[-1]}"
    if fa4 is not None and works(lambda: fa4_backward_call(q, k, v, dout, causal)(), name):
        calls["fa4"] = fa4_backward_call(q, k, v, dout, causal)
    return calls


def cell(name: str, shape: str, work: float, unit: str, ms: dict[str, float]) -> dict:
    """`work` in units of 1e9: FLOPs for TFLOPS, bytes for TB/s."""
    result = {"work": name, "shape": shape, "unit": unit, "ms": ms}
    result["rate"] = {peer: work / t / 1e9 for peer, t in ms.items()}
    rates = ", ".join(f"{peer} {rate:.4g}" for peer, rate in result["rate"].items())
    ratio = ", ".join(f"{t / ms['heed']:.2f}x {peer}" for peer, t in ms.items() if peer != "heed")
    print(f"{name:16} {shape:34} {ms['heed']:8.4f} ms  {unit}: {rates}  [{ratio}]", flush=True)
    return result


def dense(which: str, seqlens: tuple[int, ...], dims: tuple[int, ...]) -> list[dict]:
    cells = []
    for d in dims:
        for seqlen in seqlens:
            for causal in (False, True):
                batch, heads = TOKENS // seqlen, HIDDEN // d
                q, k, v, dout = (randn(batch, seqlen, heads, d) for _ in range(4))
                flops = 4.0 * batch * heads * seqlen * seqlen * d * (0.5 if causal else 1)
                if which == "forward":
                    calls = forward_calls(q, k, v, causal)
                    if not causal and seqlen >= 4096:
                        calls["cublas"] = matmul_call()
                else:
                    flops *= 2.5
                    calls = backward_calls(q, k, v, dout, causal)
                shape = f"d{d} {batch}x{seqlen} {'causal' if causal else 'full'}"
                with torch.set_grad_enabled(which != "forward"):
                    ms = medians(calls)
                if "cublas" in ms:  # the time that it takes for as many FLOPs
                    ms["cublas"] *= flops / (2 * MATMUL**3)
                cells.append(cell(which, shape, flops, "TFLOPS", ms))
    return cells


def graphed(call: Callable) -> Callable:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@torch.no_grad()
def decode() -> list[dict]:
    cells = []
    for batch, keys, heads_q, heads_k, d in DECODE:
        q = randn(batch, 1, heads_q, d)
        k, v = (randn(batch, keys, heads_k, d) for _ in range(2))
        calls = {"heed": graphed(forward_call(q, k, v))}
        for backend in BACKENDS:
            calls[backend] = graphed(lambda b=backend, q=q, k=k, v=v: sdpa(b, q, k, v))
        size = 2.0 * 2 * batch * keys * heads_k * d
        shape = f"{batch} x {keys} keys, {heads_q}/{heads_k} d{d}"
        cells.append(cell("decode", shape, size, "TB/s", medians(calls)))
        del calls
    return cells


def visited(first: Tensor, end: Tensor) -> float:
    """Pairs of a row and a key in tiles of 128 x 128 of which a row sees something: rows see the
    keys [first, end)."""
    rows = first.numel()
    tiles = torch.arange(rows, device=first.device) // 128
    count = (rows + 127) // 128
    least = torch.full((count,), rows, device=first.device).scatter_reduce(
        0, tiles, first.long(), "amin"
    )
    most = torch.zeros(count, device=first.device, dtype=torch.long).scatter_reduce(
        0, tiles, end.long(), "amax"
    )
    return 128.0 * 128 * float(((most + 127) // 128 - least // 128).sum())


@torch.no_grad()
def masks() -> list[dict]:
    """What is not a square of dense tensors, in turns with the dense causal case of that size; its
    rate per FLOP of the tiles that must be visited, over that one's."""
    cells = []
    for d in (64, 128):
        batch, n, heads = 2, 8192, HIDDEN // d
        q, k, v, dout = (randn(batch, n, heads, d) for _ in range(4))
        rows = torch.arange(n, device="cuda", dtype=torch.int32)
        triangle = torch.stack([torch.zeros_like(rows), rows + 1], -1)[None].contiguous()
        lengths = torch.tensor([100, 3000, 700, 2500, 1892], device="cuda")
        ends = F.pad(lengths.cumsum(0), (1, 0)).int()
        first = torch.repeat_interleave(ends[:-1], lengths, output_size=n)
        documents = torch.stack([first, rows + 1], -1)[None].contiguous()
        square = 4.0 * batch * heads * d * n * n / 2
        share = float((lengths.double() ** 2).sum() / n**2)
        window = square * (2 * 1024 / n - (1024 / n) ** 2)
        few, fewer = ((t[:, :, : heads // g].contiguous() for t in (k, v)) for g in (4, 8))
        pair = 4.0 * batch * heads * d
        dense_tiles = pair * visited(0 * rows, rows + 1)
        alone = [rows[:length] for length in lengths.tolist()]
        cases = {
            "causal": ((q, k, v), {"causal": True}, square, dense_tiles),
            "causal by intervals": ((q, k, v), {"intervals": triangle}, square, dense_tiles),
            "window 1024": (
                (q, k, v),
                {"causal": True, "left": 1023},
                window,
                pair * visited((rows - 1023).clamp(min=0), rows + 1),
            ),
            "GQA 4:1": ((q, *few), {"causal": True}, square, dense_tiles),
            "GQA 8:1": ((q, *fewer), {"causal": True}, square, dense_tiles),
            "5 documents by intervals": (
                (q, k, v),
                {"intervals": documents},
                square * share,
                pair * visited(first, rows + 1),
            ),
        }
        packed = tuple(t[0].contiguous() for t in (q, k, v))
        lists = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": 3000}
        cases["5 documents packed"] = (
            packed,
            {"causal": True, **lists},
            square * share / 2,
            pair / 2 * sum(visited(0 * r, r + 1) for r in alone),
        )
        for which, factor in (("forward", 1.0), ("backward", 2.5)):
            calls = {}
            for name, (tensors, options, *_) in cases.items():
                grad = dout[0].contiguous() if tensors[0].dim() == 3 else dout
                if which == "forward":
                    calls[name] = forward_call(*tensors, **options)
                else:
                    with torch.enable_grad():
                        calls[name] = backward_call(*tensors, grad, **options)
            ms = medians(calls)
            for name, (_, _, flops, tiles) in cases.items():
                shape = f"d{d} {batch}x{n} {name}"
                result = cell(which, shape, factor * flops, "TFLOPS", {"heed": ms[name]})
                result["over_dense"] = tiles / ms[name] / (dense_tiles / ms["causal"])
                print(f"{'':16} per FLOP of its tiles {result['over_dense']:.3f}x dense causal")
                cells.append(result)
    return cells


def geometric_means(cells: list[dict]) -> dict[str, float]:
    means = {}
    for work in dict.fromkeys(c["work"] for c in cells):
        for peer in (*BACKENDS, "fa4"):
            ratios = [
                c["ms"][peer] / c["ms"]["heed"]
                for c in cells
                if c["work"] == work and peer in c["ms"]
            ]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                means[f"{work} against {peer}"] = mean
                print(
                    f"{work} against {peer}: {mean:.3f}x geometric mean, "
                    f"{min(ratios):.2f} to {max(ratios):.2f}"
                )
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/cuda_kernels.json"
    )
    parser.add_argument("--quick", action="store_true", help="two sequence lengths")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--dims", default="64,128,256")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    seqlens = (1024, 8192) if arguments.quick else SEQLENS
    dims = tuple(int(d) for d in arguments.dims.split(","))
    passes = arguments.passes.split(",")
    for which in passes:
        if which not in PASSES:
            parser.error(f"--passes: {which} must be one of {', '.join(PASSES)}")
    for which in passes:
        if which in ("forward", "backward"):
            cells = dense(which, seqlens, dims)
        else:
            cells = decode() if which == "decode" else masks()
        result = {
            "machine": machine() | {"cudnn": torch.backends.cudnn.version()},
            "geometric_means": geometric_means(cells),
            "cells": cells,
        }
        if arguments.save:
            save(which, result)


def save(which: str, result: dict) -> None:
    """Replaces what an earlier run left of this pass, and keeps that of the others."""
    path = ROOT / "benchmarks" / "results" / "cuda_kernels.json"
    passes = json.loads(path.read_text())["passes"] if path.exists() else {}
    passes |= {which: result}
    data = {"passes": {name: passes[name] for name in PASSES if name in passes}}
    path.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{path.relative_to(ROOT)}: {which}", flush=True)


if __name__ == "__main__":
    main()
