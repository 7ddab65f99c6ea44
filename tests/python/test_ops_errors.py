"""Bad input: one sentence of the right class that names the argument, and no memory touched."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import heed
from cases import ends, int32
from device import DEVICE, DTYPE, ON_CPU, cpu_only, moved, randn
from heed import ops

HERE = "cpu" if ON_CPU else r"cuda:\d+"
NAME = {torch.float32: "f32", torch.float16: "f16"}[DTYPE]


def dense(*shape: int) -> Tensor:
    return randn(*(shape or (2, 5, 4, 8)))


def packed(**changes) -> dict:
    return {
        "q": dense(8, 4, 8),
        "k": dense(9, 2, 8),
        "v": dense(9, 2, 8),
        "cu_seqlens_q": ends([3, 5]),
        "cu_seqlens_k": ends([4, 5]),
    } | changes


def paged(**changes) -> dict:
    return {
        "k": dense(6, 4, 2, 8),
        "v": dense(6, 4, 2, 8),
        "page_table": int32([[0, 1], [2, 3]]),
        "seqused_k": int32([5, 8]),
    } | changes


def unaligned() -> Tensor:
    values = torch.frombuffer(bytearray(4 * 320 + 4), dtype=torch.float32, count=320, offset=1)
    return values.view(2, 5, 4, 8)


# What is wrong, the arguments that differ from a legal call, the whole sentence (a pattern).
INVALID = {
    "rank 2": ({"q": dense(5, 8)}, r"q\.rank = 2 must be 4, .*, or 3, packed .*"),
    "rank 0": ({"q": torch.tensor(1.0)}, r"q\.rank = 0 must be 4, .*"),
    "rank 5": ({"k": dense(1, 2, 9, 2, 8)}, r"k\.rank = 5 must be 4, .*"),
    "rank of v": ({"v": dense(9, 2, 8)}, r"v\.rank = 3 must be k\.rank = 4"),
    "integer q": ({"q": dense().int()}, r"q\.dtype = int32 must be f32, bf16, f16, f64 or bool"),
    "bool q": ({"q": dense() > 0}, r"q\.dtype = bool must be f32, bf16, f16 or f64"),
    "dtypes differ": (
        {"k": dense(2, 9, 2, 8).bfloat16()},
        rf"k\.dtype = bf16 must be q\.dtype = {NAME}",
    ),
    "meta k": (
        {"k": dense(2, 9, 2, 8).to("meta")},
        rf"k\.device = meta must be q\.device = {HERE}",
    ),
    "meta sink": (
        {"sink": dense(4).to("meta")},
        rf"sink\.device = meta must be q\.device = {HERE}",
    ),
    "head_dim": ({"k": dense(2, 9, 2, 4)}, r"k\.head_dim = 4 must be q\.head_dim = 8"),
    "head_dim 0": (
        {"q": dense(2, 5, 4, 0), "k": dense(2, 9, 2, 0)},
        r"q\.head_dim = 0 must be in \[1, 512\]",
    ),
    "head_dim 513": (
        {"q": dense(2, 5, 4, 513), "k": dense(2, 9, 2, 513)},
        r"q\.head_dim = 513 must be in \[1, 512\]",
    ),
    "head ratio": (
        {"k": dense(2, 9, 3, 8), "v": dense(2, 9, 3, 8)},
        r"q\.heads = 4 must be a multiple of k\.heads = 3",
    ),
    "heads of v": ({"v": dense(2, 9, 4, 8)}, r"v\.heads = 4 must be k\.heads = 2"),
    "batch": (
        {"k": dense(3, 9, 2, 8), "v": dense(3, 9, 2, 8)},
        r"k\.batch = 3 must be q\.batch = 2",
    ),
    "length of v": ({"v": dense(2, 8, 2, 8)}, r"v\.seqlen = 8 must be k\.seqlen = 9"),
    "left": ({"left": -1}, r"left = -1 must be at least 0, or None for no limit"),
    "right": ({"right": -2}, r"right = -2 must be at least 0, or None for no limit"),
    "causal": ({"causal": True, "right": 3}, r"right = 3 must be 0 or None when causal = True"),
    "chunk": ({"chunk": -4}, r"chunk = -4 must be in \[0, .*\], where 0 means not chunked"),
    "huge chunk": ({"chunk": -(2**40)}, r"chunk = -2147483648 must be in \[0, .*"),
    "nan scale": ({"scale": float("nan")}, r"scale = nan must be finite"),
    "infinite scale": ({"scale": 1e39}, r"scale = inf must be finite"),
    "softcap": ({"softcap": -1.0}, r"softcap = -1 must be finite and at least 0 \(none\)"),
    "nan softcap": ({"softcap": float("nan")}, r"softcap = nan must be finite and .*"),
    "dropout": ({"dropout_p": 1.0}, r"dropout_p = 1 must be in \[0, 1\)"),
    "negative dropout": ({"dropout_p": -0.1}, r"dropout_p = -0.1.* must be in \[0, 1\)"),
    "seed": (
        {"dropout_p": 0.1, "seed": int32([1])},
        r"seed\.dtype = int32 must be int64",
    ),
    "seeds": (
        {"dropout_p": 0.1, "seed": torch.tensor([1, 2])},
        r"seed\.shape = \[2\] must be \[1\] = \[1\]",
    ),
    "bias rank": ({"bias": dense(5, 9)}, r"bias\.rank = 2 must be 4, .*"),
    "bias shape": ({"bias": dense(2, 4, 5, 8)}, r"bias\.shape\[3\] = 8 must be k\.seqlen = 9"),
    "bias keys": ({"bias": dense(2, 4, 5, 1)}, r"bias\.shape\[3\] = 1 must be k\.seqlen = 9"),
    "bias heads": ({"bias": dense(2, 3, 5, 9)}, r"bias\.shape\[1\] = 3 must be q\.heads = 4 or 1"),
    "bias dtype": ({"bias": dense(2, 4, 5, 9).int()}, r"bias\.dtype = int32 must be f32, .*"),
    "sink shape": ({"sink": dense(2)}, r"sink\.shape = \[2\] must be \[heads_q\] = \[4\]"),
    "sink dtype": ({"sink": int32([1] * 4)}, r"sink\.dtype = int32 must be f32"),
    "interval dtype": (
        {"intervals": torch.zeros(2, 5, 2)},
        r"intervals\.dtype = f32 must be int32",
    ),
    "interval shape": (
        {"intervals": torch.zeros(2, 9, 2).int()},
        r"intervals\.shape = \[2, 9, 2\] must be \[batch or 1, seqlen_q, 2\] = \[2, 5, 2\]",
    ),
    "mask shape": (
        {"intervals": torch.zeros(2, 1, 5, 3).int()},
        r"intervals\.shape = \[2, 1, 5, 3\] must be \[batch or 1, 1, seqlen_q \+ n, 2\], where n "
        r"is 0 or n rows have a bit for each key; q\.shape = \[2, 5, 4, 8\], k\.shape = .*",
    ),
    "mask batch": (
        {"intervals": torch.zeros(3, 1, 5, 2).int()},
        r"intervals\.shape = \[3, 1, 5, 2\] must be \[batch or 1, 1, seqlen_q \+ n, 2\], .*",
    ),
    "mask rows": (
        {"intervals": torch.zeros(2, 1, 4, 2).int()},
        r"intervals\.shape = \[2, 1, 4, 2\] must be \[batch or 1, 1, seqlen_q \+ n, 2\], .*",
    ),
    "mask bits": (
        {"intervals": torch.zeros(2, 1, 6, 2).int(), "k": dense(2, 65, 2, 8)},
        r"intervals\.shape = \[2, 1, 6, 2\] must be \[batch or 1, 1, seqlen_q \+ n, 2\], .*",
    ),
    "mask dtype": ({"intervals": torch.zeros(2, 1, 5, 2)}, r"intervals\.dtype = f32 must be int32"),
    "mask and key_bits": (
        {"intervals": torch.zeros(2, 1, 5, 2).int(), "key_bits": torch.zeros(2, 1).int()},
        r"key_bits must be None when intervals\.rank = 4",
    ),
    "key_bits shape": (
        {"key_bits": torch.zeros(3, 1).int()},
        r"key_bits\.shape = \[3, 1\] must be \[batch or 1, words\] = \[2, any\]",
    ),
    "no key_bits": (
        {"key_bits": torch.zeros(2, 0).int()},
        r"key_bits\.shape\[1\] = 0 must be in \[1, .*\] when key_bits is given",
    ),
    "seqused shape": (
        {"seqused_k": int32([9])},
        r"seqused_k\.shape = \[1\] must be \[batch\] = \[2\]",
    ),
    "seqused dtype": (
        {"seqused_k": torch.tensor([9, 9])},
        r"seqused_k\.dtype = int64 must be int32",
    ),
    "cu_seqlens of a dense q": (
        {"cu_seqlens_q": ends([2, 3])},
        r"q\.rank = 4 must be 3 \(packed\) when cu_seqlens_q is given",
    ),
    "packed without cu_seqlens_q": (
        packed(cu_seqlens_q=None),
        r"cu_seqlens_q = null must not be null: q\.rank = 3 means packed",
    ),
    "packed without cu_seqlens_k": (
        packed(cu_seqlens_k=None),
        r"cu_seqlens_k = null must not be null: k\.rank = 3 means packed",
    ),
    "packed and start": (
        packed(start_q=int32([0, 0])),
        r"q\.rank = 3 must be 4 \(padded\) when start_q is given",
    ),
    "cu_seqlens of another batch": (
        packed(cu_seqlens_k=ends([4, 3, 2])),
        r"cu_seqlens_k\.shape = \[4\] must be \[batch \+ 1\] = \[3\]",
    ),
    "empty cu_seqlens": (packed(cu_seqlens_q=int32([])), r"cu_seqlens_q\.shape = \[0\] must be .*"),
    "negative max_seqlen": (
        packed(max_seqlen_k=-1),
        r"max_seqlen_k = -1 must be at least 0, or None when it is unknown",
    ),
    "packed bias without max_seqlen": (
        packed(bias=dense(2, 4, 5, 5)),
        r"max_seqlen_q = 0 must be at least 1 when q is packed and has a bias",
    ),
    "pages without lengths": (paged(seqused_k=None), r"seqused_k = null must not be null: .*"),
    "no pages": (
        paged(page_table=torch.zeros(2, 0).int()),
        r"page_table\.shape\[1\] = 0 must be at least 1",
    ),
    "page_table batch": (
        paged(page_table=int32([[0, 1]])),
        r"page_table\.shape = \[1, 2\] must be \[batch, max_pages\] = \[2, any\]",
    ),
}

unseen = cpu_only("the host reads no values from a GPU, where PyTorch aligns every tensor")
# What shows only in values or in an address.
CONTENTS = {
    "unaligned": ({"q": unaligned()}, r"q = \d+ \(address\) must be a multiple of 4 bytes.*"),
    "seqused over the end": (
        {"seqused_k": int32([9, 10])},
        r"seqused_k\[1\] = 10 must be in \[0, 9\]",
    ),
    "negative seqused": ({"seqused_q": int32([-1, 5])}, r"seqused_q\[0\] = -1 must be in \[0, 5\]"),
    "start": ({"start_k": int32([10, 0])}, r"start_k\[0\] = 10 must be in \[0, 9\]"),
    "start and seqused": (
        {"start_k": int32([4, 0]), "seqused_k": int32([6, 1])},
        r"seqused_k\[0\] = 6 must be in \[0, 5\]",
    ),
    "cu_seqlens backwards": (
        packed(cu_seqlens_q=int32([0, 5, 3])),
        r"cu_seqlens_q\[2\] = 3 must be in \[5, 8\]",
    ),
    "cu_seqlens over the end": (
        packed(cu_seqlens_k=int32([0, 4, 10])),
        r"cu_seqlens_k\[2\] = 10 must be in \[4, 9\]",
    ),
    "negative cu_seqlens": (
        packed(cu_seqlens_q=int32([-1, 3, 8])),
        r"cu_seqlens_q\[0\] = -1 must be in \[0, 8\]",
    ),
    "max_seqlen": (
        packed(max_seqlen_q=4),
        r"cu_seqlens_q\[2\] = 8 must be at most 7, max_seqlen_q = 4 tokens after .*",
    ),
    "page over the end": (
        paged(page_table=int32([[0, 1], [2, 6]])),
        r"page_table\[1\]\[1\] = 6 must be in \[0, 6\), a page of k",
    ),
    "negative page": (
        paged(page_table=int32([[-1, 1], [2, 3]])),
        r"page_table\[0\]\[0\] = -1 must be in \[0, 6\), a page of k",
    ),
    "too few pages": (paged(seqused_k=int32([5, 9])), r"seqused_k\[1\] = 9 must be in \[0, 8\]"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("what", [*INVALID, *(pytest.param(w, marks=unseen) for w in CONTENTS)])
def test_invalid(what: str, grad: bool) -> None:
    changes, sentence = (INVALID | CONTENTS)[what]
    arguments = {"q": dense(), "k": dense(2, 9, 2, 8), "v": dense(2, 9, 2, 8)} | moved(changes)
    if grad:
        arguments["v"] = arguments["v"].detach().requires_grad_()
    with pytest.raises(ValueError) as caught:
        heed.attention(**arguments)
    assert re.fullmatch(sentence, str(caught.value)), str(caught.value)


def test_the_legal_calls_are_legal() -> None:
    base = {"q": dense(), "k": dense(2, 9, 2, 8), "v": dense(2, 9, 2, 8)}
    for changes in ({}, packed(), paged(), {"left": 2**40}, {"seqused_k": int32([0, 0])}):
        heed.attention(**moved(base | changes))


def test_unsupported() -> None:
    arguments = moved({"q": dense(), "k": dense(), "v": dense()} | paged())
    arguments["k"].requires_grad_()
    out = heed.attention(**arguments)
    with pytest.raises(NotImplementedError, match=r"page_table must be null in a backward pass"):
        out.sum().backward()
    with pytest.raises(NotImplementedError):
        heed.attention(*(dense(1, 2, 3, 4).to_sparse() for _ in range(3)))


def test_errors_of_the_operator_itself() -> None:
    """Compiled code and direct callers get the same sentence as a RuntimeError."""
    q = dense()
    with pytest.raises(RuntimeError, match="heed: invalid: scale = nan must be finite"):
        ops.forward(q, q, q, True, float("nan"))


@pytest.mark.parametrize(
    ("name", "bad"),
    {
        "dout": dense(2, 5, 4, 7),
        "dlse": dense(2, 4, 6).float(),
        "lse": dense(2, 5, 4).float(),
        "out": dense(2, 5, 4, 8).bfloat16(),
    }.items(),
)
def test_backward_checks_its_own_tensors(name: str, bad: Tensor) -> None:
    q = dense()
    out, lse = ops.forward(q, q, q, True, 1.0)
    tensors = {"dout": out, "dlse": lse, "q": q, "k": q, "v": q, "out": out, "lse": lse}
    with pytest.raises(RuntimeError, match=f"heed: invalid: {name}\\."):
        ops.backward(*(tensors | {name: bad}).values(), 1.0)


def test_more_elements_than_an_int32_counts() -> None:
    # Two keys 2^31 elements apart; the memory between them is never touched.
    k = torch.as_strided(
        torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE),
        (1, 2, 1, 64),
        (0, 2**31, 64, 1),
    )
    k.copy_(torch.randn(1, 2, 1, 64))
    q = randn(1, 2, 1, 64, dtype=torch.bfloat16)
    assert torch.equal(heed.attention(q, k, k), heed.attention(q, k.contiguous(), k.contiguous()))
