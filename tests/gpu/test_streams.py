"""A call runs on the current stream of its tensors' device, and nothing waits for it."""

from __future__ import annotations

import pytest
import torch
from gpu import (
    GPU,
    NAMES,
    WITH_BACKWARD,
    assert_same,
    case_of,
    dense,
    forward,
    forward_and_backward,
    keep_busy,
    no_synchronisation,
    upstream,
)

import heed
from cases import Case

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
# Decoding splits the keys: partial results pass through scratch memory.
PROBLEMS = {
    "causal": lambda: dense(causal=True),
    "decode": lambda: dense(seqlen_q=1, seqlen_k=5000),
    "bias": lambda: dense(bias=torch.randn(1, 8, 300, 300).to(GPU)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_side_stream(name: str) -> None:
    """The tensors get their values on the side stream, after a while."""
    case = PROBLEMS[name]()
    gradients = upstream(case)
    want = forward_and_backward(case, gradients)
    sources = [case.q.detach(), case.k.detach(), case.v.detach(), gradients[0]]
    late = [torch.full_like(t, torch.nan) for t in sources]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        keep_busy()
        for t, source in zip(late, sources, strict=True):
            t.copy_(source)
        options = {n: x.detach() if n == "bias" else x for n, x in case.options.items()}
        got = forward_and_backward(Case(*late[:3], options), [late[3], gradients[1]])
    torch.cuda.synchronize()
    assert_same(got, want)


@pytest.mark.parametrize("name", PROBLEMS)
def test_two_streams_at_once(name: str) -> None:
    cases = [PROBLEMS[name]() for _ in range(2)]
    gradients = [upstream(case) for case in cases]
    want = [forward_and_backward(*pair) for pair in zip(cases, gradients, strict=True)]
    streams = [torch.cuda.Stream() for _ in cases]
    results = []
    torch.cuda.synchronize()
    for _ in range(10):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got = forward_and_backward(cases[index], gradients[index])
                results.append((index, got))
    torch.cuda.synchronize()
    for index, got in results:
        assert_same(got, want[index])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.usefixtures("deterministic")
def test_ordered_sums_on_many_streams(head_dim: int) -> None:
    """Blocks wait for each other; of kernels that share a GPU only some blocks run at a time."""
    case = dense(2, 4096, 4096, (8, 8), head_dim, causal=True)
    gradients = upstream(case)
    want = forward_and_backward(case, gradients)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    torch.cuda.synchronize()
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(forward_and_backward(case, gradients))
    torch.cuda.synchronize()
    for got in results:
        assert_same(got, want, bits=True)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits(name: str) -> None:
    """Neither PyTorch nor heed: the stream is still busy when the results are there."""
    case = case_of(name)
    gradients = upstream(case)

    def call():
        return forward_and_backward(case, gradients) if name in WITH_BACKWARD else forward(case)

    for _ in range(2):  # loads the kernels and fills PyTorch's cache of memory
        call()
    torch.cuda.synchronize()
    with no_synchronisation():
        keep_busy()
        results = call()
        assert not torch.cuda.current_stream().query()
    assert results


def test_a_drawn_seed_does_not_wait() -> None:
    case = dense(dropout_p=0.1)
    forward(case)
    torch.cuda.synchronize()
    with no_synchronisation():
        keep_busy()
        forward(case)
        assert not torch.cuda.current_stream().query()


@needs_two
@pytest.mark.parametrize("name", PROBLEMS)
def test_tensors_on_another_device(name: str) -> None:
    case = PROBLEMS[name]()
    gradients = upstream(case)
    want = forward_and_backward(case, gradients)
    there = case.to(case.q.dtype, "cuda:1")
    there = Case(*(t.detach() for t in (there.q, there.k, there.v)), there.options)
    there.options = {n: x.detach() if n == "bias" else x for n, x in there.options.items()}
    with torch.cuda.device(0):
        got = forward_and_backward(there, [t.to("cuda:1") for t in gradients])
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda:1") for t in got)
    assert_same([t.to("cuda:0") for t in got], want)


@needs_two
def test_side_stream_of_another_device() -> None:
    case = dense(device="cuda:1", causal=True)
    want = forward(case)
    late = torch.full_like(case.q, torch.nan)
    torch.cuda.synchronize(1)
    stream = torch.cuda.Stream(device="cuda:1")
    with torch.cuda.stream(stream):
        keep_busy()
        late.copy_(case.q)
        torch.cuda.set_device(0)  # the current stream of cuda:1 stays
        got = forward(Case(late, case.k, case.v, case.options))
    stream.synchronize()
    assert_same(got, want)


@needs_two
def test_tensors_on_two_devices() -> None:
    case = dense()
    with pytest.raises(ValueError, match=r"k\.device = cuda:1 must be q\.device = cuda:0"):
        heed.attention(case.q, case.k.to("cuda:1"), case.v)
