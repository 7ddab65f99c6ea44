"""Calls of scaled_dot_product_attention, and what their results are compared by."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from device import DTYPE, randn
from heed import sdpa

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# Rows, keys, query heads, key heads, is_causal, mask.
SHAPES = {
    "full": (70, 70, 4, 4, False, None),
    "causal": (70, 70, 4, 4, True, None),
    "grouped": (70, 70, 6, 2, True, None),
    "one key head": (70, 70, 4, 1, False, None),
    "decode": (1, 90, 4, 2, False, None),
    "causal, fewer rows": (33, 70, 4, 4, True, None),
    "causal, fewer keys": (70, 33, 4, 4, True, None),
    "bool mask": (70, 50, 4, 4, False, (2, 1, 70, 50)),
    "bool mask of a head": (70, 50, 4, 4, False, (1, 4, 70, 50)),
    "float mask": (70, 70, 4, 4, False, (2, 4, 70, 70)),
    "float mask, rank 2": (70, 50, 4, 4, False, (70, 50)),
    "row of a mask": (70, 50, 4, 4, False, (2, 1, 1, 50)),
    "rows without keys": (70, 50, 4, 4, False, (2, 1, 70, 50)),
}


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often heed's operators are called from now on: forward, backward."""
    calls: Counter = Counter()

    def count(name: str) -> None:
        function = getattr(sdpa, name)

        def counted(*args, **options):
            calls[name.removeprefix("_")] += 1
            return function(*args, **options)

        monkeypatch.setattr(sdpa, name, counted)

    count("_forward")
    count("_backward")
    return calls


def inputs(name: str, dtype: torch.dtype, head_dim: int = 16) -> tuple[list[Tensor], dict]:
    rows, keys, heads, key_heads, is_causal, mask = SHAPES[name]
    shapes = ((heads, rows), (key_heads, keys), (key_heads, keys))
    tensors = [randn(2, h, n, head_dim, dtype=dtype, requires_grad=True) for h, n in shapes]
    options: dict = {"is_causal": is_causal}
    if heads != key_heads:
        options["enable_gqa"] = True
    if mask:
        values = randn(*mask, dtype=dtype)
        if "float" not in name:
            values = values > -0.5
        if name == "rows without keys":
            values[:, :, 5:9] = False
        options["attn_mask"] = values
    return tensors, options


def results(tensors: list[Tensor], options: dict) -> list[Tensor]:
    """out and the gradients of q, k and v."""
    out = F.scaled_dot_product_attention(*tensors, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, tensors, weight)]


def exact(tensors: list[Tensor], options: dict) -> list[Tensor]:
    tensors = [t.detach().double().requires_grad_() for t in tensors]
    if (mask := options.get("attn_mask")) is not None and mask.is_floating_point():
        options = options | {"attn_mask": mask.double()}
    with sdpa_kernel(SDPBackend.MATH):
        return results(tensors, options)


def assert_close(got: list[Tensor], want: list[Tensor], dtype: torch.dtype = DTYPE) -> None:
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        a, b = a.detach(), b.detach()
        assert a.shape == b.shape, index
        largest = max(1.0, float(b.abs().amax()))
        error = float((a.double() - b.double()).abs().amax())
        assert error <= TOLERANCE[dtype] * largest, f"{index}: {error:.1e} of {largest:.1e}"
