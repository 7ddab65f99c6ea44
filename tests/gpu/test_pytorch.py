"""heed in PyTorch on the GPU: compiled, checkpointed, autocast, deterministic, huge tensors."""

from __future__ import annotations

import pytest
import torch
from gpu import (
    DTYPES,
    GPU,
    WITH_BACKWARD,
    assert_same,
    case_of,
    dense,
    forward,
    forward_and_backward,
    inputs,
    upstream,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import heed
from cases import Case

# ---- torch.compile ----


def self_attention(x: Tensor, weight: Tensor) -> Tensor:
    q, k, v = (x @ weight).unflatten(-1, (3, 4, 64)).unbind(-3)
    return heed.attention(q, k, v, causal=True).flatten(-2)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_training(dtype: torch.dtype, mode: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(self_attention, fullgraph=True, mode=mode)
    weight = (torch.randn(64, 768) / 8).to(GPU, dtype).requires_grad_()
    for _ in range(4):  # eager warm-up, capture, two replays with other contents
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(2, 200, 64).to(GPU, dtype).requires_grad_()
        dout = torch.randn(2, 200, 256).to(GPU, dtype)
        out = compiled(x, weight)
        got = [out.detach().clone(), *torch.autograd.grad(out, (x, weight), dout)]
        got = [t.clone() for t in got]
        eager = self_attention(x, weight)
        want = [eager.detach(), *torch.autograd.grad(eager, (x, weight), dout)]
        assert_same(got, want)
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_decoding(mode: str) -> None:
    """The length stays on the device: one graph for all lengths."""
    torch._dynamo.reset()
    counters.clear()

    @torch.compile(fullgraph=True, mode=mode)
    def step(q: Tensor, cache: Tensor, token: Tensor, length: Tensor) -> Tensor:
        cache.index_copy_(2, length.long(), token)
        return heed.attention(q, cache[0], cache[1], causal=True, seqused_k=length + 1)

    shapes = ((1, 1, 8, 64), (2, 1, 40, 2, 64), (2, 1, 1, 2, 64))
    q, cache, token = (torch.randn(shape).to(GPU, torch.bfloat16) for shape in shapes)
    torch._dynamo.mark_static_address(cache)  # a graph may write into it
    for at in (0, 1, 7, 39):
        torch.compiler.cudagraph_mark_step_begin()
        q, token = torch.randn_like(q), torch.randn_like(token)
        got = step(q, cache, token, torch.tensor([at], dtype=torch.int32, device=GPU)).clone()
        k, v = cache[:, :, : at + 1]
        assert torch.equal(cache[:, :, at], token[:, :, 0])
        assert_same([got], [heed.attention(q, k, v, causal=True)])
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["sink", "bias", "packed_causal", "everything"])
def test_compiled_options(name: str) -> None:
    torch._dynamo.reset()
    case = case_of(name, poisoned=False)
    gradients = upstream(case)
    want = forward_and_backward(case, gradients)
    compiled = torch.compile(heed.attention, fullgraph=True)
    out = compiled(case.q, case.k, case.v, **case.options, return_lse=True)
    got = [t.detach() for t in out] + list(torch.autograd.grad(out, inputs(case), gradients))
    assert_same(got, want)


# ---- checkpointing and autocast ----


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("deterministic")
def test_checkpointing_repeats_the_dropout(reentrant: bool) -> None:
    case = dense()
    dout = torch.randn_like(case.q)

    def attend(*tensors: Tensor) -> Tensor:
        return heed.attention(*tensors, causal=True, dropout_p=0.3)

    results = []
    for wrap in (False, True):
        tensors = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
        torch.manual_seed(3)
        out = checkpoint(attend, *tensors, use_reentrant=reentrant) if wrap else attend(*tensors)
        out.backward(dout)
        results.append([out, *(t.grad for t in tensors)])
    assert_same(*results, bits=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("deterministic")
def test_autocast(dtype: torch.dtype) -> None:
    wide = dense(dtype=torch.float32, causal=True)
    narrow = wide.to(dtype, GPU)
    dout = torch.randn_like(narrow.q)
    tensors = inputs(wide)
    with torch.autocast(GPU, dtype):
        out = heed.attention(*tensors, causal=True)
        mixed = heed.attention(wide.q, narrow.k, wide.v, causal=True)
    want = heed.attention(*inputs(narrow), causal=True)
    assert out.dtype == dtype
    assert_same([out, mixed], [want, want], bits=True)
    got = torch.autograd.grad(out, tensors, dout)
    want = torch.autograd.grad(want, inputs(narrow), dout)
    assert all(t.dtype == torch.float32 for t in got)
    assert_same([t.to(dtype) for t in got], list(want), bits=True)


def test_autocast_leaves_float64() -> None:
    q = torch.randn(1, 4, 2, 64, dtype=torch.float64, device=GPU)
    with torch.autocast(GPU, torch.bfloat16), pytest.raises(NotImplementedError, match="f64"):
        heed.attention(q, q, q)


# ---- the same bits ----


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.usefixtures("deterministic")
def test_deterministic_backward(head_dim: int, heads: tuple[int, int]) -> None:
    """Many blocks of keys add to every row of dq."""
    case = dense(2, 1000, 1500, heads, head_dim, causal=True)
    gradients = upstream(case)
    first = forward_and_backward(case, gradients)
    assert all(t.isfinite().all() for t in first)
    for _ in range(100):
        assert_same(forward_and_backward(case, gradients), first, bits=True)


@pytest.mark.parametrize("name", WITH_BACKWARD)
@pytest.mark.usefixtures("deterministic")
def test_deterministic_options(name: str) -> None:
    case = case_of(name)
    gradients = upstream(case)
    first = forward_and_backward(case, gradients)
    for _ in range(5):
        assert_same(forward_and_backward(case, gradients), first, bits=True)


def test_deterministic_by_argument() -> None:
    case = dense(2, 1000, 1500, causal=True)
    gradients = upstream(case)
    case.options["deterministic"] = True
    by_argument = forward_and_backward(case, gradients)
    case.options["deterministic"] = None
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(forward_and_backward(case, gradients), by_argument, bits=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(forward_and_backward(case, gradients), by_argument)


def test_forward_is_always_deterministic() -> None:
    for case in (dense(causal=True), dense(seqlen_q=1, seqlen_k=5000)):
        first = forward(case)
        for _ in range(20):
            assert_same(forward(case), first, bits=True)


# ---- more than 2^31 elements ----

ENTRIES, SLOTS, HEADS, DIM = 17, 2**17, 8, 128  # 17 * 2^27 elements, 4.25 GiB


@pytest.fixture
def large() -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    yield
    torch.cuda.empty_cache()


# With pytest-xdist and --dist loadgroup: they take 20 to 35 GiB each.
one_at_a_time = pytest.mark.xdist_group("large")


def random(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=GPU).normal_()


@one_at_a_time
@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("which", ["keys", "queries"])
def test_large_tensors(which: str) -> None:
    """The last entry lies past element 2^31; it must be as it is alone, in both directions."""
    long, short = (ENTRIES, SLOTS, HEADS, DIM), (ENTRIES, 64, HEADS, DIM)
    q = random(*(long if which == "queries" else short))
    k, v = (random(*(long if which == "keys" else short)) for _ in range(2))
    dout = random(*q.shape)
    case = Case(q, k, v, {})
    results = forward_and_backward(case, [dout, torch.zeros(ENTRIES, HEADS, q.shape[1]).to(GPU)])
    assert max(t.numel() for t in results) > 2**31
    for entry in (0, ENTRIES - 1):
        alone = Case(*(t.detach()[entry : entry + 1].clone() for t in (q, k, v)), {})
        none = torch.zeros(1, HEADS, q.shape[1], device=GPU)
        want = forward_and_backward(alone, [dout[entry : entry + 1], none])
        assert_same([t[entry : entry + 1] for t in results], want)


@one_at_a_time
@pytest.mark.usefixtures("large")
def test_large_cache_decoded_packed_and_paged() -> None:
    k, v = random(ENTRIES, SLOTS, HEADS, DIM), random(ENTRIES, SLOTS, HEADS, DIM)
    q = random(ENTRIES, 1, 2 * HEADS, DIM)
    want = heed.attention(q[-1:], k[-1:].clone(), v[-1:].clone())[0]
    assert_same([heed.attention(q, k, v)[-1]], [want])

    ends = torch.arange(ENTRIES + 1, dtype=torch.int32, device=GPU)
    packed = heed.attention(
        q[:, 0], k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=ends, cu_seqlens_k=ends * SLOTS
    )
    assert_same([packed[-1:]], [want])

    page = 256
    table = torch.arange(ENTRIES * SLOTS // page, dtype=torch.int32, device=GPU)
    paged = heed.attention(
        q,
        k.view(-1, page, HEADS, DIM),
        v.view(-1, page, HEADS, DIM),
        page_table=table.view(ENTRIES, -1),
        seqused_k=torch.full_like(ends[1:], SLOTS),
    )
    assert_same([paged[-1]], [want])


@one_at_a_time
@pytest.mark.usefixtures("large")
def test_large_strides() -> None:
    """Rows, heads and entries that lie 2^30 elements apart."""
    memory = random(2**32 + 2**12)
    for order in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        step = [(2**31, 2**30, 128)[place] for place in order]
        strided = memory.as_strided((2, 2, 2, 64), (*step, 1))
        alone = Case(*(strided.clone(memory_format=torch.contiguous_format) for _ in range(3)), {})
        gradients = upstream(alone)
        got = forward_and_backward(
            Case(*(strided.detach() for _ in range(3)), {}), [strided, gradients[1]]
        )
        want = forward_and_backward(alone, [alone.q.detach(), gradients[1]])
        assert_same(got, want)
