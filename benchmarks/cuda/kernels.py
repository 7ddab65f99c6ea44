"""Forward, backward and decode on one GPU beside PyTorch's SDPA backends, interleaved.

python3 benchmarks/cuda/kernels.py [--save] [--quick] [--passes forward,backward,decode,masks]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
    from flash_attn.cute import flash_attn_varlen_func as fa4_varlen
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


def gradients_call(call: Callable, tensors: tuple[Tensor, ...], dout: Tensor) -> Callable:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def backward_call(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **options) -> Callable:
    return gradients_call(partial(heed.attention, **options), (q, k, v), dout)


def sdpa_backward_call(backend: str, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = sdpa(backend, *leaves, causal)
    grad = dout.transpose(1, 2)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def fa4_alone(call: Callable) -> Callable:
    """FA4's functions return out, or out and lse."""

    def out_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = call(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return out_of


def fa4_backward_call(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool) -> Callable:
    return gradients_call(fa4_alone(partial(fa4, causal=causal)), (q, k, v), dout)


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


class Mask(NamedTuple):
    """What is not a square of dense tensors; work in FLOPs of the forward."""

    tensors: tuple[Tensor, ...]
    calls: dict[str, Callable]  # by peer: from q, k and v to out
    flops: float
    tiles: float  # of the tiles that must be visited


def flash(q: Tensor, k: Tensor, v: Tensor, left: int | None = None, ends: Tensor | None = None):
    """PyTorch's flash kernel itself: SDPA gives it neither a window nor packed documents. Causal;
    `left`: keys before a row's own; `ends`: documents, of no more tokens than LENGTHS have."""
    longest = (q.shape[1], k.shape[1]) if ends is None else (max(LENGTHS), max(LENGTHS))
    window = {} if left is None else {"window_size_left": left, "window_size_right": 0}
    op = torch.ops.aten._flash_attention_forward
    return op(q, k, v, ends, ends, *longest, 0.0, True, False, **window)[0]


LENGTHS = (100, 3000, 700, 2500, 1892)  # of packed documents
MASKED_LENGTH = sum(LENGTHS)
WINDOW = 1024


def mask_cases(d: int) -> dict[str, Mask]:
    batch, n, heads = 2, MASKED_LENGTH, HIDDEN // d
    q, k, v = (randn(batch, n, heads, d) for _ in range(3))
    rows = torch.arange(n, device="cuda", dtype=torch.int32)
    triangle = torch.stack([torch.zeros_like(rows), rows + 1], -1)[None].contiguous()
    lengths = torch.tensor(LENGTHS, device="cuda")
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    first = torch.repeat_interleave(ends[:-1], lengths, output_size=n)
    documents = torch.stack([first, rows + 1], -1)[None].contiguous()
    square = 4.0 * batch * heads * d * n * n / 2
    share = sum(length**2 for length in LENGTHS) / n**2
    window = square * (2 * WINDOW / n - (WINDOW / n) ** 2)
    pair = 4.0 * batch * heads * d
    dense_tiles = pair * visited(0 * rows, rows + 1)

    def calls(ours: dict, of_flash: dict | None = None, of_fa4: dict | None = None) -> dict:
        found = {"heed": partial(heed.attention, **ours)}
        if of_flash is not None:
            found["flash"] = partial(flash, **of_flash)
        if of_fa4 is not None and fa4 is not None:
            packed = "cu_seqlens_q" in of_fa4
            found["fa4"] = fa4_alone(partial(fa4_varlen if packed else fa4, **of_fa4))
        return found

    causal = {"causal": True}
    lists = {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    lists |= {"max_seqlen_q": max(LENGTHS), "max_seqlen_k": max(LENGTHS)}
    cases = {
        "causal": Mask((q, k, v), calls(causal, {}, causal), square, dense_tiles),
        "causal by intervals": Mask((q, k, v), calls({"intervals": triangle}), square, dense_tiles),
        f"window {WINDOW}": Mask(
            (q, k, v),
            calls(
                causal | {"left": WINDOW - 1},
                {"left": WINDOW - 1},
                causal | {"window_size": (WINDOW - 1, 0)},
            ),
            window,
            pair * visited((rows - WINDOW + 1).clamp(min=0), rows + 1),
        ),
    }
    for group in (4, 8):
        few = (t[:, :, : heads // group].contiguous() for t in (k, v))
        cases[f"GQA {group}:1"] = Mask((q, *few), calls(causal, {}, causal), square, dense_tiles)
    cases[f"{len(LENGTHS)} documents by intervals"] = Mask(
        (q, k, v),
        calls({"intervals": documents}),
        square * share,
        pair * visited(first, rows + 1),
    )
    cases[f"{len(LENGTHS)} documents packed"] = Mask(
        tuple(t[0].contiguous() for t in (q, k, v)),
        calls(causal | lists, {"ends": ends}, causal | lists),
        square * share / 2,
        pair / 2 * sum(visited(0 * rows[:x], rows[:x] + 1) for x in LENGTHS),
    )
    return cases


def masks() -> list[dict]:
    """Every mask in turns with the dense causal case of that size, and with the peers that take it;
    heed's rate per FLOP of the tiles that must be visited, over its rate of the dense case."""
    cells = []
    for d in (64, 128):
        cases = mask_cases(d)
        for which, factor in (("forward", 1.0), ("backward", 2.5)):
            calls = {}
            for name, case in cases.items():
                for peer, call in case.calls.items():
                    with torch.set_grad_enabled(which == "backward"):
                        if not works(lambda c=call, t=case.tensors: c(*t), f"{peer}, d{d} {name}"):
                            continue
                        if which == "forward":
                            calls[name, peer] = partial(call, *case.tensors)
                            continue
                        dout = torch.randn_like(case.tensors[0])
                        mine = gradients_call(call, case.tensors, dout)
                        if works(mine, f"{peer}'s backward, d{d} {name}"):
                            calls[name, peer] = mine
            with torch.set_grad_enabled(which == "backward"):
                taken = medians(calls)
            for name, case in cases.items():
                ms = {peer: t for (of, peer), t in taken.items() if of == name}
                shape = f"d{d} 2x{MASKED_LENGTH} {name}"
                result = cell(which, shape, factor * case.flops, "TFLOPS", ms)
                dense_rate = cases["causal"].tiles / taken["causal", "heed"]
                result["over_dense"] = case.tiles / ms["heed"] / dense_rate
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
