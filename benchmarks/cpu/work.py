"""What is measured: each function yields cells of one kind of work, timed beside torch's SDPA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timing import alone, interleaved

import heed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Cell:
    """One measured case; times are medians in milliseconds."""

    work: str
    shape: str
    dtype: str
    heed_ms: float
    torch_ms: float  # 0: not measured
    flops: float  # of the visible scores
    bytes: float  # keys and values, read once; 0 where they are read from caches
    goal: float = 0.0  # share of the peak to be reached; 0: none is set
    cached_ms: float = 0.0  # decode: heed's time if its keys and values came from L3 at worst


def tensors(
    batch: int, seqlen: int, heads: int, dim: int, dtype: str, n: int = 3
) -> list[torch.Tensor]:
    """n tensors [batch, seqlen, heads, dim], as a model's projections leave them."""
    return [torch.randn(batch, seqlen, heads, dim, dtype=DTYPES[dtype]) for _ in range(n)]


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    """torch's attention on heed's layout."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options
    )
    return out.transpose(1, 2)


def visible(seqlen: int, causal: bool) -> float:
    """Scores of one head."""
    return seqlen * (seqlen + 1) / 2 if causal else float(seqlen) * seqlen


def square(dim: int, causal: bool) -> str:
    return f"B1 H8 S2048 D{dim} {'causal' if causal else 'full'}"


FORWARD = {("fp32", 128): 0.85, ("fp32", 64): 0.78, ("bf16", 128): 0.72, ("bf16", 64): 0.65}
BACKWARD = {("fp32", 128): 0.70, ("fp32", 64): 0.58, ("bf16", 128): 0.60, ("bf16", 64): 0.50}


def forward(seconds: float) -> Iterator[Cell]:
    """Batch 1, 8 heads, 2048 tokens."""
    for dtype in DTYPES:
        for dim in (128, 64):
            for causal in (False, True):
                q, k, v = tensors(1, 2048, 8, dim, dtype)
                a, b = interleaved(
                    lambda: heed.attention(q, k, v, causal=causal),  # noqa: B023
                    lambda: sdpa(q, k, v, is_causal=causal),  # noqa: B023
                    seconds,
                )
                goal = FORWARD.get((dtype, dim), 0.9 * FORWARD["fp32", dim])
                yield Cell(
                    "forward",
                    square(dim, causal),
                    dtype,
                    a,
                    b,
                    4 * 8 * dim * visible(2048, causal),
                    0.0,
                    goal * (0.93 if causal else 1.0),
                )


def backward(seconds: float) -> Iterator[Cell]:
    """The gradients of the same."""
    for dtype in ("fp32", "bf16"):
        for dim in (128, 64):
            for causal in (False, True):
                q, k, v = (x.requires_grad_() for x in tensors(1, 2048, 8, dim, dtype))
                dout = torch.randn_like(q)
                with torch.enable_grad():
                    outs = [heed.attention(q, k, v, causal=causal), sdpa(q, k, v, is_causal=causal)]
                a, b = interleaved(
                    *(
                        lambda o=o: torch.autograd.grad(
                            o, (q, k, v), dout, retain_graph=True  # noqa: B023
                        )
                        for o in outs
                    ),
                    seconds,
                )
                yield Cell(
                    "backward",
                    square(dim, causal),
                    dtype,
                    a,
                    b,
                    10 * 8 * dim * visible(2048, causal),
                    0.0,
                    0.0 if causal else BACKWARD[dtype, dim],
                )


def padded(seconds: float) -> Iterator[Cell]:
    """Padded on the right: heed takes lengths, torch a mask. The full batch is the yardstick."""
    for dtype in ("fp32", "bf16"):
        for lengths in ([512] * 8, [512, 430, 380, 300, 230, 180, 130, 91]):
            q, k, v = tensors(8, 512, 12, 64, dtype)
            used = torch.tensor(lengths, dtype=torch.int32)
            mask = (torch.arange(512)[None, :] < used[:, None])[:, None, None, :]
            a, b = interleaved(
                lambda: heed.attention(q, k, v, seqused_q=used, seqused_k=used),  # noqa: B023
                lambda: sdpa(q, k, v, attn_mask=mask),  # noqa: B023
                seconds,
            )
            fill = sum(lengths) / (8 * 512)
            flops = 4 * 12 * 64 * sum(visible(n, False) for n in lengths)
            yield Cell("padded", f"B8 S512 H12 D64 {fill:.0%} fill", dtype, a, b, flops, 0.0)


def decode(seconds: float) -> Iterator[Cell]:
    """1 to 8 queries against a cache that is [batch, heads, seqlen, dim], as Transformers has it.

    In turn over caches that together leave no room for one of them in L3. Beside it what the same
    queries take per key with a cache of 1024 keys, 4 or 8 MB, again and again.
    """

    def cache(keys: int, dtype: str) -> list[torch.Tensor]:
        return [
            x.transpose(1, 2).contiguous().transpose(1, 2)
            for x in tensors(1, keys, 8, 128, dtype, 2)
        ]

    for dtype in DTYPES:
        for keys in (8192, 32768, 131072):
            for group in (4, 8):
                size = 2 * keys * 8 * 128 * DTYPES[dtype].itemsize
                caches = [cache(keys, dtype) for _ in range(max(1, (1 << 28) // size))]
                small = cache(1024, dtype)
                for rows in (1, 2, 4, 8) if dtype != "fp16" else (1,):
                    (q,) = tensors(1, rows, 8 * group, 128, dtype, 1)
                    turn = [0, 0]

                    def cache_of(who: int) -> list[torch.Tensor]:
                        turn[who] += 1  # noqa: B023
                        return caches[turn[who] % len(caches)]  # noqa: B023

                    a, b = interleaved(
                        lambda: heed.attention(q, *cache_of(0)),  # noqa: B023
                        lambda: sdpa(q, *cache_of(1), enable_gqa=True),  # noqa: B023
                        seconds,
                    )
                    shape = f"{rows} x {keys} H{8 * group}/8 D128"
                    flops = 4.0 * rows * 8 * group * 128 * keys
                    cached = alone(lambda: heed.attention(q, *small), seconds / 4)  # noqa: B023
                    cached *= keys / 1024
                    yield Cell("decode", shape, dtype, a, b, flops, float(size), 0.8, cached)


def short(seconds: float) -> Iterator[Cell]:
    """What embedding and reranking send: few tokens, many texts."""
    for dtype in ("fp32", "bf16"):
        for seqlen in (1, 2, 4, 8, 16, 32, 64):
            for batch in (1, 2, 4, 8, 16, 32, 64):
                q, k, v = tensors(batch, seqlen, 12, 64, dtype)
                a, b = interleaved(
                    lambda: heed.attention(q, k, v),  # noqa: B023
                    lambda: sdpa(q, k, v),  # noqa: B023
                    min(seconds, 0.2),
                )
                flops = 4 * batch * 12 * 64 * visible(seqlen, False)
                yield Cell("short", f"B{batch} S{seqlen} H12 D64", dtype, a, b, flops, 0.0)


def one_thread(seconds: float) -> Iterator[Cell]:
    """The forward on one thread, to set beside that on all."""
    threads = torch.get_num_threads()
    for dtype in ("fp32", "bf16"):
        for dim in (128, 64):
            q, k, v = tensors(1, 2048, 8, dim, dtype)
            torch.set_num_threads(1)
            try:
                ms = alone(lambda: heed.attention(q, k, v), seconds)  # noqa: B023
            finally:
                torch.set_num_threads(threads)
            flops = 4 * 8 * dim * visible(2048, False)
            yield Cell("1 thread", square(dim, False), dtype, ms, 0.0, flops, 0.0)


WORKS = {
    "forward": forward,
    "backward": backward,
    "padded": padded,
    "decode": decode,
    "short": short,
    "1 thread": one_thread,
}
