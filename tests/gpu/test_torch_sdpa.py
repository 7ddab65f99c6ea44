"""heed.sdpa on the GPU: what tests/python/test_sdpa.py, which runs here too, leaves out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gpu import DTYPES, GPU, capture
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import heed
from heed import sdpa
from sdpa_cases import assert_close, count_calls, exact, inputs, results


@pytest.fixture
def ran(monkeypatch) -> Counter:
    return count_calls(monkeypatch)


DROPOUT = {"is_causal": True, "dropout_p": 0.5}


def tensors(dtype: torch.dtype = torch.bfloat16, rows: int = 128, keys: int = 128) -> list[Tensor]:
    return [
        torch.randn(2, 4, n, 64, device=GPU, dtype=dtype, requires_grad=True)
        for n in (rows, keys, keys)
    ]


def training(attend: Callable[..., Tensor], inputs: list[Tensor], **options) -> list[Tensor]:
    """out and the gradients, from the same random state every time."""
    torch.manual_seed(11)
    out = attend(*inputs, **options)
    weight = torch.linspace(-1, 1, out.numel(), device=GPU).view(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def dropped(out: Tensor) -> Tensor:
    return (out == 0).float().mean()


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_and_their_dropout(dtype: torch.dtype, backend: SDPBackend, ran: Counter) -> None:
    qkv = tensors(dtype)
    with sdpa.activated(unsupported="error"), sdpa_kernel(backend):
        options = {"is_causal": True}
        got = training(F.scaled_dot_product_attention, qkv, **options)
        assert_close(got[:1], exact(qkv, options)[:1], dtype)
        first, second = (training(F.scaled_dot_product_attention, qkv, **DROPOUT) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert_close(first, second, dtype)
        q = torch.zeros(8, 8, 128, 128, device=GPU, dtype=dtype)
        v = torch.eye(128, device=GPU, dtype=dtype).expand_as(q)
        share = dropped(F.scaled_dot_product_attention(q, q, v, dropout_p=0.25))
    assert share.item() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / q.numel()))
    assert ran == {"forward": 4, "backward": 3}


def test_gradient_of_dropout_is_that_of_its_entries() -> None:
    """Through v, out is linear: its gradient drops what forward dropped."""
    q, k, v = tensors()
    with sdpa.activated(unsupported="error"):
        torch.manual_seed(3)
        out = F.scaled_dot_product_attention(q, k, v, **DROPOUT)
        dout = torch.randn_like(out)
        (dv,) = torch.autograd.grad(out, v, dout)
        torch.manual_seed(3)
        direction = torch.randn_like(v)
        torch.manual_seed(3)
        with torch.no_grad():
            moved = F.scaled_dot_product_attention(q, k, direction, **DROPOUT)
    left, right = (dv.double() * direction.double()).sum(), (dout.double() * moved.double()).sum()
    assert left.item() == pytest.approx(right.item(), rel=2e-2, abs=4.0)


def test_pytorchs_forward_keeps_pytorchs_backward(ran: Counter) -> None:
    """Dropout in a forward pass before activation: its own kernel differentiates it."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        qkv = tensors()
        want = training(F.scaled_dot_product_attention, qkv, **DROPOUT)
        torch.manual_seed(11)
        out = F.scaled_dot_product_attention(*qkv, **DROPOUT)
        weight = torch.linspace(-1, 1, out.numel(), device=GPU).view(out.shape).to(out)
        with sdpa.activated():
            got = [out.detach(), *torch.autograd.grad(out, qkv, weight)]
    assert_close(got, want, torch.bfloat16)
    assert not ran


def test_seeds_on_the_host(ran: Counter) -> None:
    qkv = tensors()
    with sdpa.activated(unsupported="error"):
        want = training(F.scaled_dot_product_attention, qkv, **DROPOUT)
        with save_on_cpu():
            got = training(F.scaled_dot_product_attention, qkv, **DROPOUT)
    assert_close(got, want, torch.bfloat16)
    assert ran == {"forward": 2, "backward": 2}


def test_float32_is_pytorchs(ran: Counter) -> None:
    qkv = tensors(torch.float32)
    want = training(F.scaled_dot_product_attention, qkv, is_causal=True)
    with sdpa.activated():
        got = training(F.scaled_dot_product_attention, qkv, is_causal=True)
    assert_close(got, want, torch.bfloat16)
    sentence = r"heed\.sdpa, aten::_scaled_dot_product_efficient_attention: .*; activate\("
    with (
        sdpa.activated(unsupported="error"),
        pytest.raises((NotImplementedError, ValueError), match=sentence),
    ):
        training(F.scaled_dot_product_attention, qkv, is_causal=True)


def test_cudnn_when_it_is_asked_for(ran: Counter) -> None:
    qkv = tensors()
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            want = training(F.scaled_dot_product_attention, qkv, is_causal=True)
    except RuntimeError:
        pytest.skip("needs cuDNN attention")
    with sdpa.activated(unsupported="error"):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            got = training(F.scaled_dot_product_attention, qkv, is_causal=True)
        assert not ran
        training(F.scaled_dot_product_attention, qkv, is_causal=True)
        assert ran["forward"] == 1
    assert_close(got, want, torch.bfloat16)


@pytest.mark.parametrize("rows, keys", [(64, 128), (128, 128)])
def test_causal_lower_right(rows: int, keys: int, ran: Counter) -> None:
    q, k, v = tensors(rows=rows, keys=keys)
    with sdpa.activated(unsupported="error"):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(rows, keys))
        assert ran["forward"] == 1
    want = heed.attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=True).transpose(1, 2)
    assert torch.equal(out, want)


def test_jagged_nested_tensors(ran: Counter) -> None:
    lengths = (100, 37, 64)
    parts = [[torch.randn(n, 4, 64, device=GPU, dtype=torch.bfloat16) for n in lengths]] * 3
    nested = [
        torch.nested.nested_tensor(part, layout=torch.jagged).requires_grad_() for part in parts
    ]
    with sdpa.activated(unsupported="error"), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in nested), is_causal=True)
        out.transpose(1, 2).values().float().square().sum().backward()
    assert ran == {"forward": 1, "backward": 1}
    for got, part in zip(out.transpose(1, 2).unbind(), parts[0], strict=True):
        want = heed.attention(part[None], part[None], part[None], causal=True)[0]
        assert_close([got], [want], torch.bfloat16)
    assert all(torch.isfinite(t.grad.values()).all() for t in nested)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiled_training(dropout_p: float, mode: str) -> None:
    """Compiled while heed is active, with dropout and CUDA graphs."""
    torch._dynamo.reset()

    def layer(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (x @ weight).unflatten(-1, (3, 4, 64)).permute(2, 0, 3, 1, 4)
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)
        masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return (causal + masked).transpose(1, 2).flatten(-2)

    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    weight = (torch.randn(64, 768, device=GPU) / 8).bfloat16().requires_grad_()
    mask = torch.rand(2, 1, 128, 128, device=GPU) > 0.3
    x = torch.randn(2, 128, 64, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    outs = []
    with sdpa.activated(unsupported="error"):
        for _ in range(4):  # warm-up, capture, replays
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(x, weight, mask)
            dout = torch.randn_like(out)
            got = [out.detach().clone(), *torch.autograd.grad(out, (x, weight), dout)]
            got = [t.clone() for t in got]
            outs.append(got[0])
            assert all(torch.isfinite(t).all() for t in got)
            if not dropout_p:
                eager = layer(x, weight, mask)
                want = [eager.detach(), *torch.autograd.grad(eager, (x, weight), dout)]
                assert_close(got, want, torch.bfloat16)
            del out
    assert torch.equal(outs[2], outs[3]) == (not dropout_p)


def test_captured_dropout_changes_with_every_replay() -> None:
    q, k, v = (t.detach() for t in tensors())
    with sdpa.activated(unsupported="error"):
        replay, (out,) = capture(lambda: [F.scaled_dot_product_attention(q, k, v, **DROPOUT)])
        seen = []
        for _ in range(2):
            replay()
            seen.append(out.clone())
    assert not torch.equal(*seen)


def test_autocast(ran: Counter) -> None:
    qkv = tensors(torch.float32)
    with sdpa.activated(unsupported="error"), torch.autocast("cuda", torch.bfloat16):
        got = training(F.scaled_dot_product_attention, qkv, is_causal=True)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    assert_close(got[:1], exact(qkv, {"is_causal": True})[:1], torch.bfloat16)
    assert ran == {"forward": 1, "backward": 1}


def test_deterministic_gradients(deterministic) -> None:
    names = ("grouped", "float mask")
    with sdpa.activated(unsupported="error"):
        for name in names:
            qkv, options = inputs(name, torch.bfloat16)
            first, second = results(qkv, options), results(qkv, options)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
