"""Loads the operators torch.ops.heed; gives them fake kernels, gradients, Python's exceptions."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
forward = torch.ops.heed.forward.default
backward = torch.ops.heed.backward.default

# What `forward` takes: q, k, v, these tensors, these numbers.
_OPTIONAL_TENSORS = (
    "bias",
    "sink",
    "intervals",
    "key_bits",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "start_q",
    "start_k",
    "seqused_q",
    "seqused_k",
    "page_table",
    "seed",
)
_NUM_TENSORS = 3 + len(_OPTIONAL_TENSORS)
_NUM_NUMBERS = 9
# Gradients go to q, k, v, bias and sink; the other arguments have none.
_NO_GRADIENTS = (None,) * (_NUM_TENSORS - 5 + _NUM_NUMBERS)

# Skips the kernel that register_autograd() makes, which is for tracing and slow (16 us a call).
_below_autograd = torch._C._AutoDispatchBelowAutograd


def attend(*inputs) -> tuple[Tensor, Tensor]:
    """out and lse of torch.ops.heed.forward's arguments, with gradients where they are needed."""
    if torch.compiler.is_compiling():
        return forward(*inputs)
    try:
        if torch.is_grad_enabled() and _any_requires_grad(inputs):
            return _Attention.apply(*inputs)
        if forward_ad._current_level >= 0:  # refuses tangents
            return _Attention.apply(*inputs)
        if torch._C._are_functorch_transforms_active():  # vmap keeps gradients on this route only
            return forward(*inputs)
        with _below_autograd():
            return forward(*inputs)
    except RuntimeError as error:
        raise python_error(error) from None


def _any_requires_grad(inputs) -> bool:
    q, k, v, bias, sink = inputs[:5]
    return (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sink is not None and sink.requires_grad)
    )


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


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output, *inputs[:_NUM_TENSORS])
    ctx.numbers = inputs[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout: Tensor | None, dlse: Tensor | None):
    out, lse, q, k, v, bias, sink, *arrays = ctx.saved_tensors
    needed = ctx.needs_input_grad[:5]
    if dout is None:
        dout = torch.zeros_like(out)
    inputs = (dout, dlse, q, k, v, out, lse, bias, sink, *arrays, *ctx.numbers, *needed[3:])
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        gradients = backward(*inputs)
    else:
        with _below_autograd():
            gradients = backward(*inputs)
    return *(g if n else None for g, n in zip(gradients, needed, strict=True)), *_NO_GRADIENTS


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        with _below_autograd():
            output = forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        try:
            return _gradients(ctx, dout, dlse)
        except RuntimeError as error:
            raise python_error(error) from None


def _refuse_second_derivative(ctx, *_):
    raise NotImplementedError("heed does not differentiate the gradients of attention once more")


torch.library.register_autograd("heed::forward", _gradients, setup_context=_save)
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


@torch.library.register_fake("heed::forward")
def _forward_fake(q, k, v, *fields):
    _check_tensors(q, k=k, v=v, **dict(zip(_OPTIONAL_TENSORS, fields, strict=False)))
    *rows, heads, _ = q.shape
    lse = (heads, *rows) if q.dim() == 3 else (rows[0], heads, rows[1])
    return q.new_empty((*rows, heads, v.shape[-1])), q.new_empty(lse, dtype=torch.float32)


@torch.library.register_fake("heed::backward")
def _backward_fake(dout, dlse, q, k, v, out, lse, bias, sink, *rest):
    _check_tensors(q, k=k, v=v, dout=dout, dlse=dlse, out=out, lse=lse, bias=bias, sink=sink)
    # PyTorch leaves out trailing arguments that have their schema's defaults.
    want_dbias, want_dsink = (*rest, *(False, True, True)[len(rest) - 18 :])[19:21]

    def optional(of: Tensor | None, wanted: bool) -> Tensor:
        if of is None or of.dtype == torch.bool or not wanted:
            return q.new_empty((0,), dtype=torch.float32)
        return of.new_empty(of.shape)

    gradients = (t.new_empty(t.shape) for t in (q, k, v))
    return (*gradients, optional(bias, want_dbias), optional(sink, want_dsink))
