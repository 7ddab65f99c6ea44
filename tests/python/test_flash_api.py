"""heed.flash_api against FlashAttention's definitions, written down here in float64."""

from __future__ import annotations

import inspect
import itertools
import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import heed
from device import DEVICE, DTYPE, ON_CPU, cpu_only, randn
from heed import flash_api
from heed.flash_api import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
HEADS, HEADS_K, HEAD_DIM = 4, 2, 16


def int32(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def ends(lengths: list[int]) -> Tensor:
    return int32([0, *itertools.accumulate(lengths)])


def dense(batch: int = 2, seqlen_q: int = 5, seqlen_k: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    q = randn(batch, seqlen_q, HEADS, HEAD_DIM)
    k, v = (randn(batch, seqlen_k, HEADS_K, HEAD_DIM) for _ in range(2))
    return q, k, v


def packed(lengths_q: list[int], lengths_k: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t[0] for t in dense(batch=1, seqlen_q=sum(lengths_q), seqlen_k=sum(lengths_k)))


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype = DTYPE, factor: float = 1) -> None:
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    assert torch.equal(torch.isneginf(got), torch.isneginf(want))
    finite = torch.isfinite(want)
    assert torch.isfinite(got[finite]).all()
    if finite.any():
        limit = factor * TOLERANCE[dtype] * max(1.0, float(want[finite].abs().amax()))
        assert (got - want)[finite].abs().amax() <= limit


# ---- the definitions ----


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    attention_chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """out [rows, heads, head_dim] and lse [heads, rows] of one entry, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    i = torch.arange(q.shape[0], device=q.device)[:, None] + k.shape[0] - q.shape[0]
    j = torch.arange(k.shape[0], device=q.device)[None]
    if alibi_slopes is not None:
        s = s - alibi_slopes.double()[:, None, None] * (i - j).abs()
    left, right = window_size
    seen = torch.ones_like(i + j, dtype=torch.bool)
    if left not in (None, -1):
        seen &= j >= i - left
    if causal:
        seen &= j <= i
    elif right not in (None, -1):
        seen &= j <= i + right
    if attention_chunk:
        seen &= i.div(attention_chunk, rounding_mode="floor") == j // attention_chunk
    s = s.masked_fill(~seen, -torch.inf)
    if learnable_sink is not None:
        sink = learnable_sink.double()[:, None, None].expand(-1, q.shape[0], 1)
        s = torch.cat([s, sink], dim=-1)
    lse = torch.logsumexp(s, dim=-1) if s.shape[-1] else s.new_full(s.shape[:2], -torch.inf)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])[..., : k.shape[0]]
    return torch.einsum("hij,jhd->ihd", p, v), lse


def options_of(options: dict, entry: int) -> dict:
    """What `reference` takes for one entry."""
    options = {"learnable_sink" if n == "s_aux" else n: value for n, value in options.items()}
    slopes = options.get("alibi_slopes")
    if slopes is not None and slopes.dim() == 2:
        options["alibi_slopes"] = slopes[entry]
    return options


def check(out: Tensor, lse: Tensor, entries: list, options: dict) -> None:
    """`entries`: for each, where its rows are (out and lse take `[at]` and `[.., at]`), q, k, v."""
    for entry, (at, q, k, v) in enumerate(entries):
        want_out, want_lse = reference(q, k, v, **options_of(options, entry))
        if out.dim() == 4:
            got_out, got_lse = out[entry, at], lse[entry, :, at]
        else:
            got_out, got_lse = out[at], lse[:, at]
        assert_close(got_out, want_out)
        assert_close(got_lse, want_lse)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625]).to(DEVICE)
SINK = torch.tensor([0.5, -1.0, 2.0, 0.0]).to(DEVICE)
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "no limit, -1": {"window_size": (-1, -1)},
    "no limit, None": {"window_size": (None, None)},
    "left": {"window_size": (2, -1)},
    "left, None": {"window_size": (2, None)},
    "right": {"window_size": (-1, 1)},
    "right 0": {"window_size": (None, 0)},
    "both": {"window_size": [3, 1]},
    "causal window": {"causal": True, "window_size": (2, 2)},
    "scale": {"softmax_scale": 0.7},
    "softcap": {"softcap": 1.5, "causal": True},
    "softcap None": {"softcap": None},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi causal": {"alibi_slopes": SLOPES, "causal": True},
    "alibi of entries": {"alibi_slopes": torch.stack([SLOPES, 3 * SLOPES])},
    "alibi in bf16": {"alibi_slopes": SLOPES.bfloat16()},
    "sink": {"learnable_sink": SINK},
    "s_aux": {"s_aux": SINK.bfloat16()},
    "chunk": {"attention_chunk": 4, "causal": True},
    "all": {
        "softmax_scale": 0.3,
        "causal": True,
        "window_size": (6, 0),
        "softcap": 2.0,
        "alibi_slopes": SLOPES,
        "learnable_sink": SINK,
        "attention_chunk": 5,
    },
}


# ---- values ----


@pytest.mark.parametrize("sizes", [(5, 9), (9, 4), (1, 12)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_dense(name: str, sizes: tuple[int, int]) -> None:
    q, k, v = dense(2, *sizes)
    out, lse = flash_attn_func(q, k, v, **OPTIONS[name], return_lse=True)
    assert out.dtype == DTYPE and lse.dtype == torch.float32 and lse.shape == (2, HEADS, sizes[0])
    entries = [(slice(None), *(t[b] for t in (q, k, v))) for b in range(2)]
    check(out, lse, entries, OPTIONS[name])


BOUNDS = {
    "int": lambda n: n,
    "tensor": lambda n: torch.tensor(n, device=DEVICE),
    "meta": lambda n: torch.empty((), device="meta"),  # reading it would fail
    "none": lambda n: None,
}


@pytest.mark.parametrize(
    ("name", "bounds"),
    [(n, b) for n in OPTIONS for b in BOUNDS if b == "int" or "alibi_slopes" not in OPTIONS[n]],
)
def test_varlen(name: str, bounds: str) -> None:
    lengths_q, lengths_k = [4, 7], [9, 5]
    options, bound = OPTIONS[name], BOUNDS[bounds]
    q, k, v = packed(lengths_q, lengths_k)
    out, lse = flash_attn_varlen_func(
        q, k, v, ends(lengths_q), ends(lengths_k), bound(7), bound(9), **options, return_lse=True
    )
    parts = (q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    rows = [slice(0, 4), slice(4, 11)]
    check(out, lse, list(zip(rows, *parts, strict=True)), options)


def test_varlen_with_empty_entries() -> None:
    lengths_q, lengths_k = [3, 0, 2], [0, 4, 2]
    q, k, v = packed(lengths_q, lengths_k)
    out, lse = flash_attn_varlen_func(
        q, k, v, ends(lengths_q), ends(lengths_k), 3, 4, causal=True, return_lse=True
    )
    assert (out[:3] == 0).all() and torch.isneginf(lse[:, :3]).all()
    check(out[3:], lse[:, 3:], [(slice(None), q[3:], k[4:], v[4:])], {"causal": True})


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("shape", ["packed", "padded", "padded q", "padded k"])
def test_varlen_with_used_lengths(shape: str, alibi: bool) -> None:
    """seqused, and FlashAttention-4's dense sides."""
    options = {"causal": True} | ({"alibi_slopes": SLOPES} if alibi else {})
    used_q, used_k = [3, 5], [6, 2]
    q, k, v = dense(2, 5, 8)
    for b in range(2):
        q[b, used_q[b] :] = k[b, used_k[b] :] = v[b, used_k[b] :] = torch.nan
    arguments = {"seqused_q": int32(used_q), "seqused_k": int32(used_k)}
    packed_q, packed_k = shape in ("packed", "padded k"), shape in ("packed", "padded q")
    if packed_q:
        arguments |= {"cu_seqlens_q": ends([5, 5]), "max_seqlen_q": 5}
    if packed_k:
        arguments |= {"cu_seqlens_k": ends([8, 8]), "max_seqlen_k": 8}
    out, lse = flash_attn_varlen_func(
        q.flatten(0, 1) if packed_q else q,
        *((t.flatten(0, 1) if packed_k else t) for t in (k, v)),
        **arguments,
        **options,
        return_lse=True,
    )
    if packed_q:
        out, lse = out.unflatten(0, (2, 5)), lse.unflatten(1, (2, 5)).transpose(0, 1)
    for b in range(2):
        assert (out[b, used_q[b] :] == 0).all() and torch.isneginf(lse[b, :, used_q[b] :]).all()
    cut = [
        (slice(used_q[b]), q[b, : used_q[b]], k[b, : used_k[b]], v[b, : used_k[b]])
        for b in range(2)
    ]
    check(out, lse, cut, options)


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("peer", [2, 4])
def test_varlen_with_pages(peer: int, alibi: bool) -> None:
    """FlashAttention-2 gives their lengths as cu_seqlens_k, FlashAttention-4 as seqused_k."""
    options = {"causal": True} | ({"alibi_slopes": SLOPES} if alibi else {})
    lengths_q, lengths_k, table = [4, 2], [5, 9], [[6, 2, 0], [1, 0, 4]]
    q = randn(6, HEADS, HEAD_DIM)
    k, v = (randn(7, 4, HEADS_K, HEAD_DIM) for _ in range(2))
    if peer == 2:
        sides = {"cu_seqlens_k": ends(lengths_k), "block_table": int32(table)}
    else:
        sides = {"seqused_k": int32(lengths_k), "page_table": int32(table)}
    out, lse = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=ends(lengths_q),
        max_seqlen_q=4,
        max_seqlen_k=9,
        **sides,
        **options,
        return_lse=True,
    )
    keys = [[t[table[b]].flatten(0, 1)[: lengths_k[b]] for t in (k, v)] for b in range(2)]
    entries = [(slice(0, 4), q[:4], *keys[0]), (slice(4, 6), q[4:], *keys[1])]
    check(out, lse, entries, options)


def test_packed_tensors_are_views_of_the_same_problem() -> None:
    options = {"causal": True, "window_size": (3, 0), "softmax_scale": 0.4, "softcap": 2.0}
    qkv = randn(2, 6, 3, HEADS, HEAD_DIM)
    want = flash_attn_func(*qkv.unbind(2), **options)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, **options), want)
    assert torch.equal(
        flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options, alibi_slopes=SLOPES),
        flash_attn_func(*qkv.unbind(2), **options, alibi_slopes=SLOPES),
    )
    assert torch.equal(
        flash_attn_qkvpacked_func(qkv, causal=True, attention_chunk=2),
        flash_attn_func(*qkv.unbind(2), causal=True, attention_chunk=2),
    )
    grouped = randn(2, 6, HEADS + 2 * HEADS_K, HEAD_DIM)
    assert torch.equal(
        flash_attn_qkvpacked_func(grouped, num_heads_q=HEADS),
        flash_attn_func(*grouped.split([HEADS, HEADS_K, HEADS_K], dim=2)),
    )
    flat, cu = qkv.flatten(0, 1), ends([5, 7])
    want = flash_attn_varlen_func(*flat.unbind(1), cu, cu, 7, 7, **options)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(flat, cu, 7, **options), want)
    got = flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 7, 7, **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in dense())
    out = flash_attn_func(q, k, v, causal=True, alibi_slopes=SLOPES)
    assert out.dtype == dtype
    for b in range(2):
        want, _ = reference(q[b], k[b], v[b], causal=True, alibi_slopes=SLOPES)
        assert_close(out[b], want, dtype)


# ---- dropout ----


def test_dropout_follows_the_generator() -> None:
    q, k, v = dense(2, 8, 16)
    torch.manual_seed(3)
    first, second = (flash_attn_func(q, k, v, 0.5) for _ in range(2))
    torch.manual_seed(3)
    again = flash_attn_func(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    want = heed.attention(q, k, v, dropout_p=0.5)
    assert torch.equal(first, again) and torch.equal(first, want)
    assert not torch.equal(first, second)
    cu_q, cu_k = ends([8, 8]), ends([16, 16])
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    plain = flash_attn_varlen_func(*flat, cu_q, cu_k, 8, 16)
    assert not torch.equal(flash_attn_varlen_func(*flat, cu_q, cu_k, 8, 16, 0.5), plain)


# ---- what only changes the schedule, and what is returned ----

SCHEDULE = {
    "deterministic": True,
    "num_splits": 7,
    "pack_gqa": True,
    "sm_margin": 9,
    "scheduler_metadata": torch.ones(3),
    "seqlen_k_per_split": 128,
    "disable_scheduler_metadata": True,
    "min_seqlen_k": 4,
}


@pytest.mark.parametrize("varlen", [False, True])
def test_deterministic_is_passed_on(varlen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(*tensors, **options):
        seen.append(options["deterministic"])
        return heed.attention(*tensors, **options)

    monkeypatch.setattr(flash_api, "attention", spy)
    function = flash_attn_varlen_func if varlen else flash_attn_func
    for value in (True, False):
        function(*dense(), deterministic=value)
    assert seen == [True, None]  # None: as torch.use_deterministic_algorithms says


@pytest.mark.parametrize("option", SCHEDULE)
def test_schedules_change_no_bit(option: str) -> None:
    q, k, v = dense()
    cu_q, cu_k = ends([5, 5]), ends([9, 9])
    calls = {
        flash_attn_func: (q, k, v),
        flash_attn_varlen_func: (*(t.flatten(0, 1) for t in (q, k, v)), cu_q, cu_k, 5, 9),
        flash_attn_with_kvcache: (q, k, v),
    }
    taken = 0
    for function, arguments in calls.items():
        if option in inspect.signature(function).parameters:
            got = function(*arguments, **{option: SCHEDULE[option]})
            assert torch.equal(got, function(*arguments))
            taken += 1
    assert taken


def test_scheduler_metadata_is_none() -> None:
    assert get_scheduler_metadata(2, 5, 9, 4, 2, 64, int32([3, 4]), causal=True) is None


@pytest.mark.parametrize("varlen", [False, True])
def test_returned_tuples(varlen: bool) -> None:
    q, k, v = dense(1)
    if varlen:
        q, k, v = q[0], k[0], v[0]

    def run(**flags):
        if varlen:
            return flash_attn_varlen_func(q, k, v, ends([5]), ends([9]), 5, 9, **flags)
        return flash_attn_func(q, k, v, **flags)

    alone = run()
    assert isinstance(alone, Tensor)
    out, lse, probabilities = run(return_attn_probs=True)
    assert probabilities.shape == (0,) and probabilities.dtype == DTYPE
    assert lse.shape == ((HEADS, 5) if varlen else (1, HEADS, 5))
    out4, lse4 = run(return_lse=True)
    out_only, nothing = run(return_lse=False)
    assert nothing is None and torch.equal(lse, lse4)
    assert all(torch.equal(alone, other) for other in (out, out4, out_only))


def test_returned_tuple_of_the_cache() -> None:
    q, k, v = dense()
    out, lse = flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    assert lse.shape == (2, HEADS, 5)
    assert torch.equal(flash_attn_with_kvcache(q, k, v), out)


# ---- gradients ----


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (t.double() * torch.randn(t.shape, generator=generator).to(DEVICE)).sum() for t in outputs
    )
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("varlen", [False, True])
def test_gradients(varlen: bool) -> None:
    lengths_q, lengths_k = [5, 5], [9, 9]
    slopes = SLOPES.clone().requires_grad_()
    sink = SINK.clone().requires_grad_()
    options = {"causal": True, "window_size": (6, 0), "softcap": 3.0}
    options |= {"learnable_sink": sink, "alibi_slopes": slopes}
    q, k, v = (t.requires_grad_() for t in dense())
    leaves = [q, k, v, sink, slopes]
    if varlen:
        flat = (t.flatten(0, 1) for t in (q, k, v))
        sequences = (ends(lengths_q), ends(lengths_k), 5, 9)
        out, lse = flash_attn_varlen_func(*flat, *sequences, **options, return_lse=True)
        out, lse = out.unflatten(0, (2, 5)), lse.unflatten(1, (2, 5)).transpose(0, 1)
    else:
        out, lse = flash_attn_func(q, k, v, **options, return_lse=True)
    entries = [reference(q[b], k[b], v[b], **options) for b in range(2)]
    want = [torch.stack(t) for t in zip(*entries, strict=True)]
    pairs = zip(gradients((out, lse), leaves), gradients(tuple(want), leaves), strict=True)
    for got, wanted in pairs:
        assert_close(got, wanted, factor=10)


def test_gradient_of_a_packed_tensor() -> None:
    qkv = randn(2, 6, 3, HEADS, HEAD_DIM).requires_grad_()
    parts = [t.detach().requires_grad_() for t in qkv.unbind(2)]
    options = {"causal": True, "deterministic": True}
    (got,) = gradients((flash_attn_qkvpacked_func(qkv, **options),), [qkv])
    want = gradients((flash_attn_func(*parts, **options),), parts)
    assert torch.equal(got, torch.stack(want, dim=2))


# ---- the cache ----


def rotation(
    x: Tensor, cos: Tensor, sin: Tensor, positions: list[int], interleaved: bool
) -> Tensor:
    """Channel pairs of x [tokens, heads, head_dim] as complex numbers, turned."""
    half = cos.shape[1]
    x = x.double()
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    layout = (half, 2) if interleaved else (2, half)
    pairs = turned.unflatten(-1, layout)
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    factor = torch.complex(cos.double(), sin.double())[positions][:, None]
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factor)
    pairs = pairs if interleaved else pairs.transpose(-1, -2)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)


BATCH, CAPACITY, PAGE = 3, 16, 4
USED, LEFTPAD, NEW, ROWS = [7, 2, 12], [3, 0, 5], [3, 1, 2], [2, 4, 1]


def cache_call(
    layout: str, leftpad: bool, new: str | None, packed_q: bool, rotary: str | None, **options
) -> None:
    """Runs one call on one layout of the cache; checks out, lse and every slot."""
    seqlen_new = [2] * BATCH if new == "dense" else NEW
    used = [0, 5, 14] if new is None and not leftpad else USED
    used = [n + 2 for n in used] if new is None and leftpad else used
    first = LEFTPAD if leftpad else [0] * BATCH
    rows_q = ROWS if packed_q else [3] * BATCH
    arguments = {"cache_seqlens": int32(used), "return_softmax_lse": True} | options

    # where[b][slot]: indices of the slot's row in k_cache and v_cache
    if layout.startswith("pages"):
        shape = (15, PAGE)
        table = torch.randperm(15)[: BATCH * CAPACITY // PAGE].view(BATCH, -1).tolist()
        where = [[(table[b][s // PAGE], s % PAGE) for s in range(CAPACITY)] for b in range(BATCH)]
        name = "block_table" if layout == "pages" else "page_table"
        arguments[name] = int32(table)
        if layout == "pages by index":
            arguments |= {name: int32([table[1], [-1] * 4, table[2], table[0]])}
            arguments["cache_batch_idx"] = int32([3, 0, 2])
    else:
        order = [4, 0, 3] if layout == "rows by index" else range(BATCH)
        shape = (5 if layout != "rows" else BATCH, CAPACITY)
        where = [[(row, s) for s in range(CAPACITY)] for row in order]
        if layout == "rows by index":
            arguments["cache_batch_idx"] = int32(list(order))
    caches = [randn(*shape, HEADS_K, HEAD_DIM) for _ in range(2)]
    for cache in caches:  # what nothing may read
        for b in range(BATCH):
            for s in [*range(first[b]), *range(used[b], CAPACITY)]:
                cache[where[b][s]] = torch.nan
    want = [cache.clone() for cache in caches]

    q = randn(sum(rows_q), HEADS, HEAD_DIM)
    q_parts = q.split(rows_q)
    if packed_q:
        arguments |= {"cu_seqlens_q": ends(rows_q), "max_seqlen_q": max(rows_q)}
    total = list(used)
    if rotary is not None:
        angle = torch.rand(CAPACITY + 2, 4) * 6
        cos, sin = angle.cos().to(DEVICE, DTYPE), angle.sin().to(DEVICE, DTYPE)
        arguments |= {"rotary_cos": cos, "rotary_sin": sin}
        arguments["rotary_interleaved"] = interleaved = rotary == "interleaved"
        moving = options.get("causal") or options.get("window_size", (-1, -1)) != (-1, -1)
        q_parts = [
            rotation(
                part,
                cos,
                sin,
                [used[b] + (i if moving else 0) for i in range(len(part))],
                interleaved,
            ).to(DTYPE)
            for b, part in enumerate(q_parts)
        ]
    if new is not None:
        tokens = [randn(sum(seqlen_new), HEADS_K, HEAD_DIM) for _ in range(2)]
        parts = [list(t.split(seqlen_new)) for t in tokens]
        if new == "packed":
            arguments |= {"k": tokens[0], "v": tokens[1], "cu_seqlens_k_new": ends(seqlen_new)}
        else:
            arguments |= dict(zip("kv", (t.unflatten(0, (BATCH, -1)) for t in tokens), strict=True))
        for b in range(BATCH):
            slots = [used[b] + i for i in range(seqlen_new[b])]
            if rotary is not None:
                parts[0][b] = rotation(parts[0][b], cos, sin, slots, interleaved).to(DTYPE)
            for cache, part in zip(want, parts, strict=True):
                for i, slot in enumerate(slots):
                    cache[where[b][slot]] = part[b][i]
            total[b] += seqlen_new[b]

    out, lse = flash_attn_with_kvcache(
        q if packed_q else q.unflatten(0, (BATCH, -1)), *caches, **arguments
    )
    for cache, wanted in zip(caches, want, strict=True):
        if rotary is None:
            assert torch.equal(cache.nan_to_num(9.0), wanted.nan_to_num(9.0))
        else:
            assert torch.equal(cache.isnan(), wanted.isnan())
            assert_close(cache.nan_to_num(9.0), wanted.nan_to_num(9.0))
    starts = [sum(rows_q[:b]) for b in range(BATCH)] if packed_q else [0] * BATCH
    entries = []
    for b in range(BATCH):
        keys = [
            torch.stack([cache[where[b][s]] for s in range(first[b], total[b])])
            if total[b] > first[b]
            else cache[0, :0]
            for cache in want
        ]
        entries.append((slice(starts[b], starts[b] + rows_q[b]), q_parts[b], *keys))
    kept = ("causal", "window_size", "softcap", "softmax_scale", "alibi_slopes", "learnable_sink",
            "s_aux", "attention_chunk")  # fmt: skip
    check(out, lse, entries, {n: x for n, x in options.items() if n in kept})


LAYOUTS = ["rows", "more rows", "rows by index", "pages", "pages by index"]


@pytest.mark.parametrize("packed_q", [False, True], ids=["dense q", "packed q"])
@pytest.mark.parametrize("new", [None, "dense", "packed"], ids=str)
@pytest.mark.parametrize("leftpad", [False, True], ids=["", "leftpad"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache(layout: str, leftpad: bool, new: str | None, packed_q: bool) -> None:
    options = {"cache_leftpad": int32(LEFTPAD)} if leftpad else {}
    cache_call(layout, leftpad, new, packed_q, None, causal=True, **options)


@pytest.mark.parametrize("mask", ["full", "causal", "window"])
@pytest.mark.parametrize("rotary", ["interleaved", "halves"])
@pytest.mark.parametrize("layout", ["rows", "pages by index"])
def test_cache_with_rotary(layout: str, rotary: str, mask: str) -> None:
    options = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (4, -1)}}[mask]
    for leftpad in (False, True):
        padded = {"cache_leftpad": int32(LEFTPAD)} if leftpad else {}
        cache_call(layout, leftpad, "packed", leftpad, rotary, **options, **padded)


@pytest.mark.parametrize("packed_q", [False, True], ids=["dense q", "packed q"])
@pytest.mark.parametrize("layout", ["rows", "pages"])
@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "alibi of entries"])
def test_cache_options(name: str, layout: str, packed_q: bool) -> None:
    for leftpad in (False, True):
        if leftpad and layout == "pages" and "attention_chunk" in OPTIONS[name]:
            continue  # refused: test_refused
        padded = {"cache_leftpad": int32(LEFTPAD)} if leftpad else {}
        cache_call(layout, leftpad, "dense", packed_q, None, **OPTIONS[name], **padded)


def test_cache_alibi_of_entries() -> None:
    slopes = torch.stack([SLOPES, 3 * SLOPES, SLOPES.flip(0)])
    cache_call("rows", False, "dense", False, None, causal=True, alibi_slopes=slopes)


def test_cache_lengths_as_numbers() -> None:
    q, k_cache, v_cache = dense(2, 1, 8)
    k, v = (randn(2, 1, HEADS_K, HEAD_DIM) for _ in range(2))
    got = flash_attn_with_kvcache(q, k_cache.clone(), v_cache.clone(), k, v, cache_seqlens=7)
    want = flash_attn_with_kvcache(
        q, k_cache.clone(), v_cache.clone(), k, v, cache_seqlens=int32([7, 7])
    )
    assert torch.equal(got, want)
    want = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=8)
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache), want)


def test_cache_rotates_from_rotary_seqlens() -> None:
    q, k_cache, v_cache = dense(2, 2, 8)
    k, v = (randn(2, 2, HEADS_K, HEAD_DIM) for _ in range(2))
    angle = torch.rand(16, HEAD_DIM // 2)
    cos, sin = angle.cos().to(DEVICE, DTYPE), angle.sin().to(DEVICE, DTYPE)
    want_q = torch.stack([rotation(q[b], cos, sin, [9 + b, 10 + b], True) for b in (0, 1)])
    want_k = torch.stack([rotation(k[b], cos, sin, [9 + b, 10 + b], True) for b in (0, 1)])
    lengths = {"cache_seqlens": int32([3, 6]), "causal": True}
    got = flash_attn_with_kvcache(
        q,
        k_cache.clone(),
        v_cache.clone(),
        k,
        v,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_seqlens=int32([9, 10]),
        **lengths,
    )
    rotated = (want_q.to(DTYPE), k_cache, v_cache, want_k.to(DTYPE), v)
    assert_close(got, flash_attn_with_kvcache(*rotated, **lengths))


def test_cache_step_by_step_is_one_prefill() -> None:
    q, k, v = dense(2, 6, 6)
    caches = [torch.full((2, 8, HEADS_K, HEAD_DIM), torch.nan, device=DEVICE, dtype=DTYPE)] * 1
    caches.append(caches[0].clone())
    steps = [
        flash_attn_with_kvcache(
            q[:, i : i + 1],
            *caches,
            k[:, i : i + 1],
            v[:, i : i + 1],
            cache_seqlens=int32([i, i]),
            causal=True,
        )
        for i in range(6)
    ]
    assert_close(torch.cat(steps, dim=1), flash_attn_func(q, k, v, causal=True))


# Arrays, and the tokens of entry 0 that have a slot in spite of them. Entry 1 is honest.
LYING = {
    "past the end": ({"cache_seqlens": [15, 3]}, [0]),
    "far past the end": ({"cache_seqlens": [2**31 - 5, 3]}, []),
    "before the first": ({"cache_seqlens": [-1, 3]}, [1]),
    "far before the first": ({"cache_seqlens": [-7, 3]}, []),
    "row": ({"cache_seqlens": [8, 3], "cache_batch_idx": [7, 1]}, []),
    "negative row": ({"cache_seqlens": [8, 3], "cache_batch_idx": [-1, 1]}, []),
    "page": ({"cache_seqlens": [8, 3], "block_table": [[2], [1]]}, []),
    "negative page": ({"cache_seqlens": [8, 3], "block_table": [[-1], [1]]}, []),
    "row of the table": (
        {"cache_seqlens": [8, 3], "block_table": [[0], [1]], "cache_batch_idx": [5, 1]},
        [],
    ),
}


def run_lying(caches: list[Tensor], k: Tensor, v: Tensor, arrays: dict) -> None:
    call = {n: int32(x) for n, x in arrays.items()}
    try:
        flash_attn_with_kvcache(randn(2, 1, HEADS, HEAD_DIM), *caches, k, v, **call)
    except ValueError as error:  # the CPU reads the arrays
        assert ON_CPU and any(name in str(error) for name in arrays)


@pytest.mark.parametrize("what", LYING)
def test_lying_arrays_write_nothing_outside(what: str) -> None:
    arrays, kept = LYING[what]
    buffers = [randn(6, 16, HEADS_K, HEAD_DIM) for _ in range(2)]
    want = [b.clone() for b in buffers]
    new = [randn(2, 2, HEADS_K, HEAD_DIM) for _ in range(2)]
    for buffer, tokens in zip(want, new, strict=True):
        buffer[3, 3:5] = tokens[1]
        for token in kept:
            buffer[2, arrays["cache_seqlens"][0] + token] = tokens[0, token]
    run_lying([b[2:4] for b in buffers], *new, arrays)
    for buffer, wanted in zip(buffers, want, strict=True):
        assert torch.equal(buffer, wanted)


@pytest.mark.parametrize("cu", [[0, 0, 0], [5, 5, 5], [2, 0, 0]], ids=str)
def test_new_tokens_of_no_entry_are_not_written(cu: list[int]) -> None:
    buffers = [randn(6, 16, HEADS_K, HEAD_DIM) for _ in range(2)]
    want = [b.clone() for b in buffers]
    new = [randn(2, HEADS_K, HEAD_DIM) for _ in range(2)]
    run_lying([b[2:4] for b in buffers], *new, {"cache_seqlens": [3, 3], "cu_seqlens_k_new": cu})
    for buffer, wanted in zip(buffers, want, strict=True):
        assert torch.equal(buffer, wanted)


def test_a_refused_call_writes_nothing() -> None:
    q, k_cache, v_cache = dense(2, 1, 8)
    before = k_cache.clone()
    k, v = (randn(2, 1, HEADS_K, HEAD_DIM) for _ in range(2))
    with pytest.raises(ValueError, match=r"^alibi_slopes\.shape = \[2\] must be \[4\]$"):
        flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3, alibi_slopes=SLOPES[:2])
    assert torch.equal(k_cache, before)


def test_cache_has_no_gradient() -> None:
    q, k_cache, v_cache = dense(2, 1, 8)
    k, v = (randn(2, 1, HEADS_K, HEAD_DIM).requires_grad_() for _ in range(2))
    out = flash_attn_with_kvcache(q.requires_grad_(), k_cache, v_cache, k, v, cache_seqlens=3)
    assert not out.requires_grad and not k_cache.requires_grad


# ---- parts ----


def test_combine() -> None:
    q, k, v = dense(2, 5, 12)
    want_out, want_lse = flash_attn_func(q, k, v, return_lse=True)
    parts = [
        flash_attn_func(q, k[:, a:b], v[:, a:b], return_lse=True)
        for a, b in ((0, 3), (3, 3), (3, 12))
    ]
    out_partial = torch.stack([out for out, _ in parts]).float()
    lse_partial = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    out_partial[1] = torch.nan  # saw no key
    out, lse = flash_attn_combine(out_partial, lse_partial)
    assert out.dtype == torch.float32 and lse.dtype == torch.float32
    assert_close(out, want_out.float(), factor=2)
    assert_close(lse, want_lse.transpose(1, 2), factor=2)
    flat, flat_lse = flash_attn_combine(
        out_partial.flatten(1, 2),
        lse_partial.flatten(1, 2),
        cu_seqlens=ends([4, 6]),
        virtual_batch_idx=int32([1, 0]),
    )
    assert torch.equal(flat, out.flatten(0, 1)) and torch.equal(flat_lse, lse.flatten(0, 1))


def test_combine_of_nothing() -> None:
    out_partial = torch.full((2, 1, 3, 2, 4), torch.nan, device=DEVICE)
    lse_partial = torch.full((2, 1, 3, 2), -torch.inf, device=DEVICE)
    out_partial[0, 0, 1], lse_partial[0, 0, 1] = 5.0, 200.0
    out, lse = flash_attn_combine(out_partial, lse_partial)
    assert (out[0, [0, 2]] == 0).all() and torch.isneginf(lse[0, [0, 2]]).all()
    assert (out[0, 1] == 5).all() and (lse[0, 1] == 200).all()


def test_combine_writes_where_it_is_told() -> None:
    out_partial, lse_partial = torch.randn(3, 1, 4, 2, 8), torch.randn(3, 1, 4, 2)
    out_partial, lse_partial = out_partial.to(DEVICE), lse_partial.to(DEVICE)
    want, _ = flash_attn_combine(out_partial, lse_partial)
    given = torch.empty(1, 4, 2, 8, dtype=torch.bfloat16, device=DEVICE)
    out, lse = flash_attn_combine(out_partial, lse_partial, given, return_lse=False)
    assert out is given and lse is None and torch.equal(given, want.bfloat16())
    out, _ = flash_attn_combine(out_partial, lse_partial, out_dtype=torch.float16)
    assert torch.equal(out, want.half())
    assert flash_attn_combine(out_partial.half(), lse_partial)[0].dtype == torch.float16


# ---- refusals ----

Q, K, V = (t.cpu() for t in dense())
NOT_SUPPORTED = {
    "qv": Q,
    "q_descale": torch.ones(2, 2),
    "k_descale": torch.ones(2, 2),
    "v_descale": torch.ones(2, 2),
    "gather_kv_indices": torch.zeros(2, 5, 4).int(),
    "score_mod": max,
    "score_mod_bwd": max,
    "mask_mod": max,
    "aux_tensors": [torch.ones(2)],
    "aux_scalars": (1,),
    "block_sparse_tensors": (torch.ones(2), torch.ones(2)),
    "block_sparse_tensors_bwd": (torch.ones(2), torch.ones(2)),
}


@pytest.mark.parametrize("option", NOT_SUPPORTED)
def test_not_supported(option: str) -> None:
    q, k, v = (t.to(DEVICE) for t in (Q, K, V))
    taken = 0
    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        if option not in inspect.signature(function).parameters:
            continue
        with pytest.raises(NotImplementedError) as caught:
            function(q, k, v, **{option: NOT_SUPPORTED[option]})
        sentence = rf"{option} = .+ is not supported by heed: [^:]+"
        assert re.fullmatch(sentence, str(caught.value)), str(caught.value)
        function(q, k, v, **{option: None})
        taken += 1
    assert taken


def with_cache(**changes) -> dict:
    return {"q": Q, "k_cache": K, "v_cache": V, "k": K[:, :2], "v": V[:, :2]} | {
        "cache_seqlens": int32([3, 4])
    } | changes  # fmt: skip


def with_sequences(**changes) -> dict:
    return {
        "q": Q.flatten(0, 1),
        "k": K.flatten(0, 1),
        "v": V.flatten(0, 1),
        "cu_seqlens_q": ends([5, 5]),
        "cu_seqlens_k": ends([9, 9]),
    } | changes


COS = torch.ones(9, 4)
FA2_ORDER = r" must be a number\. By position, arguments have FlashAttention-2's order: .*"
REFUSED = [
    # FlashAttention-3 has softmax_scale and causal where 2 has dropout_p and softmax_scale
    (flash_attn_func, (Q, K, V, 0.1, True), {}, ValueError, "softmax_scale = True" + FA2_ORDER),
    # FlashAttention-4 has qv there
    (flash_attn_func, (Q, K, V, None), {}, ValueError, "dropout_p = None" + FA2_ORDER),
    (flash_attn_func, (Q, K, V, Q), {}, ValueError, r"dropout_p = a tensor \[2.*" + FA2_ORDER),
    (flash_attn_func, (Q, K, V), {"softcap": torch.ones(())}, ValueError,
     r"softcap = a tensor \[\]" + FA2_ORDER),
    (flash_attn_func, (Q, K, V), {"softcap": -1.0}, ValueError, r"softcap = -1 must be finite .*"),
    (flash_attn_func, (Q, K, V), {"softmax_scale": float("inf")}, ValueError,
     r"softmax_scale = inf must be finite"),
    (flash_attn_func, (Q, K, V, 1.0), {}, ValueError, r"dropout_p = 1 must be in \[0, 1\)"),
    (flash_attn_func, (Q, K, V, 0.1), {"return_attn_probs": True}, NotImplementedError,
     r"return_attn_probs = True is not supported with dropout_p = 0\.1: heed keeps no .*"),
    (flash_attn_func, (Q, K, V), {"window_size": (-2, 3)}, ValueError,
     r"window_size = \(-2, 3\) must hold two numbers of at least 0; -1 and None mean no limit"),
    (flash_attn_func, (Q, K, V), {"window_size": (torch.ones(()), 0)}, ValueError,
     r"window_size = \(a tensor \[\], 0\) must hold .*"),
    (flash_attn_func, (Q, K, V), {"attention_chunk": 4}, NotImplementedError,
     r"attention_chunk = 4 is not supported with causal = False: .*"),
    (flash_attn_func, (Q, K, V), {"attention_chunk": -4, "causal": True}, ValueError,
     r"attention_chunk = -4 must be in \[0, .*"),
    (flash_attn_func, (Q, K, V), {"learnable_sink": SINK, "s_aux": SINK}, ValueError,
     r"learnable_sink and s_aux are two names of one argument: pass one of them"),
    (flash_attn_func, (Q, K, V), {"learnable_sink": SINK[:2]}, ValueError,
     r"learnable_sink\.shape = \[2\] must be \[heads_q\] = \[4\]"),
    (flash_attn_func, (Q, K, V), {"s_aux": SINK[:2]}, ValueError, r"s_aux\.shape = \[2\] must .*"),
    (flash_attn_func, (Q, K, V), {"alibi_slopes": SLOPES[:2]}, ValueError,
     r"alibi_slopes\.shape = \[2\] must be \[4\]"),
    (flash_attn_func, (Q, K, V), {"alibi_slopes": SLOPES.expand(3, 4)}, ValueError,
     r"alibi_slopes\.shape = \[3, 4\] must be \[2, 4\]"),
    (flash_attn_func, (Q[0], K[0], V[0]), {}, ValueError,
     r"q\.shape = \[5, 4, 16\] must be \[batch, seqlen, heads, head_dim\]"),
    (flash_attn_func, (Q, K, V[..., 0]), {}, ValueError, r"v\.shape = \[2, 9, 2\] must be .*"),
    (flash_attn_qkvpacked_func, (torch.ones(2, 5, 2, 4, 8),), {}, ValueError,
     r"qkv\.shape = \[2, 5, 2, 4, 8\] must be \[batch, seqlen, 3, heads, head_dim\]"),
    (flash_attn_qkvpacked_func, (torch.ones(2, 5, 9, 8),), {"num_heads_q": 4}, ValueError,
     r"qkv\.shape\[2\] = 9 must be num_heads_q \+ 2 \* heads_k, and num_heads_q = 4"),
    (flash_attn_qkvpacked_func, (torch.ones(2, 5, 3, 4, 8),), {"q_descale": COS},
     NotImplementedError, r"q_descale = a tensor \[9, 4\] is not supported by heed: .*"),
    (flash_attn_kvpacked_func, (Q, torch.ones(2, 5, 3, 4, 8)), {}, ValueError,
     r"kv\.shape = \[2, 5, 3, 4, 8\] must be \[batch, seqlen, 2, heads, head_dim\]"),
    (flash_attn_varlen_qkvpacked_func, (torch.ones(9, 4, 8), ends([9]), 9), {}, ValueError,
     r"qkv\.shape = \[9, 4, 8\] must be \[total, 3, heads, head_dim\]"),
    (flash_attn_varlen_func, (), with_sequences(cu_seqlens_q=None), ValueError,
     r"cu_seqlens_q = null must not be null: .*"),
    (flash_attn_varlen_func, (), with_sequences(alibi_slopes=SLOPES), NotImplementedError,
     r"alibi_slopes is not supported with max_seqlen_q = None and a packed tensor: pass an int.*"),
    (flash_attn_varlen_func, (),
     with_sequences(alibi_slopes=SLOPES, max_seqlen_q=5, max_seqlen_k=torch.tensor(9)),
     NotImplementedError,
     r"alibi_slopes is not supported with max_seqlen_k = a tensor \[\] and a packed tensor: .*"),
    (flash_attn_varlen_func, (),
     with_sequences(block_table=int32([[0]]), page_table=int32([[0]])), ValueError,
     r"block_table and page_table are two names of one argument: pass one of them"),
    (flash_attn_with_kvcache, (), with_cache(v=None), ValueError,
     "k and v must be given together"),
    (flash_attn_with_kvcache, (), with_cache(cache_seqlens=None), ValueError,
     "cache_seqlens must be given when k and v are: it says where they go"),
    (flash_attn_with_kvcache, (), with_cache(cache_seqlens=8), ValueError,
     r"cache_seqlens = 8 must be in \[0, 7\]: the cache has 9 slots"),
    (flash_attn_with_kvcache, (), with_cache(cache_seqlens=torch.tensor([3, 4])), ValueError,
     r"cache_seqlens\.dtype = torch\.int64 must be torch\.int32"),
    (flash_attn_with_kvcache, (), with_cache(cache_seqlens=int32([3])), ValueError,
     r"cache_seqlens\.shape = \[1\] must be \[2\]"),
    (flash_attn_with_kvcache, (), with_cache(k=K[:, :2, :1], v=V[:, :2, :1]), ValueError,
     r"k\.shape = \[2, 2, 1, 16\] must be \[2, seqlen_new, 2, 16\]"),
    (flash_attn_with_kvcache, (), with_cache(v=V[:, :1]), ValueError,
     r"v\.shape = \[2, 1, 2, 16\] must be \[2, 2, 2, 16\]"),
    (flash_attn_with_kvcache, (), with_cache(k=K[:, :2].double()), ValueError,
     r"k\.dtype = torch\.float64 must be k_cache\.dtype = .*"),
    (flash_attn_with_kvcache, (), with_cache(v_cache=V[:, :8]), ValueError,
     r"v_cache\.shape = \[2, 8, 2, 16\] must be \[2, 9, 2, head_dim_v\]"),
    (flash_attn_with_kvcache, (), with_cache(k_cache=K.double(), k=None, v=None), ValueError,
     r"k_cache\.dtype = .* must be q\.dtype = .*"),
    (flash_attn_with_kvcache, (), with_cache(q=Q[0]), ValueError,
     r"q\.shape = \[5, 4, 16\] must be \[batch, seqlen, heads, head_dim\]"),
    (flash_attn_with_kvcache, (), with_cache(cu_seqlens_q=ends([5])), ValueError,
     r"q\.shape = \[2, 5, 4, 16\] must be \[total, heads, head_dim\]"),
    (flash_attn_with_kvcache, (), with_cache(cu_seqlens_k_new=ends([5])), ValueError,
     r"cu_seqlens_k_new\.shape = \[2\] must be \[3\]"),
    (flash_attn_with_kvcache, (), with_cache(k=None, v=None, cu_seqlens_k_new=ends([1, 1])),
     ValueError, r"cu_seqlens_k_new must be None when k and v are None"),
    (flash_attn_with_kvcache, (), with_cache(rotary_cos=COS), ValueError,
     "rotary_cos and rotary_sin must be given together"),
    (flash_attn_with_kvcache, (), with_cache(rotary_cos=COS, rotary_sin=COS, k=None, v=None),
     ValueError, "rotary_cos must be None when k and v are: it rotates new tokens"),
    (flash_attn_with_kvcache, (), with_cache(rotary_cos=COS[:8], rotary_sin=COS[:8]), ValueError,
     r"rotary_cos\.shape\[0\] = 8 must be at least 9, the cache's slots"),
    (flash_attn_with_kvcache, (), with_cache(rotary_cos=COS, rotary_sin=COS[:, :2]), ValueError,
     r"rotary_sin\.shape = \[9, 2\] must be \[9, 4\]"),
    (flash_attn_with_kvcache, (),
     with_cache(rotary_cos=torch.ones(9, 9), rotary_sin=torch.ones(9, 9)), ValueError,
     r"rotary_cos\.shape\[1\] = 9 must be at most 8, half of k's head_dim"),
    (flash_attn_with_kvcache, (), with_cache(block_table=int32([[0, 1]])), ValueError,
     r"block_table\.shape = \[1, 2\] must be \[2, max_pages\]"),
    (flash_attn_with_kvcache, (),
     with_cache(block_table=int32([[0], [1]]), cache_leftpad=int32([0, 0]), attention_chunk=4,
                causal=True),
     NotImplementedError,
     r"attention_chunk = 4 is not supported together with cache_leftpad and block_table: .*"),
    (flash_attn_combine, (torch.ones(2, 1, 3, 4, 8), torch.ones(2, 1, 4, 3)), {}, ValueError,
     r"lse_partial\.shape = \[2, 1, 4, 3\] must be \[2, 1, 3, 4\]"),
    (flash_attn_combine, (torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4)),
     {"out": torch.ones(3, 4, 8), "out_dtype": torch.float16}, ValueError,
     r"out_dtype = torch\.float16 must be out\.dtype = torch\.float32"),
    (flash_attn_combine, (torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4)),
     {"out": torch.ones(4, 8)}, ValueError, r"out\.shape = \[4, 8\] must be \[3, 4, 8\]"),
    (flash_attn_combine, (torch.ones(2, 3, 4, 8), torch.ones(2, 3, 4)),
     {"seqused": int32([3])}, NotImplementedError, r"seqused = a tensor \[1\] is not supported .*"),
]  # fmt: skip


def on_device(value):
    return value.to(DEVICE) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("case", REFUSED, ids=[f"{i} {c[4][:24]}" for i, c in enumerate(REFUSED)])
def test_refused(case: tuple) -> None:
    function, arguments, options, kind, sentence = case
    with pytest.raises(kind) as caught:
        function(*map(on_device, arguments), **{n: on_device(x) for n, x in options.items()})
    assert re.fullmatch(sentence, str(caught.value)), str(caught.value)


@cpu_only("a GPU does not read the arrays")
def test_refused_lengths_carry_the_callers_names() -> None:
    with pytest.raises(ValueError, match=r"^cache_seqlens\[0\] = 10 must be in \[0, 9\]$"):
        flash_attn_with_kvcache(Q, K, V, cache_seqlens=int32([10, 1]))
    call = {"cache_seqlens": int32([9, 1]), "cache_leftpad": int32([1, 0])}
    message = r"^cache_seqlens \+ new tokens - cache_leftpad\[0\] = 10 must be in \[0, 8\]$"
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(Q, K.clone(), V.clone(), K[:, :2], V[:, :2], **call)
    with pytest.raises(ValueError, match=r"^cache_batch_idx\[1\]\[0\] = 7 must be in \[0, 2\), .*"):
        flash_attn_with_kvcache(Q, K, V, cache_batch_idx=int32([0, 7]))


# ---- signatures ----

SCORES2 = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
SCORES2 += "return_attn_probs"
DESCALE = "q_descale k_descale v_descale"
SCORES3 = f"softmax_scale causal qv {DESCALE} window_size attention_chunk softcap num_splits "
SCORES3 += "pack_gqa deterministic sm_margin return_attn_probs"
SCORES4 = "softmax_scale causal window_size learnable_sink softcap num_splits pack_gqa "
SCORES4 += "deterministic score_mod score_mod_bwd mask_mod aux_tensors aux_scalars "
SCORES4 += "block_sparse_tensors return_lse"
SEQUENCES = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
# Of each function: the parameters of FlashAttention 2, in their order, then those of 3 and 4.
SIGNATURES = {
    "flash_attn_func": (
        f"q k v {SCORES2}",
        f"q k v {SCORES3}",
        f"q k v qv gather_kv_indices {SCORES4} block_sparse_tensors_bwd",
    ),
    "flash_attn_qkvpacked_func": (
        f"qkv {SCORES2}",
        f"qkv softmax_scale causal {DESCALE} window_size attention_chunk softcap deterministic "
        "num_heads_q sm_margin return_attn_probs",
        "",
    ),
    "flash_attn_kvpacked_func": (f"q kv {SCORES2}", "", ""),
    "flash_attn_varlen_func": (
        f"q k v {SEQUENCES} {SCORES2} block_table",
        f"q k v {SEQUENCES} seqused_q seqused_k {SCORES3}",
        f"q k v qv {SEQUENCES} min_seqlen_k seqused_q seqused_k gather_kv_indices page_table "
        f"{SCORES4} scheduler_metadata seqlen_k_per_split disable_scheduler_metadata",
    ),
    "flash_attn_varlen_qkvpacked_func": (f"qkv cu_seqlens max_seqlen {SCORES2}", "", ""),
    "flash_attn_varlen_kvpacked_func": (f"q kv {SEQUENCES} {SCORES2}", "", ""),
    "flash_attn_with_kvcache": (
        "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad "
        "block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes "
        "num_splits return_softmax_lse",
        "q k_cache v_cache k v qv rotary_cos rotary_sin cache_seqlens cache_batch_idx "
        f"cache_leftpad page_table cu_seqlens_q cu_seqlens_k_new max_seqlen_q rotary_seqlens "
        f"{DESCALE} softmax_scale causal window_size attention_chunk softcap rotary_interleaved "
        "scheduler_metadata num_splits pack_gqa sm_margin return_softmax_lse",
        "",
    ),
    "flash_attn_combine": (
        "",
        "out_partial lse_partial out out_dtype",
        "out_partial lse_partial out out_dtype cu_seqlens seqused virtual_batch_idx return_lse",
    ),
}
DEFAULTS = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
    "return_softmax_lse": False,
    "rotary_interleaved": True,
    "num_splits": (0, 1),
    "out": None,
    "out_dtype": None,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(flash_api, name)).parameters
    two, three, four = (names.split() for names in SIGNATURES[name])
    positional = two or three  # combine came with FlashAttention-3
    assert list(parameters)[: len(positional)] == positional
    for parameter in list(parameters.values())[len(positional) :]:
        assert parameter.kind is parameter.KEYWORD_ONLY
    assert set(three) | set(four) <= set(parameters)
    assert not {"args", "kwargs"} & set(parameters)
    for option, default in DEFAULTS.items():
        if option in parameters:
            allowed = default if option == "num_splits" else (default,)
            assert parameters[option].default in allowed


def test_every_function_is_tested_for_its_signature() -> None:
    assert set(flash_api.__all__) == {*SIGNATURES, "get_scheduler_metadata"}


# ---- PyTorch ----


def everything(q, k, v, slopes, sink) -> tuple[Tensor, Tensor]:
    return flash_attn_func(
        q,
        k,
        v,
        causal=True,
        window_size=(6, 0),
        softcap=3.0,
        alibi_slopes=slopes,
        learnable_sink=sink,
        return_lse=True,
    )


def everything_varlen(q, k, v, cu_q, cu_k, bound, slopes, table=None) -> tuple[Tensor, Tensor]:
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_q,
        cu_k,
        bound if slopes is None else 5,
        9,
        causal=True,
        alibi_slopes=slopes,
        block_table=table,
        return_lse=True,
    )


def everything_cached(
    q, k_cache, v_cache, k, v, cos, used, first, index, table, cu_q, cu_k, slopes
):
    return flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        cos,
        cos,
        used,
        index,
        first,
        table,
        causal=True,
        alibi_slopes=slopes,
        cu_seqlens_q=cu_q,
        cu_seqlens_k_new=cu_k,
        max_seqlen_q=3,
        return_softmax_lse=True,
    )


def calls() -> dict:
    q, k, v = dense()
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    cu_q, cu_k, bound = ends([5, 5]), ends([9, 9]), torch.tensor(9, device=DEVICE)
    pages = randn(6, 4, HEADS_K, HEAD_DIM)
    table = int32([[0, 2, 4], [1, 3, 5]])
    new = randn(2, 2, HEADS_K, HEAD_DIM)
    cos = randn(12, 4)
    used, first, index = int32([3, 6]), int32([1, 0]), int32([1, 0])
    rows = randn(3, 12, HEADS_K, HEAD_DIM)
    return {
        "dense": (everything, [q, k, v, SLOPES, SINK]),
        "varlen": (everything_varlen, [*flat, cu_q, cu_k, bound, None]),
        "varlen alibi": (everything_varlen, [*flat, cu_q, cu_k, bound, SLOPES]),
        "varlen pages": (
            everything_varlen,
            [flat[0], pages, pages, cu_q, cu_k, bound, SLOPES, table],
        ),
        "cache": (
            everything_cached,
            [q[:, :3], rows, rows.clone(), new, new, cos, used, first, *[None] * 5],
        ),
        "cache pages": (
            everything_cached,
            [flat[0][:5], pages, pages.clone(), new[0], new[0], cos, used, first, index, table,
             ends([2, 3]), ends([1, 1]), SLOPES],
        ),
    }  # fmt: skip


CALLS = ["dense", "varlen", "varlen alibi", "varlen pages", "cache", "cache pages"]


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read(name: str) -> None:
    """Fake tensors have no values: reading one fails, and so would waiting for a device."""
    function, arguments = calls()[name]
    want = function(*arguments)
    with FakeTensorMode() as mode:
        got = function(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


@pytest.mark.skipif(ON_CPU, reason="a CPU has nothing to wait for")
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits(name: str) -> None:
    function, arguments = calls()[name]
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CALLS)
def test_compile_fullgraph(name: str) -> None:
    torch._dynamo.reset()
    function, arguments = calls()[name]
    copies = [t.clone() if isinstance(t, Tensor) else t for t in arguments]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*arguments), function(*copies), strict=True):
        assert torch.equal(got, want)
    for a, b in zip(arguments, copies, strict=True):  # the caches
        assert not isinstance(a, Tensor) or torch.equal(a, b)


@pytest.mark.parametrize("name", ["dense", "varlen alibi"])
def test_compile_gradients(name: str) -> None:
    torch._dynamo.reset()
    function, arguments = calls()[name]
    leaves = [t.requires_grad_() for t in arguments[:3]]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = (gradients(f(*arguments), leaves) for f in (compiled, function))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


def test_compile_packed_tensors() -> None:
    torch._dynamo.reset()

    def both(qkv: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
        flat = qkv.flatten(0, 1)
        return (
            flash_attn_qkvpacked_func(qkv, causal=True),
            flash_attn_varlen_kvpacked_func(flat[:, 0], flat[:, 1:], cu, cu, 6, 6),
        )

    arguments = (randn(2, 6, 3, HEADS, HEAD_DIM), ends([6, 6]))
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*arguments), both(*arguments), strict=True):
        assert torch.equal(got, want)


def test_compile_combine() -> None:
    torch._dynamo.reset()
    out_partial, lse_partial = randn(3, 1, 4, 2, 8), randn(3, 1, 4, 2, dtype=torch.float32)
    compiled = torch.compile(flash_attn_combine, fullgraph=True, backend="aot_eager")
    pairs = zip(
        compiled(out_partial, lse_partial),
        flash_attn_combine(out_partial, lse_partial),
        strict=True,
    )
    for got, want in pairs:
        assert torch.equal(got, want)


def test_compile_with_dynamic_lengths() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (5, 8, 11):
        q, k, v = dense(2, seqlen, seqlen + 3)
        for got, want in zip(
            compiled(q, k, v, SLOPES, SINK), everything(q, k, v, SLOPES, SINK), strict=True
        ):
            assert_close(got, want)


def test_autocast() -> None:
    q, k, v = (t.float() for t in dense())
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        out = flash_attn_func(q, k, v, alibi_slopes=SLOPES)
    assert out.dtype == torch.bfloat16
    want = flash_attn_func(*(t.bfloat16() for t in (q, k, v)), alibi_slopes=SLOPES)
    assert torch.equal(out, want)
