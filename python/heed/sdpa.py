"""heed below torch.nn.functional.scaled_dot_product_attention, and below varlen_attn.

PyTorch's function chooses a backend, and each backend is an operator of aten. While heed.sdpa is
active, heed's kernels stand in the place of flash attention's on CPUs and GPUs, and of
memory-efficient attention's, which is where PyTorch sends masks on a GPU. Autograd, torch.compile
and context parallelism see the operators that they know.
"""

from __future__ import annotations

import functools
import gc
import inspect
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import attention as _torch
from torch.nn.attention import _registry

from . import ops

__all__ = ["activate", "activated", "restore"]

NAME = "heed"  # in torch.nn.attention's registry
_TESTED = "2.10 to 2.15"


def activate(*, unsupported: str = "torch") -> None:
    """Puts heed in the place of PyTorch's flash and memory-efficient attention, in this process.

    cuDNN attention is switched off meanwhile (``torch.backends.cuda.enable_cudnn_sdp(False)``),
    because PyTorch would prefer it on some GPUs. What was compiled before keeps the backend that it
    was compiled with, and runs on heed if that was flash or memory-efficient attention.

    Args:
        unsupported: what happens to a call that heed does not take: ``"torch"`` leaves it to the
            kernel that PyTorch would have run, ``"error"`` refuses it.

    Raises:
        RuntimeError: an implementation of flash attention is active already, or this PyTorch's
            operators are not those that heed knows. Nothing has changed then.
    """
    if unsupported not in ("torch", "error"):
        raise ValueError(f"unsupported = {unsupported!r} must be 'torch' or 'error'")
    current = _torch.current_flash_attention_impl()
    if current == NAME:
        raise RuntimeError("heed.sdpa is active already: call restore() first")
    if current is not None:
        raise RuntimeError(f"PyTorch's flash attention is {current!r}: restore PyTorch's own first")
    _check_torch()
    chosen = functools.partial(_install, unsupported)
    _torch.register_flash_attention_impl(NAME, register_fn=chosen)
    try:
        _torch.activate_flash_attention_impl(NAME)
    finally:
        _torch.register_flash_attention_impl(NAME, register_fn=_install)


def restore() -> None:
    """Puts PyTorch's own kernels back.

    A backward pass after this runs in PyTorch's kernel, also where forward ran in heed's. That is
    the same gradient, but for dropout.

    Raises:
        RuntimeError: heed.sdpa is not active, or what forward passes with dropout keep for their
            backward passes is still in memory. Nothing has changed then.
    """
    if _torch.current_flash_attention_impl() != NAME:
        raise RuntimeError("heed.sdpa is not active: there is nothing to restore")
    if sentence := _seeds.who_waits():
        raise RuntimeError(sentence)
    _restore()


def _restore() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", _SeedsWait)
        _registry_restore()


def _registry_restore() -> None:
    if hasattr(_torch, "restore_flash_attention_impl"):
        _torch.restore_flash_attention_impl()
    else:  # PyTorch 2.10
        _registry._FLASH_ATTENTION_HANDLES.pop(NAME).remove()
        _registry._FLASH_ATTENTION_ACTIVE = None


@contextmanager
def activated(*, unsupported: str = "torch") -> Iterator[None]:
    """activate() here, restore() at the end, also where restore() would raise."""
    activate(unsupported=unsupported)
    try:
        yield
    finally:
        if _torch.current_flash_attention_impl() == NAME:
            _restore()
    if sentence := _seeds.who_waits():
        raise RuntimeError(sentence)


# ---- the dispatcher ----


class _Kernel(NamedTuple):
    compute: Callable
    returns: int
    keys: tuple[str, ...]
    since: tuple[int, int]


_KERNELS: dict[str, _Kernel] = {}  # by the names of aten's operators


def _takes(
    name: str,
    returns: int,
    keys: tuple[str, ...] = ("CPU", "CUDA"),
    since: tuple[int, int] = (2, 10),
) -> Callable:
    """The function computes aten's operator `name`. Its signature is the operator's newest one."""

    def note(compute: Callable) -> Callable:
        _KERNELS[name] = _Kernel(compute, returns, keys, since)
        return compute

    return note


def _check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    for name, kernel in _KERNELS.items():
        packet = getattr(torch.ops.aten, name, None)
        if packet is None and version < kernel.since:
            continue
        difference = "it is gone" if packet is None else _difference(kernel, packet.default._schema)
        if difference:
            raise RuntimeError(
                f"torch = {torch.__version__} is not supported by heed.sdpa, only {_TESTED}: "
                f"aten::{name} has changed: {difference}"
            )


def _difference(kernel: _Kernel, schema: torch.FunctionSchema) -> str:
    """Of a schema from a signature. Older PyTorch lacks some of the keyword-only arguments."""
    theirs = {
        a.name: (_plain_type(str(a.type)), a.kwarg_only, a.default_value) for a in schema.arguments
    }
    ours = {}
    for p in inspect.signature(kernel.compute).parameters.values():
        keyword_only = p.kind is p.KEYWORD_ONLY
        if not keyword_only or p.name in theirs:
            default = None if p.default is p.empty else p.default
            ours[p.name] = (_plain_type(p.annotation), keyword_only, default)
    if len(schema.returns) != kernel.returns:
        return f"it returns {len(schema.returns)} values instead of {kernel.returns}"
    new, gone = ([n for n in a if a[n] != b.get(n)] for a, b in ((theirs, ours), (ours, theirs)))
    if new:
        return f"heed does not know its {', '.join(new)}"
    if gone:
        return f"it lacks {', '.join(gone)}"
    return "" if list(theirs) == list(ours) else "its arguments have another order"


def _plain_type(name: str) -> str:
    """An undefined Tensor is None in Python, so which types are optional does not count."""
    name = name.removeprefix("Optional[").removesuffix("]") if name[:1] == "O" else name
    return name.removesuffix(" | None").lower()


class _SeedsWait(RuntimeWarning):
    pass


class _Handle:
    """What is in place; PyTorch's registry calls remove()."""

    def __init__(self, library: torch.library.Library, cudnn: bool) -> None:
        self.library, self.cudnn = library, cudnn

    def remove(self) -> None:
        self.library._destroy()
        if self.cudnn:
            torch.backends.cuda.enable_cudnn_sdp(True)
        if sentence := _seeds.who_waits():
            warnings.warn(sentence, _SeedsWait, stacklevel=2)


def _install(unsupported: str = "torch") -> _Handle:
    _check_torch()
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():  # that kernels are overridden
            warnings.simplefilter("ignore", UserWarning)
            for name, kernel in _KERNELS.items():
                for key in kernel.keys:
                    # ROCm's tensors have the key CUDA; heed has no kernels for them.
                    if (key == "CPU" or torch.version.cuda) and hasattr(torch.ops.aten, name):
                        function = _kernel(name, key, kernel.compute, unsupported)
                        library.impl(name, function, key, with_keyset=True)
    except BaseException:
        library._destroy()
        raise
    handle = _Handle(library, torch.backends.cuda.cudnn_sdp_enabled())
    torch.backends.cuda.enable_cudnn_sdp(False)
    return handle


class _Refused(Exception):
    """A call that means something else in heed, or that heed does not compute."""


def _kernel(name: str, key: str, compute: Callable, unsupported: str) -> Callable:
    own = None
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key):
        own = torch.library.get_kernel(f"aten::{name}", key)

    def kernel(keys: torch._C.DispatchKeySet, *args, **kwargs):
        try:
            return compute(*args, **kwargs)
        except _Refused as refused:
            reason: Exception = refused
        except RuntimeError as error:
            reason = ops.python_error(error)
            if reason is error:
                raise
        if own is None or unsupported == "error":
            _refuse(name, reason, own is not None)
        return own.call_boxed(keys, *args, **kwargs)

    return kernel


def _refuse(name: str, reason: Exception, has_other: bool) -> NoReturn:
    kind = ValueError if isinstance(reason, ValueError) else NotImplementedError
    way_out = '; activate(unsupported="torch") leaves such calls to PyTorch' if has_other else ""
    raise kind(f"heed.sdpa, aten::{name}: {reason}{way_out}") from None


# ---- heed's operators ----

_Fields = namedtuple(
    "_Fields", ops.FIELDS, defaults=[a.default_value for a in ops.traced._schema.arguments[3:]]
)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale, left: int, right: int, **rest):
    if not rest:
        return ops.forward_band(q, k, v, True, scale, left, right, None)
    return ops.forward(q, k, v, True, *_Fields(scale, left, right, **rest))


def _backward(dout, q, k, v, out, lse, scale, left, right, want_dbias=False, **rest):
    """dq, dk, dv and dbias."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fields = _Fields(scale, left, right, deterministic=deterministic, **rest)
    inputs = (dout, None, q, k, v, out, lse.contiguous(), *fields, want_dbias, False)
    return ops.backward(*inputs)[:4]


def _heads_after_tokens(*tensors: Tensor) -> list[Tensor]:
    """heed's order of dimensions from scaled_dot_product_attention's, or the other way round."""
    for tensor in tensors:
        if tensor.dim() != 4:
            raise _Refused(f"rank = {tensor.dim()} must be 4, [batch, heads, seqlen, head_dim]")
    return [tensor.transpose(1, 2) for tensor in tensors]


def _check_precision(query: Tensor) -> None:
    if query.dtype == torch.float64:
        raise _Refused(
            "query.dtype = float64 must be float32, bfloat16 or float16: heed's lse is float32"
        )


def _check_debug_mask(wanted: bool) -> None:
    if wanted:
        raise _Refused("return_debug_mask = True must be False")


def _in_layout_of(like: Tensor, tensor: Tensor) -> Tensor:
    """PyTorch's fake kernels promise results with the order of dimensions of query, key or value.

    torch.compile relies on it. `tensor` is dense.
    """
    if like.stride() == tensor.stride():
        return tensor
    order = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
    steps = [like.stride(dim) for dim in order if like.size(dim) > 1]
    if all(a > b > 0 for a, b in pairwise(steps)):
        return tensor
    if like.shape == tensor.shape:
        return torch.empty_like(like).copy_(tensor)
    by_step = sorted(range(like.dim()), key=lambda dim: like.stride(dim) or float("inf"))
    wanted = torch.empty_permuted(
        tensor.shape, by_step[::-1], dtype=tensor.dtype, device=tensor.device
    )
    return wanted.copy_(tensor)


# ---- flash attention's operators ----

# Dropout: which entries are dropped is a function of a seed, in heed another one than in PyTorch's
# kernels. So a backward pass must know who drew its seed. heed remembers the storages of its seeds.
# For a copy of one (torch.autograd.graph.save_on_cpu makes them) it reads the number beside the
# seed: that is odd if heed drew it, and PyTorch's offsets are multiples of 4.


class _Seeds:
    """The seeds that heed drew and that are still in memory."""

    def __init__(self) -> None:
        self.storages: dict[int, StorageWeakRef] = {}  # by address
        self.room = 64

    def add(self, seed: Tensor) -> None:
        if len(self.storages) >= self.room:
            self._forget_freed()
            self.room = max(64, 2 * len(self.storages))
        storage = seed.untyped_storage()
        self.storages[storage.data_ptr()] = StorageWeakRef(storage)

    def drew(self, seed: Tensor, beside: Tensor) -> bool:
        known = self.storages.get(seed.untyped_storage().data_ptr())
        if known is not None and not known.expired():
            return True
        return bool(beside.view(torch.int64).item() & 1)

    def who_waits(self) -> str:
        self._forget_freed()
        if self.storages:
            gc.collect()
            self._forget_freed()
        if not self.storages:
            return ""
        return (
            "calls of heed.sdpa with dropout that may still be differentiated = "
            f"{len(self.storages)} must be 0: run their backward passes or drop their results"
        )

    def _forget_freed(self) -> None:
        self.storages = {at: s for at, s in self.storages.items() if not s.expired()}


_seeds = _Seeds()


def _rng_state(query: Tensor, dropout_p: float) -> Tensor:
    """uint64 [2], as PyTorch's."""
    if not dropout_p:
        return torch.empty(2, dtype=torch.uint64, device=query.device)
    drawn = torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=query.device)
    state = drawn.bitwise_or_(1).view(torch.uint64)
    _seeds.add(state)
    return state


def _dropout(dropout_p: float, seed: Tensor) -> dict:
    if not dropout_p:
        return {}
    return {"dropout_p": dropout_p, "seed": seed.view(torch.int64).reshape(-1)[:1]}


def _dropout_again(dropout_p: float, seed: Tensor, beside: Tensor) -> dict:
    if dropout_p and not _seeds.drew(seed, beside):
        raise _Refused(f"dropout_p = {dropout_p}: forward ran in PyTorch's kernel")
    return _dropout(dropout_p, seed)


def _flash_auxiliary(query: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for PyTorch's `unused` and for the debug mask."""
    return torch.empty((), dtype=torch.uint64, device=query.device), query.new_empty(0)


@_takes("_scaled_dot_product_flash_attention", returns=9)
def _sdpa_flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
):
    # As in PyTorch's kernel, the last row of a causal mask stands at the last key:
    # scaled_dot_product_attention, whose first row stands at the first, calls it where both are
    # the same, and torch.nn.attention.bias.causal_lower_right where it means this one.
    _check_precision(query)
    _check_debug_mask(return_debug_mask)
    q, k, v = _heads_after_tokens(query, key, value)
    rng_state = _rng_state(query, dropout_p)
    dropout = _dropout(dropout_p, rng_state)
    out, lse = _forward(q, k, v, scale, -1, 0 if is_causal else -1, **dropout)
    out = _in_layout_of(query, out.transpose(1, 2))
    lengths = (None, None, query.shape[2], key.shape[2])
    return (out, lse, *lengths, rng_state, *_flash_auxiliary(query))


@_takes("_scaled_dot_product_flash_attention_backward", returns=3)
def _sdpa_flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
):
    _check_precision(query)
    tensors = _heads_after_tokens(grad_out, query, key, value, out)
    dropout = _dropout_again(dropout_p, philox_seed, philox_seed[1:])
    right = 0 if is_causal else -1
    gradients = _backward(*tensors, logsumexp, scale, -1, right, **dropout)[:3]
    return tuple(
        _in_layout_of(like, gradient)
        for like, gradient in zip((query, key, value), _heads_after_tokens(*gradients), strict=True)
    )


def _limits(is_causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    """Any negative number is no limit."""
    left, right = (-1 if x is None or x < 0 else x for x in (left, right))
    return left, 0 if is_causal else right


def _packing(cum_seq_q, cum_seq_k, max_q: int, max_k: int, seqused_k=None, pages=None) -> dict:
    packing = {}
    if cum_seq_q is not None:
        packing |= {"cu_seqlens_q": cum_seq_q, "max_seqlen_q": max_q}
    if cum_seq_k is not None and pages is None:
        packing |= {"cu_seqlens_k": cum_seq_k, "max_seqlen_k": max_k}
    if seqused_k is not None:
        packing["seqused_k"] = seqused_k
    if pages is not None:
        packing["page_table"] = pages
    return packing


@_takes("_flash_attention_forward", returns=5)
def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
):
    _check_precision(query)
    _check_debug_mask(return_debug_mask)
    if alibi_slopes is not None:
        raise _Refused("alibi_slopes must be None")
    if num_splits is not None:
        raise _Refused(f"num_splits = {num_splits} must be None: heed splits keys by their number")
    rng_state = _rng_state(query, dropout_p)
    options = _packing(cum_seq_q, cum_seq_k, max_q, max_k, seqused_k, block_table)
    options |= _dropout(dropout_p, rng_state)
    limits = _limits(is_causal, window_size_left, window_size_right)
    out, lse = _forward(query, key, value, scale, *limits, **options)
    return (_in_layout_of(query, out), lse, rng_state, *_flash_auxiliary(query))


@_takes("_flash_attention_forward_no_dropout_inplace", returns=1, since=(2, 12))
def _flash_forward_into(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
):
    if dropout_p:
        raise _Refused(f"dropout_p = {dropout_p} must be 0")
    lengths = (cum_seq_q, cum_seq_k, max_q, max_k)
    result, lse, *_ = _flash_forward(
        query,
        key,
        value,
        *lengths,
        dropout_p,
        is_causal,
        return_debug_mask,
        scale=scale,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        seqused_k=seqused_k,
        alibi_slopes=alibi_slopes,
        block_table=block_table,
        num_splits=num_splits,
    )
    out.copy_(result)
    return lse


@_takes("_flash_attention_backward", returns=3)
def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
):
    _check_precision(query)
    options = _packing(cum_seq_q, cum_seq_k, max_q, max_k)
    options |= _dropout_again(dropout_p, rng_state, rng_state[1:])
    limits = _limits(is_causal, window_size_left, window_size_right)
    tensors = (grad_out, query, key, value, out, logsumexp)
    gradients = _backward(*tensors, scale, *limits, **options)[:3]
    return tuple(
        _in_layout_of(like, gradient)
        for like, gradient in zip((query, key, value), gradients, strict=True)
    )


# ---- what scaled_dot_product_attention calls with a mask ----

# Here the first row of a causal mask stands at the first key. Its last row stands at the last key
# among as many keys as there are rows, or, of more rows than keys, some rows later.


class _TopLeft(NamedTuple):
    """A call in heed's order of dimensions, and in its alignment."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    right: int

    @property
    def options(self) -> dict:
        return {} if self.bias is None else {"bias": self.bias}


def _top_left(query, key, value, bias: Tensor | None, is_causal: bool) -> _TopLeft:
    _check_precision(query)
    q, k, v = _heads_after_tokens(query, key, value)
    rows, keys = q.shape[1], k.shape[1]
    if not is_causal:
        return _TopLeft(q, k, v, bias, -1)
    if rows < keys:
        k, v = k[:, :rows], v[:, :rows]
        bias = None if bias is None else bias[..., :rows]
    return _TopLeft(q, k, v, bias, max(0, rows - keys))


def _widened(tensor: Tensor, dim: int, size: int) -> Tensor:
    """With zeros for what no row may see."""
    if tensor.shape[dim] == size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size
    wide = tensor.new_zeros(shape)
    wide.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return wide


def _bias(mask: Tensor | None, keys: int) -> Tensor | None:
    """`mask` as heed takes it: rank 4, broadcast where it repeats itself, but not along keys."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    for dim in range(3):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask.expand(-1, -1, -1, keys) if mask.shape[3] == 1 else mask


@_takes("_scaled_dot_product_flash_attention_for_cpu", returns=2, keys=("CPU",))
def _sdpa_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
):
    if dropout_p:
        raise _Refused(f"dropout_p = {dropout_p} must be 0: the operator returns no seed")
    call = _top_left(query, key, value, _bias(attn_mask, key.shape[-2]), is_causal)
    out, lse = _forward(call.q, call.k, call.v, scale, -1, call.right, **call.options)
    if attn_mask is not None:  # PyTorch's kernel has 0 for a row without keys
        lse.masked_fill_(torch.isneginf(lse), 0.0)
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    return _in_layout_of(query, out.transpose(1, 2)), lse


@_takes("_scaled_dot_product_flash_attention_for_cpu_backward", returns=3, keys=("CPU",))
def _sdpa_cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
):
    if dropout_p:
        raise _Refused(f"dropout_p = {dropout_p} must be 0: the operator takes no seed")
    keys = key.shape[-2]
    call = _top_left(query, key, value, _bias(attn_mask, keys), is_causal)
    dout, out = _heads_after_tokens(grad_out, out)
    tensors = (dout, call.q, call.k, call.v, out, logsumexp)
    dq, dk, dv, _ = _backward(*tensors, scale, -1, call.right, **call.options)
    return tuple(_heads_after_tokens(dq, _widened(dk, 1, keys), _widened(dv, 1, keys)))


@_takes("_scaled_dot_product_efficient_attention", returns=4)
def _sdpa_efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
):
    call = _top_left(query, key, value, _bias(attn_bias, key.shape[-2]), is_causal)
    seed, offset = (torch.empty((), dtype=torch.int64, device=query.device) for _ in range(2))
    if dropout_p:
        seed.random_()
        offset.fill_(1)
        _seeds.add(seed)
    options = call.options | _dropout(dropout_p, seed)
    out, lse = _forward(call.q, call.k, call.v, scale, -1, call.right, **options)
    rows = lse.shape[2]
    # Rows of PyTorch's kernel are a multiple of 32, and those that do not exist are inf.
    padding = (0, -rows % 32 if compute_log_sumexp else -rows)
    lse = torch.nn.functional.pad(lse, padding, value=float("inf"))
    return out.transpose(1, 2), lse, seed, offset


@_takes("_scaled_dot_product_efficient_attention_backward", returns=4)
def _sdpa_efficient_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
):
    want_dbias = attn_bias is not None and grad_input_mask[3]
    rows, keys = query.shape[-2], key.shape[-2]
    # A gradient of each element, also where the mask repeats itself.
    bias = attn_bias if want_dbias else _bias(attn_bias, keys)
    call = _top_left(query, key, value, bias, is_causal)
    options = call.options | _dropout_again(dropout_p, philox_seed, philox_offset)
    dout, out = _heads_after_tokens(grad_out_, out)
    tensors = (dout, call.q, call.k, call.v, out, logsumexp[..., :rows])
    dq, dk, dv, dbias = _backward(*tensors, scale, -1, call.right, want_dbias, **options)
    gradients = _heads_after_tokens(dq, _widened(dk, 1, keys), _widened(dv, 1, keys))
    if dbias is not None and keys % 16:  # where PyTorch's kernel begins its rows
        wide = dbias.new_zeros((*dbias.shape[:3], keys + -keys % 16))
        wide[..., : dbias.shape[3]] = dbias
        dbias = wide[..., :keys]
    elif dbias is not None:
        dbias = _widened(dbias, 3, keys)
    return (*gradients, dbias)


_torch.register_flash_attention_impl(NAME, register_fn=_install)
