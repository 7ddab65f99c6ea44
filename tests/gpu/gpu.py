"""Problems on the GPU, and what their results are compared by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import heed
from cases import CASES, Case

GPU = "cuda"
DTYPES = (torch.bfloat16, torch.float16)
NAMES = tuple(CASES)
WITH_BACKWARD = tuple(name for name in CASES if name != "paged")


def case_of(name: str, dtype: torch.dtype = torch.bfloat16, poisoned: bool = True) -> Case:
    case = CASES[name]().to(dtype, GPU)
    if poisoned:
        return case
    return Case(*(t.nan_to_num() for t in (case.q, case.k, case.v)), case.options)


def dense(
    batch: int = 2,
    seqlen_q: int = 300,
    seqlen_k: int = 300,
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: str = GPU,
    **options,
) -> Case:
    """Random tensors [batch, seqlen, heads, head_dim], the same on every device."""
    shapes = [(batch, seqlen_q, heads[0], head_dim), *[(batch, seqlen_k, heads[1], head_dim)] * 2]
    return Case(*(torch.randn(shape).to(device, dtype) for shape in shapes), options)


def forward(case: Case) -> list[Tensor]:
    """out and lse."""
    return list(heed.attention(case.q, case.k, case.v, **case.options, return_lse=True))


def inputs(case: Case) -> list[Tensor]:
    """What has a gradient: q, k, v, bias, sink. It requires one from now on."""
    options = [case.options[name] for name in ("bias", "sink") if name in case.options]
    tensors = [case.q, case.k, case.v, *(t for t in options if t.is_floating_point())]
    return [t.requires_grad_() for t in tensors]


def upstream(case: Case) -> list[Tensor]:
    """Gradients of out and lse; a lse of -inf has one of 0."""
    with torch.no_grad():
        out, lse = forward(case)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator).to(out)
    dlse = torch.randn(lse.shape, generator=generator).to(lse)
    return [dout, torch.where(torch.isfinite(lse), dlse, 0.0)]


def forward_and_backward(case: Case, gradients: list[Tensor]) -> list[Tensor]:
    """out, lse and the gradients of `inputs`."""
    tensors = inputs(case)
    results = forward(case)
    return [t.detach() for t in results] + list(torch.autograd.grad(results, tensors, gradients))


def assert_same(got: list[Tensor], want: list[Tensor], bits: bool = False) -> None:
    """Equal, or, for sums whose order is free, within 4 roundings of the largest value."""
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, index
        a, b = a.detach(), b.detach().to(a.device)
        if bits:
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), index
            continue
        scale = b.nan_to_num(neginf=0.0).abs().amax().item() if b.numel() else 0.0
        tolerance = 4 * torch.finfo(a.dtype).eps * scale
        if a.dtype == torch.float32:  # lse: of exponentials of at most a few
            tolerance = 1e-5 * max(1.0, scale)
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True, msg=str(index))


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """PyTorch's own synchronisations raise here."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def keep_busy() -> None:
    """The current stream has work for about 0.2 s (at 2 GHz)."""
    torch.cuda._sleep(400_000_000)


def capture(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
    """A graph's replay, and the tensors in which it leaves what `function` returns."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results
