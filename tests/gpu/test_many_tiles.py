"""More tiles of rows or of keys than multiprocessors: each of them computes several, one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu import DTYPES, GPU
from torch import Tensor

import heed

BATCH, SEQLEN, HEADS = 4, 1024, 16
# Boundaries inside tiles of 128 and of 192 rows, whose last rows see nothing of what the first see.
DOCUMENTS = (700, 20, 130, 174)
ROWS = torch.arange(SEQLEN)


def limits(mask: str) -> tuple[Tensor, Tensor]:
    """Keys [first, end) of every row."""
    first, end = torch.zeros_like(ROWS), ROWS + 1
    if mask == "full":
        end = torch.full_like(ROWS, SEQLEN)
    elif mask == "window":
        first = (ROWS - 99).clamp(min=0)
    elif mask == "documents":
        starts = torch.tensor((0, *DOCUMENTS)).cumsum(0)[:-1]
        first = starts.repeat_interleave(torch.tensor(DOCUMENTS))
    elif mask == "documents backwards":  # the first rows of a tile see the last keys
        first, end = (SEQLEN - e for e in reversed(limits("documents")))
        first, end = first.flip(0), end.flip(0)
    elif mask == "some rows nothing":
        end = torch.where(ROWS // 100 % 3 == 1, first, end)
    return first, end


def options(mask: str, seqlen: int = SEQLEN) -> dict:
    if mask in ("full", "causal"):
        return {"causal": mask == "causal"}
    if mask == "window":
        return {"causal": True, "left": 99}
    intervals = torch.stack([x[:seqlen].clamp(max=seqlen) for x in limits(mask)], -1).int()
    return {"intervals": intervals.expand(BATCH, -1, -1).contiguous().to(GPU)}


def expected(q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
    seqlen = q.shape[1]
    first, end = (x[:seqlen].to(GPU)[:, None] for x in limits(mask))
    keys = torch.arange(seqlen, device=GPU)
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores.masked_fill_((keys < first) | (keys >= end), -torch.inf)
    return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2)


@pytest.mark.parametrize(
    "head_dims", [(64, 64), (96, 96), (128, 128), (192, 192), (192, 128), (256, 256)], ids=str
)
@pytest.mark.parametrize(
    "mask", ["full", "causal", "window", "documents", "documents backwards", "some rows nothing"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense(mask: str, head_dims: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator(GPU).manual_seed(0)
    q, k, v = (
        torch.randn(BATCH, SEQLEN, HEADS, d, generator=generator, device=GPU).to(dtype)
        for d in (head_dims[0], *head_dims)
    )
    out = heed.attention(q, k, v, **options(mask))
    torch.testing.assert_close(out.float(), expected(q, k, v, mask), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_rows_of_padding(head_dim: int) -> None:
    """Dozens of tiles one after the other whose rows see nothing; three runs, since what could go
    wrong is a matter of time."""
    batch, seqlen, heads = 16, 2048, 32
    q, k, v = (
        torch.randn(batch, seqlen, n, head_dim, device=GPU).bfloat16() for n in (heads, 8, 8)
    )
    want = heed.attention(q, k, v, causal=True)
    lengths = torch.linspace(0.02, 1, batch).mul(seqlen).int()
    row = torch.arange(seqlen)
    end = torch.where(row < lengths[:, None], row + 1, 0)
    intervals = torch.stack([torch.zeros_like(end), end], -1).int().to(GPU)
    hidden = row.to(GPU) >= lengths.to(GPU)[:, None]
    want[hidden] = 0
    for _ in range(3):
        out = heed.attention(q, k, v, intervals=intervals)
        assert not out[hidden].any()
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


# An odd and an even number of tiles of 64 query rows.
@pytest.mark.parametrize("seqlen", [960, SEQLEN])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    "mask", ["full", "causal", "window", "documents", "documents backwards", "some rows nothing"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(mask: str, head_dim: int, seqlen: int, dtype: torch.dtype) -> None:
    generator = torch.Generator(GPU).manual_seed(0)
    q, k, v, dout = (
        torch.randn(BATCH, seqlen, HEADS, head_dim, generator=generator, device=GPU).to(dtype)
        for _ in range(4)
    )
    leaves = [t.requires_grad_() for t in (q, k, v)]
    got = torch.autograd.grad(heed.attention(*leaves, **options(mask, seqlen)), leaves, dout)
    want = torch.autograd.grad(expected(*leaves, mask), leaves, dout.float())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kv_heads", [HEADS, HEADS // 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed_gradients(head_dim: int, kv_heads: int) -> None:
    """As rows of one tensor, and each document alone; some have keys that no row sees."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randint(0, 300, (40,), generator=generator)
    keys = torch.randint(0, 700, (40,), generator=generator)
    ends = [F.pad(n.cumsum(0), (1, 0)).tolist() for n in (queries, keys)]
    shapes = [(ends[0][-1], HEADS), *[(ends[1][-1], kv_heads)] * 2, (ends[0][-1], HEADS)]
    q, k, v, dout = (torch.randn(*s, head_dim, device=GPU).bfloat16() for s in shapes)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    lists = {
        f"cu_seqlens_{side}": torch.tensor(e, dtype=torch.int32, device=GPU)
        for side, e in zip("qk", ends, strict=True)
    }
    out = heed.attention(*leaves, causal=True, **lists)
    got = torch.autograd.grad(out, leaves, dout)
    for entry in range(len(queries)):
        (a, b), (c, d) = (e[entry : entry + 2] for e in ends)
        parts = [q[a:b][None], k[c:d][None], v[c:d][None]]
        parts = [t.detach().requires_grad_() for t in parts]
        alone = heed.attention(*parts, causal=True)
        want = torch.autograd.grad(alone, parts, dout[a:b][None])
        for x, y in zip((got[0][a:b], got[1][c:d], got[2][c:d]), want, strict=True):
            torch.testing.assert_close(x[None], y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed(head_dim: int) -> None:
    """As rows of one tensor, and each document alone."""
    total = sum(DOCUMENTS)
    q, k, v = (torch.randn(total, 4 * HEADS, head_dim, device=GPU).bfloat16() for _ in range(3))
    ends = torch.tensor((0, *DOCUMENTS), device=GPU).cumsum(0).int()
    lists = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": max(DOCUMENTS)}
    out = heed.attention(q, k, v, causal=True, **lists)
    alone = [
        heed.attention(*(x[a:b][None] for x in (q, k, v)), causal=True)[0]
        for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(alone), rtol=2e-2, atol=2e-2)
