"""heed: exact softmax attention for Transformers, forward and backward."""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import Tensor

from . import ops

__all__ = ["__version__", "attention"]
__version__ = version("heed")

# Bound once: looking them up at every call is 2 % of it.
_is_deterministic = torch.are_deterministic_algorithms_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    left: int | None = None,
    right: int | None = None,
    chunk: int = 0,
    causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    start_q: Tensor | None = None,
    start_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    page_table: Tensor | None = None,
    intervals: Tensor | None = None,
    key_bits: Tensor | None = None,
    bias: Tensor | None = None,
    sink: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Softmax attention of every query row over the keys that it sees.

        S = scale * q kᵀ;  S = softcap * tanh(S / softcap) if softcap > 0;  S += bias
        P = softmax of S over the visible keys (and the sink);  out = dropout(P) v

    A row that sees no key has out = 0, lse = -inf (or its sink) and no gradient but that of the
    sink. Gradients reach q, k, v, bias and sink, from out and from lse; second derivatives do not
    exist. Python reads no value of a tensor, so nothing waits for a device.

    Args:
        q: ``[batch, seqlen_q, heads_q, head_dim]`` or packed ``[total_q, heads_q, head_dim]``. On
            a CPU float32, bfloat16, float16 or float64 with head_dim 1 to 512, on a GPU bfloat16
            or float16 with head_dim 1 to 256. Strides are free, but a last stride other than 1
            costs a copy.
        k: ``[batch, seqlen_k, heads_k, head_dim]``, packed ``[total_k, heads_k, head_dim]`` or
            pages ``[num_pages, page_size, heads_k, head_dim]``. heads_q is a multiple of heads_k:
            query head h reads key head ``h // (heads_q // heads_k)``.
        v: as k, with a head_dim_v of its own.
        scale: factor of q kᵀ. Default: ``head_dim ** -0.5``.
        softcap: bound of the scaled scores; 0 means none.
        left, right: row i of an entry stands at position ``i + seqlen_k - seqlen_q`` among its
            keys and sees keys ``position - left`` to ``position + right``. None: no limit.
        chunk: rows see only keys of their own chunk, from ``position // chunk * chunk`` on; 0
            means no chunks.
        causal: the same as ``right=0``.
        cu_seqlens_q, cu_seqlens_k: int32 ``[batch + 1]``, needed for a packed q or k: entry b
            owns tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
        start_q, start_k: int32 ``[batch]``: the tokens of a padded row begin at this slot.
        seqused_q, seqused_k: int32 ``[batch]``: an entry has this many tokens, from its first
            one on.
        max_seqlen_q, max_seqlen_k: no entry of a packed q or k is longer. An int is needed
            together with a bias; a tensor is accepted and not read.
        page_table: int32 ``[batch, max_pages]``: slot j of entry b is row ``j % page_size`` of
            page ``page_table[b, j // page_size]`` of k and v. Needs seqused_k. Forward only.
        intervals: int32 ``[batch or 1, seqlen_q, 2]`` (packed: ``[total_q, 2]``): first and end
            key slot that a row sees. All limits hold together. Or, with key_bits in the same
            tensor, ``[batch or 1, 1, seqlen_q + n, 2]``: the last n rows hold the bits of 64 keys
            each.
        key_bits: int32 ``[batch or 1, words]``: bit ``j % 32`` of word ``j // 32`` says that key
            slot j may be seen.
        bias: ``[batch or 1, heads_q or 1, seqlen_q or 1, seqlen_k]``, any float dtype (added to
            S) or bool (False: not visible).
        sink: any float dtype, ``[heads_q]``: one more logit per row, without a value. Computed in
            float32.
        dropout_p: probability in [0, 1) that an entry of P becomes 0; the others are divided by
            ``1 - dropout_p``.
        seed: int64 ``[1]``, on q's device: the same seed drops the same entries. Default: drawn
            from PyTorch's generator.
        deterministic: gradients have the same bits every time. On a GPU that costs time, and memory
            where a bias that is broadcast has a gradient; everything else always has the same bits.
            Default: ``torch.are_deterministic_algorithms_enabled()``.
        return_lse: also return lse.

    Returns:
        out, in q's dtype, contiguous, shaped as q with head_dim_v; with return_lse also lse,
        float32 ``[batch, heads_q, seqlen_q]`` (packed: ``[heads_q, total_q]``): the natural
        logarithm of the sum of exp(S) over what the softmax ran over, -inf for rows outside their
        sequence.

    Raises:
        ValueError: an argument contradicts the above; the sentence names it, its value and what
            is allowed.
        NotImplementedError: no kernel of this build serves the request, or q's device.
        RuntimeError: the device failed.

    Under ``torch.autocast`` q, k and v are cast to its dtype.
    """
    if causal:
        if right is not None and right != 0:
            raise ValueError(f"right = {right} must be 0 or None when causal = True")
        right = 0
    if deterministic is None:
        deterministic = _is_deterministic()
    if _is_any_autocast_enabled():
        q, k, v = _autocast(q, k, v)
    if dropout_p and seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    left = -1 if left is None else _checked_limit("left", left)
    right = -1 if right is None else _checked_limit("right", right)
    if not (
        bias is not None
        or sink is not None
        or softcap
        or chunk
        or dropout_p
        or seed is not None
        or key_bits is not None
        or cu_seqlens_q is not None
        or cu_seqlens_k is not None
        or start_q is not None
        or start_k is not None
        or seqused_q is not None
        or seqused_k is not None
        or page_table is not None
        or max_seqlen_q is not None
        or max_seqlen_k is not None
        or deterministic
    ):
        return ops.attend(q, k, v, return_lse, (scale, left, right, intervals))
    return ops.attend(
        q,
        k,
        v,
        return_lse,
        (
            scale,
            left,
            right,
            intervals,
            bias,
            sink,
            softcap,
            chunk,
            dropout_p,
            seed,
            key_bits,
            cu_seqlens_q,
            cu_seqlens_k,
            start_q,
            start_k,
            seqused_q,
            seqused_k,
            page_table,
            -1 if max_seqlen_q is None else _checked_length("max_seqlen_q", max_seqlen_q),
            -1 if max_seqlen_k is None else _checked_length("max_seqlen_k", max_seqlen_k),
            deterministic,
        ),
    )


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """float64 stays, as in PyTorch's own autocast."""
    device = q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return [q, k, v]
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v)
    ]


def _checked_limit(name: str, limit: int) -> int:
    """The operators' own code for no limit, -1, is no value of an argument."""
    if limit < 0:
        raise ValueError(f"{name} = {limit} must be at least 0, or None for no limit")
    return limit


def _checked_length(name: str, length: int | Tensor) -> int:
    """Reading a tensor would wait for its device: its bound is not used."""
    if isinstance(length, Tensor):
        return -1
    if length < 0:
        raise ValueError(f"{name} = {length} must be at least 0, or None when it is unknown")
    return length
