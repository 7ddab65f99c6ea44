"""heed.attention and its operators against a float64 composition, and as citizens of PyTorch."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import heed
import oracle
from cases import CASES, Case, int32
from device import DEVICE, DTYPE, DTYPES, ON_CPU, cpu_only, moved, randn
from heed import ops

# Of the largest value: roundings of the dtype, and of lse, which is float32 in between.
TOLERANCE = {
    torch.float64: 5e-7,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
# Between two runs of one gradient: a GPU adds to dq in any order, a CPU in one.
SAME_SUM = 0.0 if ON_CPU else 2 * torch.finfo(DTYPE).eps
GRADIENTS = ("q", "k", "v", "bias", "sink")


def leaves(case: Case) -> dict[str, Tensor]:
    """Fresh copies of what differentiates."""
    tensors = {"q": case.q, "k": case.k, "v": case.v}
    tensors |= {
        name: case.options[name]
        for name in ("bias", "sink")
        if name in case.options and case.options[name].is_floating_point()
    }
    return {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}


def run(attention, case: Case, tensors: dict[str, Tensor] | None = None, **changes):
    options = moved(case.options | changes, case.q.device)
    tensors = {"q": case.q, "k": case.k, "v": case.v} | (tensors or {})
    options |= {name: t for name, t in tensors.items() if name in ("bias", "sink")}
    return attention(tensors["q"], tensors["k"], tensors["v"], **options)


def with_lse(*tensors, **options):
    return heed.attention(*tensors, **options, return_lse=True)


def exact(*tensors, **options):
    """The oracle, which computes on the CPU."""
    return oracle.attention(*(t.cpu() for t in tensors), **moved(options, "cpu"))


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape, name
    assert torch.equal(torch.isneginf(got), torch.isneginf(want)), f"{name}: rows without keys"
    finite = torch.isfinite(want)
    assert torch.isfinite(got[finite]).all(), name
    error = (got - want)[finite].abs().amax() if finite.any() else torch.tensor(0.0)
    largest = max(1.0, float(want[finite].abs().amax())) if finite.any() else 1.0
    assert error <= tolerance * largest, f"{name}: {error:.2e} of {largest:.2e}"


def losses_gradients(attention, case: Case) -> dict[str, Tensor]:
    """Gradients of random weights on out and on every finite lse."""
    tensors = leaves(case)
    out, lse = run(attention, case, tensors)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(case.q.dtype)
    dout, dlse = dout.to(out.device), torch.randn(lse.shape, generator=generator).to(lse.device)
    rows = torch.isfinite(lse)
    loss = (out.double() * dout.double()).sum() + (lse[rows].double() * dlse[rows]).sum()
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    return dict(zip(tensors, gradients, strict=True))


# ---- values ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]().to(dtype)
    out, lse = run(with_lse, case)
    want_out, want_lse = run(exact, case)
    assert out.dtype == dtype and out.is_contiguous()
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    assert_close("out", out, want_out, TOLERANCE[dtype])
    assert_close("lse", lse, want_lse, max(1e-6, 0.1 * TOLERANCE[dtype]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name != "paged"])
def test_gradients(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]().to(dtype)
    got = losses_gradients(with_lse, case)
    want = losses_gradients(exact, case)
    for of, gradient in got.items():
        source = case.options[of] if of in case.options else case.q
        assert gradient.dtype == source.dtype
        tolerance = max(TOLERANCE[dtype], TOLERANCE[source.dtype])
        assert_close(f"d{of}", gradient, want[of], 4 * tolerance)


def test_any_strides() -> None:
    fused = randn(2, 6, 3, 4, 8)
    views = {
        "slices of one tensor": fused.unbind(2),
        "heads first": [t.transpose(1, 2).contiguous().transpose(1, 2) for t in fused.unbind(2)],
        "last stride 2": [torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in fused.unbind(2)],
        "last stride large": [t.mT.contiguous().mT for t in fused.unbind(2)],
    }
    want = heed.attention(*(t.contiguous() for t in fused.unbind(2)), causal=True)
    for name, tensors in views.items():
        assert torch.equal(heed.attention(*tensors, causal=True), want), name
    repeated = randn(1, 6, 1, 8).expand(2, 6, 4, 8)
    copied = repeated.contiguous()
    assert torch.equal(
        heed.attention(repeated, repeated, repeated), heed.attention(copied, copied, copied)
    )


def test_gradient_of_a_sum_is_expanded() -> None:
    q, k, v = (randn(2, 6, 4, 8, requires_grad=True) for _ in range(3))
    heed.attention(q, k, v).sum().backward()
    assert v.grad.sum().item() == pytest.approx(2 * 6 * 4 * 8, rel=TOLERANCE[DTYPE])


@pytest.mark.parametrize("shape", ["batch", "queries", "keys", "heads", "total"])
def test_nothing_to_do(shape: str) -> None:
    sizes = {"batch": 2, "queries": 3, "keys": 4, "heads": 2} | {shape: 0}
    q = randn(sizes["batch"], sizes["queries"], sizes["heads"], 8)
    k = randn(sizes["batch"], sizes["keys"], sizes["heads"], 8)
    options = {}
    if shape == "total":
        q, k = q[0, :0], k[0, :0]
        options = moved({"cu_seqlens_q": int32([0, 0]), "cu_seqlens_k": int32([0, 0])})
    q.requires_grad_()
    k.requires_grad_()
    out, lse = heed.attention(q, k, k, **options, return_lse=True)
    assert out.shape == q.shape and (out == 0).all()
    assert torch.isneginf(lse).all()
    out.sum().backward()
    assert (q.grad == 0).all() and (k.grad == 0).all()


@cpu_only("threads are a CPU's")
def test_all_threads_give_the_same_bits() -> None:
    case = CASES["everything"]().to(DTYPE)
    big = Case(*(torch.randn(2, 300, 4, 32) for _ in range(3)), {"causal": True})
    decode = CASES["one_query_many_keys"]().to(DTYPE)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(
                [t for c in (case, big, decode) for t in run(with_lse, c)]
                + [t for c in (case, big) for t in losses_gradients(with_lse, c).values()]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bit_rows", [0, 1, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "expanded", "strided"])
def test_intervals_and_bits_in_one_tensor(layout: str, batch: int, bit_rows: int) -> None:
    q, k, v = randn(2, 5, 4, 8), randn(2, 60, 2, 8), randn(2, 60, 2, 8)
    first = torch.randint(0, 20, (batch, 5, 1))
    rows = torch.cat((first, first + torch.randint(0, 50, (batch, 5, 1))), 2).int()
    bits = torch.randint(-(2**31), 2**31, (batch, bit_rows, 2)).int()
    mask = torch.cat((rows, bits), 1)[:, None].to(DEVICE)
    options = {"intervals": mask[:, 0, :5]}
    if bit_rows:
        options["key_bits"] = mask[:, 0, 5:].flatten(1)
    if layout == "expanded":
        mask = mask[:1].expand(2, -1, -1, -1)
        options = {name: x[:1] for name, x in options.items()}
    elif layout == "strided":
        mask = torch.stack((mask, mask), -1)[..., 0]
    case = Case(q, k, v, options)
    whole = Case(q, k, v, {"intervals": mask})
    for a, b in zip(run(with_lse, case), run(with_lse, whole), strict=True):
        assert torch.equal(a, b)
    expected = losses_gradients(with_lse, case)
    for name, gradient in losses_gradients(with_lse, whole).items():
        assert_close(name, gradient, expected[name], SAME_SUM)


# ---- every option is honoured ----

CHANGES = {
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 1.0},
    "left": {"left": 1},
    "right": {"right": 1},
    "chunk": {"chunk": 3},
    "causal": {"causal": True},
    "start_q": {"start_q": int32([0, 2]), "causal": True},
    "start_k": {"start_k": int32([0, 2])},
    "seqused_q": {"seqused_q": int32([5, 2])},
    "seqused_k": {"seqused_k": int32([9, 2])},
    "intervals": {"intervals": int32([[[1, 4]] * 5])},
    "key_bits": {"key_bits": int32([[0b101010]])},
    "bias": {"bias": torch.arange(9.0).reshape(1, 1, 1, 9)},
    "sink": {"sink": torch.ones(4)},
    "dropout_p": {"dropout_p": 0.5},
    "seed": {"dropout_p": 0.5, "seed": torch.tensor([3])},
}
# These describe another layout of q or k: test_values covers them, and here they are refused.
REFUSED = {
    "cu_seqlens_q": int32([0, 5, 10]),
    "cu_seqlens_k": int32([0, 9, 18]),
    "page_table": int32([[0], [1]]),
    "max_seqlen_q": -2,
    "max_seqlen_k": -2,
}


def test_every_option_is_tested() -> None:
    options = set(inspect.signature(heed.attention).parameters)
    # `deterministic` says how gradients are added up: tests/gpu
    options -= {"q", "k", "v", "return_lse", "deterministic"}
    assert options == set(CHANGES) | set(REFUSED)
    parameters = inspect.signature(heed.attention).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p.name not in ("q", "k", "v"))


@pytest.mark.parametrize("option", CHANGES)
def test_option_changes_the_result(option: str) -> None:
    case = CASES["full"]().to(DTYPE)
    without = {name: x for name, x in CHANGES[option].items() if name != option}
    base = run(heed.attention, case, **without)
    assert not torch.equal(base, run(heed.attention, case, **CHANGES[option]))


@pytest.mark.parametrize("option", REFUSED)
def test_option_is_refused(option: str) -> None:
    case = CASES["full"]().to(DTYPE)
    with pytest.raises(ValueError):
        run(heed.attention, case, **{option: REFUSED[option]})


# ---- dropout ----


def test_dropout_draws_from_torchs_generator() -> None:
    q = randn(1, 8, 2, 8)
    torch.manual_seed(5)
    first, second = (heed.attention(q, q, q, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    again = heed.attention(q, q, q, dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)
    state = torch.get_rng_state()
    heed.attention(q, q, q)
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_keeps_the_mean() -> None:
    v = torch.ones(1, 512, 1, 8, dtype=DTYPE, device=DEVICE)
    q = torch.zeros(64, 16, 1, 8, dtype=DTYPE, device=DEVICE)
    k = v = v.expand(64, -1, -1, -1)
    out = heed.attention(q, k, v, dropout_p=0.3).float()
    assert abs(out.mean() - 1) < 0.01
    assert abs(out[..., 0].var() - 0.3 / 0.7 / 512) < 0.0002


# ---- gradients ----

needs_float64 = cpu_only("finite differences need float64")


@needs_float64
@pytest.mark.parametrize(
    "name",
    ["causal", "wider_v", "softcap", "bias", "packed_causal", "padding_on_both_sides", "dropout"],
)
def test_gradcheck(name: str) -> None:
    case = CASES[name]()
    case = Case(*(t.nan_to_num() for t in (case.q, case.k, case.v)), case.options)
    tensors = leaves(case)

    def out(*values: Tensor) -> Tensor:
        return run(heed.attention, case, dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(out, tuple(tensors.values()))


@needs_float64
def test_gradcheck_of_lse() -> None:
    # lse is float32: steps of 1/64 stand out of its rounding.
    case = CASES["causal"]()

    def lse(q: Tensor, k: Tensor) -> Tensor:
        return heed.attention(q, k, case.v, causal=True, return_lse=True)[1].double()

    inputs = (case.q.requires_grad_(), case.k.requires_grad_())
    assert torch.autograd.gradcheck(lse, inputs, eps=1 / 64, atol=1e-3)


@needs_float64
def test_gradcheck_of_sink() -> None:
    # The sink becomes float32: multiples of the step are exact there.
    case = CASES["causal_with_rows_without_keys"]()
    sink = (torch.randn(4, dtype=torch.float64) * 64).round() / 64

    def both(sink: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = run(with_lse, case, sink=sink)
        return out, lse.double()

    assert torch.autograd.gradcheck(both, (sink.requires_grad_(),), eps=1 / 64, atol=1e-3)


@pytest.mark.parametrize("needed", GRADIENTS)
def test_one_gradient_alone(needed: str) -> None:
    case = CASES["bias"]().to(DTYPE)
    case.options["sink"] = torch.randn(4).to(DEVICE)
    full = losses_gradients(with_lse, case)
    tensors = {name: t.requires_grad_(name == needed) for name, t in leaves(case).items()}
    out, lse = run(with_lse, case, tensors)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    dlse = torch.randn(lse.shape, generator=generator).to(lse)
    torch.autograd.backward([out, lse], [dout, dlse])
    assert_close(needed, tensors[needed].grad, full[needed], TOLERANCE[DTYPE])
    assert all(t.grad is None for name, t in tensors.items() if name != needed)


def test_lse_alone_differentiates() -> None:
    q, k = (randn(1, 5, 2, 8, requires_grad=True) for _ in range(2))
    _, lse = heed.attention(q, k, k.detach(), return_lse=True)
    want = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()).mul(8**-0.5).logsumexp(-1)
    got = torch.autograd.grad(lse.sum(), (q, k))
    for a, b in zip(got, torch.autograd.grad(want.sum(), (q, k)), strict=True):
        assert_close("gradient", a, b, TOLERANCE[DTYPE])


def test_grad_modes() -> None:
    q = randn(1, 5, 2, 8, requires_grad=True)
    with torch.no_grad():
        assert not heed.attention(q, q, q).requires_grad
    with torch.inference_mode():
        assert heed.attention(q, q, q).is_inference()
    assert not heed.attention(q.detach(), q.detach(), q.detach()).requires_grad
    out, lse = heed.attention(q, q, q, return_lse=True)
    assert out.requires_grad and lse.requires_grad


def test_second_derivatives_are_refused() -> None:
    q = randn(1, 5, 2, 8, requires_grad=True)
    (dq,) = torch.autograd.grad(heed.attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="does not differentiate the gradients"):
        dq.sum().backward()


def test_tangents_are_refused() -> None:
    q = randn(1, 5, 2, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(RuntimeError):
            heed.attention(dual, q, q)
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda q: heed.attention(q, q, q).sum())(q)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    q, k = randn(3, 2, 5, 4, 8, requires_grad=True), randn(2, 5, 4, 8)
    mapped = torch.vmap(lambda q: heed.attention(q, k, k, causal=True))(q)
    looped = torch.stack([heed.attention(entry, k, k, causal=True) for entry in q])
    assert torch.equal(mapped, looped)
    got, want = (torch.autograd.grad(out.square().sum(), q)[0] for out in (mapped, looped))
    assert_close("gradient", got, want, SAME_SUM)


def test_changed_inputs_are_noticed() -> None:
    q = randn(1, 5, 2, 8, requires_grad=True)
    k = q.detach().clone()
    out = heed.attention(q, k, k)
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_checkpointing_repeats_the_dropout() -> None:
    q, k, v = (randn(1, 9, 2, 8, requires_grad=True) for _ in range(3))
    for reentrant in (False, True):
        gradients = []
        for wrap in (False, True):
            torch.manual_seed(3)

            def f(q, k, v):
                return heed.attention(q, k, v, dropout_p=0.4)

            if wrap:
                out = torch.utils.checkpoint.checkpoint(f, q, k, v, use_reentrant=reentrant)
            else:
                out = f(q, k, v)
            q.grad = k.grad = v.grad = None
            out.square().sum().backward()
            gradients.append((q.grad, k.grad, v.grad))
        for a, b in zip(*gradients, strict=True):
            assert_close("gradient", a, b, SAME_SUM)


# ---- dtypes ----


def test_autocast() -> None:
    q, k, v = (randn(1, 9, 2, 8, dtype=torch.float32, requires_grad=True) for _ in range(3))
    with torch.autocast(DEVICE, torch.bfloat16):
        mixed = heed.attention(q, k.bfloat16(), v)
        out = heed.attention(q, k, v)
        if torch.float64 in DTYPES:
            wide = heed.attention(q.double(), k.double(), v.double())
            assert wide.dtype == torch.float64
    assert out.dtype == mixed.dtype == torch.bfloat16
    assert torch.equal(out, heed.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


# ---- the operators as PyTorch sees them ----


def op_arguments(case: Case, requires_grad: bool) -> list:
    names = ("q", "k", "v", *ops.FIELDS)
    options = {
        "q": case.q,
        "k": case.k,
        "v": case.v,
        "left": -1,
        "right": -1,
        "chunk": 0,
        "scale": case.q.shape[-1] ** -0.5,
        "softcap": 0.0,
        "dropout_p": 0.0,
        "max_seqlen_q": -1,
        "max_seqlen_k": -1,
        "deterministic": not ON_CPU,
    } | case.options
    if options.pop("causal", False):
        options["right"] = 0
    values = [options.get(name) for name in names]
    return [
        t.detach().clone().requires_grad_(requires_grad and t.is_floating_point())
        if isinstance(t, Tensor)
        else t
        for t in values
    ]


OPCHECKED = ["causal", "sink", "bias", "bias_in_bf16", "mask", "packed_causal", "static_cache",
             "intervals", "key_bits", "dropout", "wider_v"]  # fmt: skip


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_forward(name: str) -> None:
    case = CASES[name]().to(DTYPE)
    case = Case(*(t.nan_to_num() for t in (case.q, case.k, case.v)), case.options)
    opcheck(ops.traced, op_arguments(case, requires_grad=True))
    q, k, v, *fields = op_arguments(case, requires_grad=False)
    with torch.no_grad():
        opcheck(ops.traced, [q, k, v, *fields])
        for want_lse in (False, True):
            opcheck(ops.forward, [q, k, v, want_lse, *fields])
        if name in ("causal", "intervals"):
            opcheck(ops.forward_band, [q, k, v, True, *fields[:4]])


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_backward(name: str) -> None:
    case = CASES[name]().to(DTYPE)
    case = Case(*(t.nan_to_num() for t in (case.q, case.k, case.v)), case.options)
    q, k, v, *fields = op_arguments(case, requires_grad=False)
    out, lse = ops.forward(q, k, v, True, *fields)
    arguments = [torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, *fields]
    opcheck(ops.backward, arguments)
    opcheck(ops.backward, [arguments[0], None, *arguments[2:], False, False])


def test_fake_and_meta_tensors() -> None:
    case = CASES["packed_with_bias"]().to(DTYPE)
    out, lse = run(with_lse, case)
    with FakeTensorMode() as mode:
        fake = Case(
            *(mode.from_tensor(t) for t in (case.q, case.k, case.v)),
            {
                n: mode.from_tensor(t) if isinstance(t, Tensor) else t
                for n, t in case.options.items()
            },
        )
        fake_out, fake_lse = run(with_lse, fake)
    assert fake_out.shape == out.shape and fake_lse.shape == lse.shape
    q = torch.empty(2, 5, 4, 8, device="meta", requires_grad=True)
    out, lse = heed.attention(q, q, q[..., :3], causal=True, return_lse=True)
    assert out.shape == (2, 5, 4, 3) and lse.shape == (2, 4, 5) and out.is_meta
    out.sum().backward()
    assert q.grad.shape == q.shape


# ---- torch.compile ----


def self_attention(x: Tensor, weight: Tensor, **options) -> Tensor:
    q, k, v = (x @ weight).unflatten(-1, (3, 4, 8)).unbind(2)
    out, lse = heed.attention(q, k, v, causal=True, **options, return_lse=True)
    return out.float().square().sum() + lse.sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_with_dynamic_lengths(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(self_attention, fullgraph=True, dynamic=True, backend=counter)
    weight = randn(32, 96, requires_grad=True)
    counts = set()
    for length in (7, 12, 33, 20):
        x = randn(2, length, 32, requires_grad=True)
        got = torch.autograd.grad(compiled(x, weight), (x, weight))
        want = torch.autograd.grad(self_attention(x, weight), (x, weight))
        for a, b in zip(got, want, strict=True):
            assert_close("gradient", a, b, TOLERANCE[DTYPE])
        counts.add(counter.frame_count)
    assert len(counts) == 1, "another length compiled again"
    with torch.no_grad():
        assert_close("loss", compiled(x, weight), self_attention(x, weight), TOLERANCE[DTYPE])


@pytest.mark.parametrize(
    "name",
    ["window", "sink_in_bf16", "bias", "mask", "packed_with_bounds", "left_padding", "paged",
     "intervals", "key_bits", "dropout", "everything"],
)  # fmt: skip
def test_compile_has_no_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]().to(DTYPE)
    compiled = torch.compile(with_lse, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled, case), run(with_lse, case), strict=True):
        assert torch.equal(got, want)
    if name != "paged":
        got = losses_gradients(compiled, case)
        for of, want in losses_gradients(with_lse, case).items():
            assert_close(of, got[of].nan_to_num(), want.nan_to_num(), SAME_SUM)


def test_compile_draws_dropout_and_autocasts() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(q: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return heed.attention(q, q, q, dropout_p=0.5)

    q = randn(1, 9, 2, 8)
    first, second = f(q), f(q)
    assert first.dtype == torch.bfloat16 and not torch.equal(first, second)


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return heed.attention(q, k, k, causal=True)

    q, k = randn(1, 5, 2, 8), randn(1, 9, 2, 8)
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(Module(), (q, k), dynamic_shapes=({}, {1: length}))
    other = randn(1, 17, 2, 8)
    assert torch.equal(program.module()(q, other), heed.attention(q, other, other, causal=True))


def test_agrees_with_sdpa() -> None:
    q, k, v = (randn(2, 65, 4, 64) for _ in range(3))
    want = F.scaled_dot_product_attention(
        *(t.float().transpose(1, 2) for t in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    assert_close("out", heed.attention(q, k, v, causal=True), want, 0.2 * TOLERANCE[DTYPE])


# ---- the package ----


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_import_is_light() -> None:
    done = python("-c", "import heed, sys; assert 'transformers' not in sys.modules")
    assert done.returncode == 0, done.stderr


@cpu_only("instruction sets are a CPU's")
def test_doctor_fits_one_screen() -> None:
    done = python("-m", "heed", HEED_FORCE_ISA="scalar")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert "scalar/forward/f32" in done.stdout and "reference/backward/f64" in done.stdout
    assert "needs avx512, this device is scalar" in done.stdout or os.uname().machine != "x86_64"
    assert python("-m", "heed", HEED_FORCE_ISA="mmx").returncode == 1


def test_version() -> None:
    assert heed.__version__.count(".") == 2
