"""heed.sdpa: PyTorch's own functions on heed's kernels, against math in float64."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import _registry, varlen
from torch.nn.attention import current_flash_attention_impl as current_impl

import heed
from cases import ends, int32
from device import DEVICE, DTYPE, ON_CPU, cpu_only, randn
from heed import sdpa
from sdpa_cases import SHAPES, TOLERANCE, assert_close, count_calls, exact, inputs, results

aten = torch.ops.aten
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if ON_CPU else (torch.bfloat16, DTYPE)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert current_impl() is None
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.fixture
def ran(monkeypatch) -> Counter:
    return count_calls(monkeypatch)


# ---- scaled_dot_product_attention ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name: str, dtype: torch.dtype, ran: Counter) -> None:
    tensors, options = inputs(name, dtype)
    with sdpa.activated(unsupported="error"):
        got = results(tensors, options)
    assert ran == {"forward": 1, "backward": 1}
    assert all(t.dtype == dtype for t in got)
    assert_close(got, exact(tensors, options), dtype)


def test_scale_and_head_dims(ran: Counter) -> None:
    for head_dim in (8, 20, 64, 72):
        tensors, options = inputs("causal", DTYPE, head_dim)
        with sdpa.activated(unsupported="error"):
            assert_close(results(tensors, options), exact(tensors, options))
            options["scale"] = 0.3
            assert_close(results(tensors, options), exact(tensors, options))
    assert ran["forward"] == 8


def test_any_strides(ran: Counter) -> None:
    """The gradient of a sum is expanded; slices and transposed views are read in place."""
    fused = randn(2, 40, 3, 4, 16)
    views = [t.transpose(1, 2) for t in fused.unbind(2)]
    views = [t.detach().requires_grad_() for t in views]
    copies = [t.detach().clone(memory_format=torch.contiguous_format) for t in views]
    copies = [t.requires_grad_() for t in copies]
    with sdpa.activated(unsupported="error"):
        for tensors in (views, copies):
            F.scaled_dot_product_attention(*tensors, is_causal=True).sum().backward()
    for a, b in zip(views, copies, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=TOLERANCE[DTYPE])
    assert ran == {"forward": 2, "backward": 2}


@cpu_only("PyTorch's kernels for GPUs take other inputs")
def test_backward_after_restoring_and_before_activating(ran: Counter) -> None:
    """Both kernels' saved tensors mean the same, also of rows that see no key."""
    for name in ("causal", "rows without keys"):
        tensors, options = inputs(name, torch.float32)
        want = exact(tensors, options)
        with sdpa.activated(unsupported="error"):
            out = F.scaled_dot_product_attention(*tensors, **options)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        assert_close([out, *torch.autograd.grad(out, tensors, weight)], want)
        out = F.scaled_dot_product_attention(*tensors, **options)
        with sdpa.activated(unsupported="error"):
            assert_close([out, *torch.autograd.grad(out, tensors, weight)], want)
    assert ran == {"forward": 2, "backward": 2}


@cpu_only("float64 has no fused kernel on a GPU")
def test_unsupported_input(ran: Counter) -> None:
    tensors, options = inputs("causal", torch.float64)
    want = results(tensors, options)
    with sdpa.activated():
        got = results(tensors, options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not ran
    sentence = (
        r"^heed\.sdpa, aten::_scaled_dot_product_flash_attention_for_cpu: query\.dtype = float64 "
        r"must be float32, .*; activate\(unsupported=\"torch\"\) leaves such calls to PyTorch$"
    )
    with sdpa.activated(unsupported="error"), pytest.raises(NotImplementedError, match=sentence):
        results(tensors, options)
    wide = [randn(1, 1, 3, 513, dtype=torch.float32) for _ in range(3)]
    with sdpa.activated():
        assert F.scaled_dot_product_attention(*wide).shape == (1, 1, 3, 513)
    with (
        sdpa.activated(unsupported="error"),
        pytest.raises(ValueError, match=r"q\.head_dim = 513 must be in \[1, 512\]; activate"),
    ):
        F.scaled_dot_product_attention(*wide)


@cpu_only("a GPU's dropout does not end in math")
def test_dropout_on_a_cpu_is_pytorchs(ran: Counter) -> None:
    """PyTorch sends it to math before heed could see it."""
    tensors = inputs("causal", torch.float32)[0]
    with sdpa.activated(unsupported="error"):
        torch.manual_seed(3)
        got = F.scaled_dot_product_attention(*tensors, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(got, F.scaled_dot_product_attention(*tensors, dropout_p=0.5))
    assert not ran
    with (
        sdpa.activated(unsupported="error"),
        pytest.raises(NotImplementedError, match=r"dropout_p = 0\.5 must be 0"),
    ):
        aten._scaled_dot_product_flash_attention_for_cpu(*tensors, 0.5)


# ---- the operators of GPUs, which heed.sdpa gives to CPUs too ----


def flash(tensors: list[Tensor], dropout_p: float = 0.0, is_causal: bool = False) -> tuple:
    return aten._scaled_dot_product_flash_attention(*tensors, dropout_p, is_causal)


def efficient(
    tensors: list[Tensor], bias: Tensor | None, dropout_p: float = 0.0, is_causal: bool = False
) -> tuple:
    return aten._scaled_dot_product_efficient_attention(*tensors, bias, True, dropout_p, is_causal)


def heads_last(tensors: list[Tensor]) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


@pytest.mark.parametrize("rows, keys", [(40, 40), (30, 40), (40, 30)])
def test_flash_is_aligned_at_the_last_key(rows: int, keys: int) -> None:
    tensors = [randn(2, h, n, 16, requires_grad=True) for h, n in ((4, rows), (2, keys), (2, keys))]
    with sdpa.activated(unsupported="error"):
        out, lse, cum_q, cum_k, max_q, max_k, *_ = flash(tensors, is_causal=True)
        got = torch.autograd.grad(out.sum(), tensors)
    want, want_lse = heed.attention(*heads_last(tensors), causal=True, return_lse=True)
    assert torch.equal(out, want.transpose(1, 2)) and torch.equal(lse, want_lse)
    assert (cum_q, cum_k, max_q, max_k) == (None, None, rows, keys)
    assert_close(got, torch.autograd.grad(want.sum(), tensors))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rows, keys", [(40, 40), (30, 48), (40, 30)])
def test_efficient_with_the_gradient_of_a_mask(rows: int, keys: int, is_causal: bool) -> None:
    tensors = [randn(2, 4, n, 16, requires_grad=True) for n in (rows, keys, keys)]
    mask = randn(2, 1, rows, keys, requires_grad=True)
    inputs = [*tensors, mask]
    with sdpa.activated(unsupported="error"):
        out, lse, _, _ = efficient(tensors, mask.expand(2, 4, rows, keys), is_causal=is_causal)
        got = [out, *torch.autograd.grad(out.square().sum(), inputs)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    q, k, v, bias = exact_inputs
    hidden = torch.ones(rows, keys, device=DEVICE).triu(1).bool() & is_causal
    scores = (q @ k.mT / 4 + bias).masked_fill(hidden, -math.inf)
    want = scores.softmax(-1) @ v
    assert_close(got, [want, *torch.autograd.grad(want.square().sum(), exact_inputs)])
    assert lse.shape == (2, 4, math.ceil(rows / 32) * 32)
    assert_close([lse[..., :rows]], [scores.logsumexp(-1)])
    assert torch.isposinf(lse[..., rows:]).all()


def test_efficient_without_lse() -> None:
    """As scaled_dot_product_attention calls it where nothing has a gradient."""
    q = randn(2, 4, 40, 16)
    with sdpa.activated(unsupported="error"):
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, q, q, None, False)
        assert_close([out], [efficient([q, q, q], None)[0]])
    assert lse.shape == (2, 4, 0)


LAYOUTS = {
    "heads first": lambda *shape: randn(*shape),
    "tokens first": lambda b, h, s, d: randn(b, s, h, d).transpose(1, 2),
    "slice": lambda b, h, s, d: randn(b, s, 3, h, d)[:, :, 1].transpose(1, 2),
    "one head": lambda b, h, s, d: randn(b, 1, s, d),
    "one row": lambda b, h, s, d: randn(b, h, 1, d),
    "head_dim before tokens": lambda b, h, s, d: randn(b, h, d, s).mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", ["flash", "dense flash", "packed flash", "efficient", "cpu"])
def test_results_are_laid_out_as_pytorch_says(operator: str, layout: str) -> None:
    """What torch.compile believes: shapes, dtypes and strides of PyTorch's fake kernels."""
    if operator == "cpu" and not ON_CPU:
        pytest.skip("an operator of CPUs")
    with sdpa.activated(unsupported="error"):
        q, k, v = (LAYOUTS[layout](2, 4, 40, 16) for _ in range(3))

        def calls(q, k, v) -> list[Tensor]:
            if operator == "cpu":
                out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
                saved = (out, lse, 0.0, False)
                backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
                return [out, lse, *backward(out, q, k, v, *saved)]
            if operator == "efficient":
                mask = q.new_zeros(*q.shape[:3], q.shape[2])
                out, lse, *rest = efficient([q, k, v], mask)
                saved = (mask, out, lse, *rest, 0.0, [True] * 4)
                backward = aten._scaled_dot_product_efficient_attention_backward
                return [out, lse, *rest, *backward(out, q, k, v, *saved)]
            if operator == "flash":
                out, lse, *lengths, state, unused, mask = flash([q, k, v], 0.5)
                saved = (out, lse, *lengths, 0.5, False, state, unused)
                backward = aten._scaled_dot_product_flash_attention_backward
                gradients = backward(out, q, k, v, *saved)
                return [out, lse, state.clone(), unused, mask, *gradients]
            lengths = (None, None, q.shape[2], q.shape[2])
            q, k, v = heads_last([q, k, v])
            if operator == "packed flash":
                q, k, v = (t[0] for t in (q, k, v))
                cu = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
                lengths = (cu, cu, *lengths[2:])
            result = aten._flash_attention_forward(q, k, v, *lengths, 0.0, True, False)
            out, lse, state, unused, mask = result
            saved = (out, lse, *lengths, 0.0, True, state, unused)
            return [out, lse, *result[2:], *aten._flash_attention_backward(out, q, k, v, *saved)]

        got = calls(q, k, v)
        with FakeTensorMode() as mode:
            want = calls(*(mode.from_tensor(t) for t in (q, k, v)))
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), index
        steps = [(x, y) for n, x, y in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1]
        assert all(x == y for x, y in steps), (index, a.stride(), b.stride())


# ---- dropout ----


@pytest.mark.parametrize("operator", ["flash", "efficient"])
def test_dropout(operator: str) -> None:
    """The seed that comes back drops the same entries of heed.attention, in both directions."""
    tensors = [randn(2, 4, 64, 16, requires_grad=True) for _ in range(3)]

    def call(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        if operator == "flash":
            out, *_, state, _, _ = flash(tensors, 0.3, True)
            return out, state[:1]
        out, _, seed, _ = efficient(tensors, None, 0.3, True)
        return out, seed.reshape(1)

    with sdpa.activated(unsupported="error"):
        out, seed = call(tensors)
        got = [out, *torch.autograd.grad(out.square().sum(), tensors)]
        seed = seed.view(torch.int64).clone()
        other = call(tensors)[0].detach()
        torch.manual_seed(5)
        first = call(tensors)[0].detach()
        torch.manual_seed(5)
        assert torch.equal(first, call(tensors)[0]) and not torch.equal(first, other)
        del out
    options = {"causal": True, "dropout_p": 0.3, "seed": seed}
    want = heed.attention(*heads_last(tensors), **options).transpose(1, 2)
    assert torch.equal(got[0], want)
    assert_close(got[1:], torch.autograd.grad(want.square().sum(), tensors))


def test_dropout_drops_its_share() -> None:
    q = torch.zeros(4, 4, 128, 128, device=DEVICE, dtype=DTYPE)
    v = torch.eye(128, device=DEVICE, dtype=DTYPE).expand(4, 4, 128, 128)
    with sdpa.activated(unsupported="error"):
        out = flash([q, q, v], 0.25)[0].float() * 128  # 0 or 1 / 0.75
    share = (out == 0).float().mean().item()
    assert share == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / out.numel()))
    assert out.max().item() == pytest.approx(1 / 0.75, rel=1e-2)


@pytest.mark.parametrize("operator", ["flash", "efficient"])
def test_seeds_that_were_copied(operator: str) -> None:
    """save_on_cpu() brings another tensor back; so would a gather."""
    tensors = [randn(1, 2, 40, 16, requires_grad=True) for _ in range(3)]
    gradients = []
    with sdpa.activated(unsupported="error"):
        for copied in (False, True):
            torch.manual_seed(7)
            pack = (lambda t: t.clone()) if copied else (lambda t: t)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                call = (tensors, 0.5) if operator == "flash" else (tensors, None, 0.5)
                out = globals()[operator](*call)[0]
            gradients.append(torch.autograd.grad(out.sum(), tensors))
            del out
    assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("operator", ["flash", "efficient"])
def test_seeds_that_pytorch_drew(operator: str) -> None:
    """Another kernel dropped other entries in the forward pass."""
    q = randn(1, 2, 40, 16)
    lse = torch.zeros(1, 2, 64, device=DEVICE)
    refused = pytest.raises(NotImplementedError, match=r"dropout_p = 0\.5: forward ran in PyTorch")
    with sdpa.activated(unsupported="error"), refused:
        if operator == "flash":
            state = torch.tensor([11, 8], dtype=torch.uint64, device=DEVICE)
            lengths = (None, None, 40, 40)
            aten._scaled_dot_product_flash_attention_backward(
                q, q, q, q, q, lse[..., :40], *lengths, 0.5, False, state, state[0]
            )
        else:
            seed, offset = torch.tensor([11, 8], device=DEVICE).unbind()
            aten._scaled_dot_product_efficient_attention_backward(
                q, q, q, q, None, q, lse, seed, offset, 0.5, [True] * 4
            )


def test_restoring_between_forward_and_backward_with_dropout() -> None:
    tensors = [randn(1, 2, 40, 16, requires_grad=True) for _ in range(3)]
    waits = (
        r"^calls of heed\.sdpa with dropout that may still be differentiated = 1 must be 0: run "
    )
    sdpa.activate()
    out = flash(tensors, 0.5)[0]
    with pytest.raises(RuntimeError, match=waits):
        sdpa.restore()
    assert current_impl() == "heed"
    out.sum().backward()
    sdpa.restore()
    with pytest.raises(RuntimeError, match=waits), sdpa.activated():
        out = flash(tensors, 0.5)[0]
    assert current_impl() is None
    del out
    sdpa.activate()
    out = flash(tensors, 0.5)[0]
    with pytest.warns(RuntimeWarning, match=waits):
        registry_restore()
    del out
    with sdpa.activated():  # no gradient, nothing waits
        flash(tensors, 0.5)


def test_seeds_are_forgotten() -> None:
    q = randn(1, 1, 4, 8)
    with sdpa.activated():
        for _ in range(300):
            flash([q, q, q], 0.5)
    assert len(sdpa._seeds.storages) <= 64


# ---- varlen_attn ----

CAUSAL = {"is_causal": True}
if "window_size" in inspect.signature(varlen.varlen_attn).parameters:
    CAUSAL = {"window_size": (-1, 0)}
newer = pytest.mark.skipif(
    not hasattr(varlen, "varlen_attn_out"), reason="this PyTorch has no such argument"
)


@pytest.mark.parametrize("is_causal", [False, True])
def test_varlen(is_causal: bool, ran: Counter) -> None:
    lengths = [13, 0, 40, 1]
    tensors = [randn(54, 4, 16, requires_grad=True) for _ in range(3)]
    cu = ends(lengths).to(DEVICE)
    with sdpa.activated(unsupported="error"):
        out, lse = varlen.varlen_attn(
            *tensors,
            *(cu, cu, 40, 40),
            return_aux=varlen.AuxRequest(lse=True),
            **(CAUSAL if is_causal else {}),
        )
        got = [out, *torch.autograd.grad(out.square().sum(), tensors)]
    parts = [t.split(lengths) for t in tensors]
    want = [
        heed.attention(*(t[None] for t in part), causal=is_causal, return_lse=True)
        for part in zip(*parts, strict=True)
    ]
    out = torch.cat([part[0] for part, _ in want])
    assert_close(got, [out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert_close([lse], [torch.cat([part[0] for _, part in want], dim=1)])
    assert ran == {"forward": 1, "backward": 1}


@newer
def test_varlen_newer_arguments() -> None:
    q, k, v = (randn(30, heads, 16) for heads in (4, 2, 2))
    cu = ends([10, 20]).to(DEVICE)
    lengths = (cu, cu, 20, 20)
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    with sdpa.activated(unsupported="error"):
        out = torch.empty_like(q)
        options = {"scale": 0.5, "window_size": (4, 2), "enable_gqa": True}
        got = varlen.varlen_attn_out(out, q, k, v, *lengths, **options)
        want = heed.attention(q, k, v, scale=0.5, left=4, right=2, **packed)
        assert_close([got], [want])
        assert got is out

        used = int32([3, 15]).to(DEVICE)
        got = varlen.varlen_attn(q, k, v, *lengths, enable_gqa=True, seqused_k=used)
        assert_close([got], [heed.attention(q, k, v, seqused_k=used, **packed)])

        pages = [randn(6, 16, 2, 16) for _ in range(2)]
        table = int32([[4, 2], [0, 5]]).to(DEVICE)
        options = {
            "enable_gqa": True,
            "seqused_k": used,
            "block_table": table,
            "window_size": (-1, 0),
        }
        got = varlen.varlen_attn(q, *pages, cu, None, 20, 32, **options)
        assert torch.equal(got, varlen.varlen_attn(q, *pages, cu, cu, 20, 32, **options))
        want = heed.attention(
            q, *pages, causal=True, cu_seqlens_q=cu, page_table=table, seqused_k=used
        )
        assert_close([got], [want])

        with pytest.raises(NotImplementedError, match=r"num_splits = 1 must be None"):
            varlen.varlen_attn(q, k, v, *lengths, enable_gqa=True, num_splits=1)


def test_dense_and_windows_of_flash() -> None:
    """The operator below varlen_attn takes dense tensors too; None and -1 are no limit."""
    q, k, v = (randn(2, n, heads, 16) for n, heads in ((30, 4), (40, 2), (40, 2)))
    lengths = (None, None, 30, 40)
    windows = {
        (None, None, False): {},
        (-1, -1, True): {"causal": True},
        (5, None, False): {"left": 5},
        (5, 9, True): {"left": 5, "causal": True},
        (0, 2, False): {"left": 0, "right": 2},
    }
    with sdpa.activated(unsupported="error"):
        for (left, right, is_causal), options in windows.items():
            got = aten._flash_attention_forward(
                *(q, k, v, *lengths, 0.0, is_causal, False),
                window_size_left=left,
                window_size_right=right,
            )
            want = heed.attention(q, k, v, **options, return_lse=True)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=False)), options


def test_refused_arguments_of_flash() -> None:
    q = randn(1, 20, 2, 16)
    lengths = (None, None, 20, 20)
    with sdpa.activated(unsupported="error"):
        with pytest.raises(NotImplementedError, match=r"alibi_slopes must be None"):
            aten._flash_attention_forward(
                q, q, q, *lengths, 0.0, False, False, alibi_slopes=torch.ones(2, device=DEVICE)
            )
        with pytest.raises(NotImplementedError, match=r"return_debug_mask = True must be False"):
            aten._flash_attention_forward(q, q, q, *lengths, 0.0, False, True)
        with pytest.raises(NotImplementedError, match=r"rank = 3 must be 4, \[batch, heads, "):
            flash([q[0]] * 3)
        with pytest.raises(ValueError, match=r"q\.heads = 2 must be a multiple of k\.heads = 3"):
            k = randn(1, 20, 3, 16)
            aten._flash_attention_forward(q, k, k, *lengths, 0.0, False, False)


# ---- torch.compile ----


def test_compiled(ran: Counter) -> None:
    """Compiled before activation, run with and without heed."""
    torch._dynamo.reset()

    def step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        first = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, first, v, attn_mask=mask)

    tensors = [randn(2, 4, 40, 16, requires_grad=True) for _ in range(3)]
    mask = torch.rand(40, 40, device=DEVICE) > 0.3
    compiled = torch.compile(step, fullgraph=True, dynamic=False)

    def run(function) -> list[Tensor]:
        out = function(*tensors, mask)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]

    torch.backends.cuda.enable_cudnn_sdp(False)  # what it is compiled for
    run(compiled)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert not ran
    with sdpa.activated(unsupported="error"):
        got = run(compiled)
        assert ran == {"forward": 2, "backward": 2}
        assert_close(got, run(step))


def test_compiled_dropout(ran: Counter) -> None:
    torch._dynamo.reset()
    tensors = [randn(2, 4, 40, 16, requires_grad=True) for _ in range(3)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flash_out = aten._scaled_dot_product_flash_attention(q, k, v, 0.5, True)[0]
        return flash_out + efficient([q, k, v], None, 0.5)[0]

    with sdpa.activated(unsupported="error"):
        compiled = torch.compile(attend, fullgraph=True, dynamic=False)
        gradients = []
        for function in (compiled, attend):
            torch.manual_seed(9)
            out = function(*tensors)
            gradients.append([out.detach(), *torch.autograd.grad(out.sum(), tensors)])
            del out
    assert_close(*gradients)
    assert ran == {"forward": 4, "backward": 4}


# ---- activating and restoring ----


def registry_restore() -> None:
    """As another implementation's activation does it."""
    if hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        torch.nn.attention.restore_flash_attention_impl()
    else:
        sdpa._registry_restore()


def kernels() -> list[str]:
    names = [f"aten::{name}" for name in sdpa._KERNELS if hasattr(aten, name)]
    return [torch._C._dispatch_dump(name) for name in names]


def test_restore_really_restores(ran: Counter) -> None:
    tensors, options = inputs("causal", DTYPE)
    before, dump = results(tensors, options), kernels()
    for _ in range(2):
        sdpa.activate()
        assert (
            current_impl() == "heed" and "heed" in torch.nn.attention.list_flash_attention_impls()
        )
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert kernels() != dump
        results(tensors, options)
        sdpa.restore()
        assert kernels() == dump and torch.backends.cuda.cudnn_sdp_enabled()
    assert ran == {"forward": 2, "backward": 2}
    assert_close(results(tensors, options), before)
    assert ran == {"forward": 2, "backward": 2}


def test_context_manager() -> None:
    dump = kernels()
    with pytest.raises(ZeroDivisionError), sdpa.activated():
        raise ZeroDivisionError
    assert kernels() == dump
    with sdpa.activated():
        sdpa.restore()
    assert kernels() == dump
    torch.backends.cuda.enable_cudnn_sdp(False)
    with sdpa.activated():
        pass
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_through_pytorchs_registry(ran: Counter) -> None:
    tensors, options = inputs("causal", DTYPE)
    dump = kernels()
    torch.nn.attention.activate_flash_attention_impl("heed")
    torch.nn.attention.activate_flash_attention_impl("heed")
    results(tensors, options)
    sdpa.restore()
    assert ran["forward"] == 1 and kernels() == dump


def test_nothing_is_said_about_overriding() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sdpa.activated():
            pass


def test_bad_calls() -> None:
    with pytest.raises(ValueError, match=r"^unsupported = 'heed' must be 'torch' or 'error'$"):
        sdpa.activate(unsupported="heed")
    with pytest.raises(RuntimeError, match=r"^heed\.sdpa is not active: there is nothing to"):
        sdpa.restore()
    with sdpa.activated():
        dump = kernels()
        with pytest.raises(RuntimeError, match=r"^heed\.sdpa is active already: call restore\(\)"):
            sdpa.activate()
        with pytest.raises(RuntimeError, match=r"^heed\.sdpa is active already"), sdpa.activated():
            pass
        assert kernels() == dump


def test_another_implementation_is_active() -> None:
    class Handle:
        def remove(self) -> None:
            pass

    torch.nn.attention.register_flash_attention_impl("other", register_fn=Handle)
    torch.nn.attention.activate_flash_attention_impl("other")
    dump = kernels()
    try:
        with pytest.raises(RuntimeError, match=r"^PyTorch's flash attention is 'other': restore"):
            sdpa.activate()
        assert kernels() == dump and current_impl() == "other"
    finally:
        _registry._FLASH_ATTENTION_ACTIVE = None
        del _registry._FLASH_ATTENTION_IMPLS["other"]


def one_more(q: Tensor, k: Tensor) -> None: ...


def newer_argument(query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0) -> None: ...


NAME = "_scaled_dot_product_flash_attention"
CHANGES = {
    "argument": (NAME, {"compute": newer_argument}, "heed does not know its is_causal, return"),
    "gone": ("_no_such_operator", {"compute": one_more}, "it is gone"),
    "results": (NAME, {"returns": 8}, "it returns 9 values instead of 8"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_unknown_pytorch(change: str, monkeypatch) -> None:
    name, fields, difference = CHANGES[change]
    dump = kernels()
    kernel = sdpa._KERNELS[NAME]._replace(**fields)
    monkeypatch.setitem(sdpa._KERNELS, name, kernel)
    sentence = rf"^torch = \S+ is not supported by heed\.sdpa, only .*: aten::{name} has changed: "
    for activate in (
        sdpa.activate,
        lambda: torch.nn.attention.activate_flash_attention_impl("heed"),
    ):
        with pytest.raises(RuntimeError, match=sentence + difference):
            activate()
        assert current_impl() is None
    monkeypatch.undo()
    assert kernels() == dump


def test_every_difference_of_a_signature_is_found() -> None:
    schema = torch._C.parse_schema("f(Tensor q, Tensor? m, float p=0., *, int? w=None) -> Tensor")

    def same(q: Tensor, m: Tensor, p: float = 0.0, *, w: int | None = None, x: int | None = None):
        raise NotImplementedError

    def order(m: Tensor, q: Tensor, p: float = 0.0, *, w: int | None = None): ...
    def default(q: Tensor, m: Tensor, p: float = 0.1, *, w: int | None = None): ...
    def kind(q: Tensor, m: Tensor, p: int = 0, *, w: int | None = None): ...
    def more(q: Tensor, m: Tensor, p: float = 0.0, n: int = 0, *, w: int | None = None): ...

    def difference(compute) -> str:
        return sdpa._difference(sdpa._Kernel(compute, 1, ("CPU",), (2, 10)), schema)

    assert difference(same) == ""
    assert difference(order) == "its arguments have another order"
    assert difference(default) == "heed does not know its p"
    assert difference(kind) == "heed does not know its p"
    assert difference(more) == "it lacks n"


def test_a_failure_while_activating_leaves_nothing(monkeypatch) -> None:
    dump = kernels()
    made = []

    def fail(name: str, *rest):
        if len(made) == 3:
            raise MemoryError
        made.append(name)
        return lambda *args, **options: None

    monkeypatch.setattr(sdpa, "_kernel", fail)
    with pytest.raises(MemoryError) as caught:
        sdpa.activate()
    assert kernels() == dump and current_impl() is None
    del caught  # its frames hold the library
    monkeypatch.undo()
    with sdpa.activated():
        pass
