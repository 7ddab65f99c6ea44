"""Loads the operators torch.ops.heed; gives them fake kernels, gradients, Python's exceptions."""

from __future__ import annotations

import sys
from itertools import compress
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

_OLDEST_TORCH = (2, 10)
_LIBRARY = "_heed.so"


def _load_library() -> Path:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_TORCH:
        raise ImportError(f"heed needs PyTorch 2.10 or newer, this is {torch.__version__}")
    # An editable installation has two folders: the sources, and what was built from them.
    folders = [Path(folder) for folder in sys.modules[__package__].__path__]
    for folder in folders:
        if (folder / _LIBRARY).exists():
            torch.ops.load_library(str(folder / _LIBRARY))
            return folder / _LIBRARY
    raise ImportError(
        f"heed is not built: no {_LIBRARY} in {', '.join(map(str, folders))}; "
        "`pip install .` in heed's repository builds it"
    )


library = _load_library()
# The kernels: q, k, v, whether lse is wanted, fields. They have no gradients.
forward_band = torch.ops.heed.forward_band.default  # the first fields only
forward = torch.ops.heed.forward.default
# q, k, v, fields, with gradients, for tracing: eager calls through register_autograd() take 16 us.
traced = torch.ops.heed.attention.default
backward = torch.ops.heed.backward.default
band_mask = torch.ops.heed.band_mask.default

FIELDS = tuple(argument.name for argument in traced._schema.arguments[3:])
_NUM_BAND_FIELDS = len(forward_band._schema.arguments) - 4
_ARE_TENSORS = ["Tensor" in str(argument.type) for argument in traced._schema.arguments[3:]]
_ARE_NUMBERS = [not is_tensor for is_tensor in _ARE_TENSORS]
_BIAS, _SINK = FIELDS.index("bias"), FIELDS.index("sink")

# Bound once: looking them up at every call is 2 % of it.
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_below_autograd = torch._C._AutoDispatchBelowAutograd
# Calls an operator without looking for __torch_function__, which is a tenth of heed.attention.
_call = torch._C._dispatch_call_boxed
_FORWARD_BAND = torch._C._dispatch_find_schema_or_throw("heed::forward_band", "")


def attend(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, fields: tuple):
    """out, or out and lse, with gradients where they are needed.

    `fields` are all FIELDS or those of forward_band.
    """
    if _is_compiling():
        return _differentiable(q, k, v, want_lse, fields)
    try:
        if _is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad or _has_gradients(fields)
        ):
            apply = _apply_with_lse if want_lse else _apply
            if _transforms_active():  # refuses them
                apply = _Attention.apply
            if len(fields) == _NUM_BAND_FIELDS:
                return apply(q, k, v, fields)
            return apply(q, k, v, fields, *fields[_BIAS : _SINK + 1])
        if forward_ad._current_level >= 0:  # refuses tangents
            return _Attention.apply(q, k, v, fields)
        if _transforms_active():  # vmap keeps gradients on this route only
            return _differentiable(q, k, v, want_lse, fields)
        result = _forward(q, k, v, want_lse, fields)
        return result if want_lse else result[0]
    except RuntimeError as error:
        raise python_error(error) from None


def _forward(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, fields: tuple):
    if len(fields) > _NUM_BAND_FIELDS:
        return forward(q, k, v, want_lse, *fields)
    if has_torch_function_variadic(q, k, v):
        return forward_band(q, k, v, want_lse, *fields)
    scale, left, right, intervals = fields  # a starred call is 3 % slower
    return _call(_FORWARD_BAND, q, k, v, want_lse, scale, left, right, intervals)


def _differentiable(q: Tensor, k: Tensor, v: Tensor, want_lse: bool, fields: tuple):
    out, lse = traced(q, k, v, *fields)
    return (out, lse) if want_lse else out


def _has_gradients(fields: tuple) -> bool:
    return len(fields) > _NUM_BAND_FIELDS and any(
        t is not None and t.requires_grad for t in (fields[_BIAS], fields[_SINK])
    )


def make_band_mask(*inputs) -> Tensor:
    """The result of torch.ops.heed.band_mask, an `intervals` with key bits."""
    if _is_compiling():
        return band_mask(*inputs)
    try:
        with _below_autograd():
            return band_mask(*inputs)
    except RuntimeError as error:
        raise python_error(error) from None


def python_error(error: RuntimeError) -> Exception:
    """The exception that the operators mean: their ABI throws RuntimeError only."""
    for prefix, kind in (
        ("heed: invalid: ", ValueError),
        ("heed: unsupported: ", NotImplementedError),
    ):
        if str(error).startswith(prefix):
            return kind(str(error)[len(prefix) :])
    return error


# ---- gradients ----


def _save(ctx, q, k, v, out, lse, fields) -> None:
    """The tensors where autograd watches them, the numbers on ctx."""
    if len(fields) == _NUM_BAND_FIELDS:  # as below, in a quarter of the time
        scale, left, right, intervals = fields
        ctx.save_for_backward(q, k, v, out, lse, intervals)
        ctx.numbers = scale, left, right
    else:
        ctx.save_for_backward(q, k, v, out, lse, *compress(fields, _ARE_TENSORS))
        ctx.numbers = tuple(compress(fields, _ARE_NUMBERS))


def _gradients(ctx, dout: Tensor | None, dlse: Tensor | None, wanted: tuple[bool, bool]) -> tuple:
    """Those of q, k, v, bias and sink; `wanted` are the last two."""
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    kinds = _ARE_TENSORS[: len(ctx.numbers) + len(tensors)]
    numbers, tensors = iter(ctx.numbers), iter(tensors)
    fields = [next(tensors if is_tensor else numbers) for is_tensor in kinds]
    if dout is None:
        dout = torch.zeros_like(out)
    inputs = (dout, dlse, q, k, v, out, lse, *fields)
    if len(fields) == len(FIELDS):
        inputs += wanted
    if _is_compiling() or _is_grad_enabled():
        return backward(*inputs)
    with _below_autograd():
        return backward(*inputs)


class _Attention(torch.autograd.Function):
    """out of q, k, v, fields and, once more, what has gradients among the fields: bias and sink."""

    @staticmethod
    def forward(ctx, q, k, v, fields, *bias_and_sink):
        out, lse = _forward(q, k, v, True, fields)
        _save(ctx, q, k, v, out, lse, fields)
        return out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        try:
            needed = (*ctx.needs_input_grad[4:], False, False)[:2]
            dq, dk, dv, dbias, dsink = _gradients(ctx, dout, dlse, needed)
        except RuntimeError as error:
            raise python_error(error) from None
        return dq, dk, dv, None, dbias, dsink


class _AttentionWithLse(_Attention):
    @staticmethod
    def forward(ctx, q, k, v, fields, *bias_and_sink):
        out, lse = _forward(q, k, v, True, fields)
        _save(ctx, q, k, v, out, lse, fields)
        ctx.set_materialize_grads(False)
        return out, lse


# Without Function's own apply(), which prepares functorch's transforms in Python.
_apply = super(torch.autograd.Function, _Attention).apply
_apply_with_lse = super(torch.autograd.Function, _AttentionWithLse).apply


def _set_up(ctx, inputs, output) -> None:
    q, k, v, *fields = inputs
    _save(ctx, q, k, v, *output, tuple(fields))
    ctx.set_materialize_grads(False)


def _traced_gradients(ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    needed = (*ctx.needs_input_grad[3:], *[False] * len(FIELDS))
    dq, dk, dv, dbias, dsink = _gradients(ctx, dout, dlse, (needed[_BIAS], needed[_SINK]))
    of_fields: list[Tensor | None] = [None] * len(FIELDS)
    of_fields[_BIAS], of_fields[_SINK] = dbias, dsink
    return dq, dk, dv, *of_fields


def _refuse_second_derivative(ctx, *_):
    raise NotImplementedError("heed does not differentiate the gradients of attention once more")


torch.library.register_autograd("heed::attention", _traced_gradients, setup_context=_set_up)
torch.library.register_autograd("heed::backward", _refuse_second_derivative)


# ---- fake kernels: the shapes of the results ----


def _check_tensors(q: Tensor, **others: Tensor | None) -> None:
    """What tracing and meta tensors need; the operators check the rest on real tensors."""
    for name, tensor in (("q", q), *others.items()):
        if tensor is None:
            continue
        if tensor.device != q.device:
            raise ValueError(f"{name}.device = {tensor.device} must be q.device = {q.device}")
        if name in ("q", "k", "v") and tensor.dim() not in (3, 4):
            raise ValueError(
                f"{name}.rank = {tensor.dim()} must be 4, [batch, seqlen, heads, head_dim], "
                "or 3, packed [total, heads, head_dim]"
            )
        if name in ("k", "v") and tensor.dtype != q.dtype:
            raise ValueError(f"{name}.dtype = {tensor.dtype} must be q.dtype = {q.dtype}")


@torch.library.register_fake("heed::attention")
def _attention_fake(q, k, v, *fields):
    named = dict(zip(FIELDS, fields, strict=False))  # PyTorch leaves out trailing defaults
    tensors = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    _check_tensors(q, k=k, v=v, **tensors)
    *rows, heads, _ = q.shape
    lse = (heads, *rows) if q.dim() == 3 else (rows[0], heads, rows[1])
    return q.new_empty((*rows, heads, v.shape[-1])), q.new_empty(lse, dtype=torch.float32)


@torch.library.register_fake("heed::forward_band")
@torch.library.register_fake("heed::forward")
def _forward_fake(q, k, v, want_lse, *fields):
    out, lse = _attention_fake(q, k, v, *fields)
    return out, lse if want_lse else None


@torch.library.register_fake("heed::backward")
def _backward_fake(dout, dlse, q, k, v, out, lse, *rest):
    named = dict(zip((*FIELDS, "want_dbias", "want_dsink"), rest, strict=False))
    bias, sink = named.get("bias"), named.get("sink")
    _check_tensors(q, k=k, v=v, dout=dout, dlse=dlse, out=out, lse=lse, bias=bias, sink=sink)

    def gradient(of: Tensor | None, wanted: bool) -> Tensor | None:
        if of is None or of.dtype == torch.bool or not wanted:
            return None
        return of.new_empty(of.shape)

    return (
        *(t.new_empty(t.shape) for t in (q, k, v)),
        gradient(bias, named.get("want_dbias", True)),
        gradient(sink, named.get("want_dsink", True)),
    )


@torch.library.register_fake("heed::band_mask")
def _band_mask_fake(padding, positions, chunk_start, batch, seqlen_q, q_offset, slots, *rest):
    bit_rows = 0 if padding is None else (slots + 63) // 64
    return torch.empty((batch, 1, seqlen_q + bit_rows, 2), dtype=torch.int32, device=rest[-1])
