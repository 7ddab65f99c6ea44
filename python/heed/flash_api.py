"""The attention functions of FlashAttention 2, 3 and 4 under their own names, computed by heed.

``from flash_attn import flash_attn_func`` becomes ``from heed.flash_api import flash_attn_func``.
Every parameter of the three is named. Parameters of FlashAttention-2 keep its order and may be
given by position; those that only 3 or 4 have are keyword-only, because 3 and 4 order differently.

- An option that changes the result is honoured, or refused with a NotImplementedError.
- Options that choose a schedule are accepted and have no effect, as heed plans every call itself:
  ``num_splits``, ``pack_gqa``, ``sm_margin``, ``scheduler_metadata``, ``seqlen_k_per_split``,
  ``disable_scheduler_metadata``, ``min_seqlen_k`` and ``virtual_batch_idx``.
- ``deterministic=True`` gives gradients the same bits in every run; results always have them.
- ``window_size``: -1 and None both mean no limit. ``causal`` and windows are aligned to the last
  key: row i sees keys ``i + seqlen_k - seqlen_q - left`` to ``i + seqlen_k - seqlen_q + right``.
- ``return_attn_probs=True`` returns (out, lse, an empty tensor), which is FlashAttention-2's tuple
  without dropout. ``return_lse=True`` returns (out, lse) and ``return_lse=False`` (out, None), as
  FlashAttention-4 does; with neither flag, out alone is returned.
- A row that sees no key has out = 0 and lse = -inf (FlashAttention-2: +inf), or lse = its sink.
- ``alibi_slopes`` become a float32 bias [batch or 1, heads, seqlen_q, seqlen_k]: they cost memory
  that FlashAttention-2 does not need.
- Nothing here reads a tensor's value, so nothing waits for a device; ``max_seqlen`` may be one.

Shapes, dtypes and errors not named below are those of `heed.attention`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import attention

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

Window = Sequence[int | None] | None
Result = Tensor | tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor]

# What heed does not compute, each with the way out.
_FLEX = "write it as a bias or as intervals of heed.attention, or use torch's flex_attention"
_FP8 = "pass tensors of bfloat16 or float16 with their scales multiplied in"
_REFUSED = {
    "qv": "concatenate it to q, and v to k, along head_dim (at most 512)",
    "q_descale": _FP8,
    "k_descale": _FP8,
    "v_descale": _FP8,
    "gather_kv_indices": "gather k and v, or use key_bits of heed.attention",
    "score_mod": _FLEX,
    "score_mod_bwd": _FLEX,
    "mask_mod": _FLEX,
    "aux_tensors": _FLEX,
    "aux_scalars": _FLEX,
    "block_sparse_tensors": _FLEX,
    "block_sparse_tensors_bwd": _FLEX,
    "seqused": "leave it out, every row is combined",
}


def _refuses(function: Callable) -> Callable:
    """Refuses the options of `_REFUSED`, which are keyword-only everywhere."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for name, value in kwargs.items():
            if value is not None and name in _REFUSED:
                raise NotImplementedError(
                    f"{name} = {_text(value)} is not supported by heed: {_REFUSED[name]}"
                )
        return function(*args, **kwargs)

    return checked


# ---- dense ----


@_refuses
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    attention_chunk: int = 0,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: list | None = None,
    aux_scalars: tuple | None = None,
    block_sparse_tensors: object = None,
    block_sparse_tensors_bwd: object = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_lse: bool | None = None,
) -> Result:
    """Attention of q [batch, seqlen_q, heads_q, head_dim] over k and v, with gradients.

    Args:
        q, k, v: any number of query heads that is a multiple of the key heads; v may have a
            head_dim of its own.
        dropout_p: drawn from PyTorch's generator: `torch.manual_seed` repeats it.
        softmax_scale: factor of q kᵀ. Default: ``head_dim ** -0.5``.
        softcap: bound of the scaled scores; 0 and None mean none.
        alibi_slopes: [heads_q] or [batch, heads_q]: adds
            ``-slope * |i + seqlen_k - seqlen_q - j|`` to the score of row i and key j.
        learnable_sink: [heads_q], one more logit per row without a value; has a gradient.
        s_aux: another name of learnable_sink.
        attention_chunk: rows see keys of their own chunk only; needs causal.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            _check_shape(name, tensor, ["batch", "seqlen", "heads", "head_dim"])
    scores = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        *(None, None, None, None),
        *scores,
        deterministic,
        return_attn_probs,
        learnable_sink=learnable_sink,
        s_aux=s_aux,
        attention_chunk=attention_chunk,
        return_lse=return_lse,
    )


@_refuses
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    num_heads_q: int | None = None,
    attention_chunk: int = 0,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    sm_margin: int = 0,
) -> Result:
    """`flash_attn_func` of qkv [batch, seqlen, 3, heads, head_dim].

    With num_heads_q, qkv may be [batch, seqlen, num_heads_q + 2 * heads_k, head_dim].
    """
    if num_heads_q is not None and qkv.dim() == 4:
        heads_k, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        if odd or num_heads_q < 0 or heads_k < 0:
            raise ValueError(
                f"qkv.shape[2] = {qkv.shape[2]} must be num_heads_q + 2 * heads_k, and "
                f"num_heads_q = {num_heads_q}"
            )
        q, k, v = qkv.split([num_heads_q, heads_k, heads_k], dim=2)
    else:
        q, k, v = _unpacked("qkv", qkv, "[batch, seqlen, 3, heads, head_dim]")
    scores = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    flags = (deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *scores, *flags, attention_chunk=attention_chunk)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of q and kv [batch, seqlen_k, 2, heads_k, head_dim]."""
    k, v = _unpacked("kv", kv, "[batch, seqlen, 2, heads, head_dim]")
    scores = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    return flash_attn_func(q, k, v, *scores, deterministic, return_attn_probs)


# ---- sequences of different lengths ----


@_refuses
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    attention_chunk: int = 0,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    gather_kv_indices: Tensor | None = None,
    score_mod: Callable | None = None,
    score_mod_bwd: Callable | None = None,
    mask_mod: Callable | None = None,
    aux_tensors: list | None = None,
    aux_scalars: tuple | None = None,
    block_sparse_tensors: object = None,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    min_seqlen_k: int | None = None,
    scheduler_metadata: object = None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
    return_lse: bool | None = None,
) -> Result:
    """`flash_attn_func` of sequences that lie one after the other, with gradients.

    Args:
        q, k, v: packed [total, heads, head_dim], found by cu_seqlens, or padded
            [batch, seqlen, heads, head_dim] without cu_seqlens on that side.
        max_seqlen_q, max_seqlen_k: no packed entry is longer. A tensor is accepted and not read;
            alibi_slopes of a packed side need an int.
        block_table, page_table: int32 [batch, max_pages]: k and v are pages
            [num_pages, page_size, heads_k, head_dim] of any page_size. Their lengths are seqused_k
            or, without it, those of cu_seqlens_k. Forward only.
        seqused_q, seqused_k: int32 [batch]: only the first tokens of an entry count; out is 0 and
            lse is -inf in the others.

    lse is [heads_q, total_q] for a packed q.
    """
    problem, names = _problem(
        softmax_scale, causal, window_size, softcap, attention_chunk, learnable_sink, s_aux
    )
    _check_number("dropout_p", dropout_p)
    if dropout_p and return_attn_probs:
        raise NotImplementedError(
            f"return_attn_probs = True is not supported with dropout_p = {dropout_p}: heed keeps "
            "no probabilities; return_lse=True returns lse"
        )
    table_name, table = _either(block_table=block_table, page_table=page_table)
    if table is not None:
        names["page_table"] = table_name
        if seqused_k is None and cu_seqlens_k is not None:
            seqused_k = cu_seqlens_k.diff()
        cu_seqlens_k = None
    if alibi_slopes is not None:
        rows = _extent("max_seqlen_q", max_seqlen_q, q, None)
        columns = _extent("max_seqlen_k", max_seqlen_k, k, table)
        problem["bias"] = _alibi_bias(
            alibi_slopes,
            q,
            q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1,
            rows,
            columns,
            _lengths(rows, cu_seqlens_q, seqused_q),
            _lengths(columns, cu_seqlens_k, seqused_k),
        )
    problem |= {
        "dropout_p": dropout_p,
        "deterministic": deterministic or None,  # None leaves it to PyTorch's own setting
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
        "page_table": table,
    }
    out, lse = _attend(q, k, v, problem, names)
    return _returned(out, lse, return_attn_probs, return_lse)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of qkv [total, 3, heads, head_dim]."""
    q, k, v = _unpacked("qkv", qkv, "[total, 3, heads, head_dim]")
    sequences = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    scores = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    flags = (deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, *sequences, *scores, *flags)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of q and kv [total_k, 2, heads_k, head_dim]."""
    k, v = _unpacked("kv", kv, "[total, 2, heads, head_dim]")
    sequences = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    scores = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    flags = (deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, *sequences, *scores, *flags)


# ---- a cache of keys and values ----


@_refuses
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float | None = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    attention_chunk: int = 0,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    scheduler_metadata: object = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Writes k and v into the cache, in place, and attends from q to the cache. No gradients.

    Args:
        q: [batch, seqlen_q, heads_q, head_dim], or packed [total_q, ...] with cu_seqlens_q.
        k_cache, v_cache: [batch or more, slots, heads_k, head_dim], or pages
            [num_pages, page_size, heads_k, head_dim] with block_table or page_table.
        k, v: new tokens [batch, seqlen_new, heads_k, head_dim], or packed [total_new, ...] with
            cu_seqlens_k_new. Those of entry b go to slots ``cache_seqlens[b]`` and following; a
            token whose slot lies outside the cache is not written.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2]: k is rotated to the positions of its
            slots; q to ``cache_seqlens[b]`` and following when causal or windowed, otherwise
            every row of it to ``cache_seqlens[b]``.
        cache_seqlens: used slots of every entry before k is written, left padding included; an
            int, or int32 [batch]. Default: all slots.
        cache_batch_idx: int32 [batch]: the row of the cache, or of the page table, of an entry.
        cache_leftpad: int32 [batch]: the first slot that holds a token.
        rotary_seqlens: int32 [batch]: takes the place of cache_seqlens in the rotation.

    Returns:
        out, shaped as q; with return_softmax_lse, (out, lse).
    """
    problem, names = _problem(
        softmax_scale, causal, window_size, softcap, attention_chunk, learnable_sink, s_aux
    )
    batch = _checked_batch(q, cu_seqlens_q)
    _check_indices("cache_leftpad", cache_leftpad, q, [batch])
    _check_indices("rotary_seqlens", rotary_seqlens, q, [batch])
    _check_indices("cu_seqlens_k_new", cu_seqlens_k_new, q, [batch + 1])
    _check_shape("k_cache", k_cache, ["batch", "slots", "heads", "head_dim"])
    _check_shape("v_cache", v_cache, [*k_cache.shape[:3], "head_dim_v"])
    added = _checked_new(k, v, k_cache, v_cache, cu_seqlens_k_new, batch)
    advances = problem["left"] is not None or problem["right"] is not None

    with torch.no_grad():
        table_name, table = _pages(block_table, page_table, cache_batch_idx, q, batch)
        if table is None:
            k_cache, v_cache = k_cache[:batch], v_cache[:batch]
        elif cache_leftpad is not None and attention_chunk:
            raise NotImplementedError(
                f"attention_chunk = {attention_chunk} is not supported together with cache_leftpad "
                f"and {table_name}: leave one of them out"
            )
        capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])

        used = _used_slots(cache_seqlens, q, batch, capacity, None if k is None else added)
        if rotary_cos is not None or rotary_sin is not None:
            _check_rotary(rotary_cos, rotary_sin, k, capacity)
            start = used if rotary_seqlens is None else rotary_seqlens
            turn = functools.partial(_rotated, rotary_cos, rotary_sin, rotary_interleaved, start)
            q, k = turn(q, cu_seqlens_q, advances), turn(k, cu_seqlens_k_new, True)
        end = used + _lengths(added, cu_seqlens_k_new, None)

        problem |= {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": max_seqlen_q}
        problem |= {"seqused_k": end, "page_table": table}
        names |= {"k": "k_cache", "v": "v_cache", "page_table": table_name}
        names |= {"seqused_k": "cache_seqlens" if k is None else "cache_seqlens + new tokens"}
        names |= {"start_k": "cache_leftpad"}
        if alibi_slopes is not None:
            rows = _extent("max_seqlen_q", max_seqlen_q, q, None)
            len_q = _lengths(rows, cu_seqlens_q, None)
            problem["bias"] = _alibi_bias(alibi_slopes, q, batch, rows, capacity, len_q, end)
        if cache_leftpad is not None and table is None:
            problem |= {"start_k": cache_leftpad, "seqused_k": end - cache_leftpad}
            names["seqused_k"] += " - cache_leftpad"
        elif cache_leftpad is not None:
            first = cache_leftpad[_tokens(q, cu_seqlens_q)[0]]
            intervals = torch.stack([first, torch.full_like(first, 2**31 - 1)], dim=-1)
            problem["intervals"] = intervals.view(*q.shape[:-2], 2)
        if k is not None:
            _append(((k_cache, k), (v_cache, v)), used, cu_seqlens_k_new, table, capacity)
        out, lse = _attend(q, k_cache, v_cache, problem, names)
    return (out, lse) if return_softmax_lse else out


# ---- parts of a softmax ----


@_refuses
def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    seqused: Tensor | None = None,
    virtual_batch_idx: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention over all keys from the results over parts of them.

    Args:
        out_partial: [parts, batch, seqlen, heads, head_dim] or [parts, total, heads, head_dim].
        lse_partial: [parts, batch, seqlen, heads] or [parts, total, heads]: heads come last here,
            so transpose what the functions above return. A part with -inf does not count, whatever
            its out_partial holds.
        out: is written and returned when given.
        out_dtype: of out. Default: out_partial's.
        cu_seqlens, virtual_batch_idx: rows are combined one by one, so they change nothing.

    Returns:
        (out, lse), lse in float32 and shaped as one part of lse_partial, or (out, None) without
        return_lse. A row without any part has out = 0 and lse = -inf.
    """
    _check_shape("lse_partial", lse_partial, list(out_partial.shape[:-1]))
    if out is not None:
        _check_shape("out", out, list(out_partial.shape[1:]))
        if out_dtype not in (None, out.dtype):
            raise ValueError(f"out_dtype = {out_dtype} must be out.dtype = {out.dtype}")
    wide = torch.promote_types(out_partial.dtype, torch.float32)
    parts = lse_partial.to(wide)
    largest = parts.amax(dim=0)
    largest = torch.where(largest == -torch.inf, 0.0, largest)
    weights = torch.exp(parts - largest)
    total = weights.sum(dim=0)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    counted = torch.where(weights[..., None] > 0, out_partial.to(wide), 0.0)
    result = (weights[..., None] * counted).sum(dim=0) / safe[..., None]
    if out is None:
        out = result.to(out_dtype or out_partial.dtype)
    else:
        out.copy_(result)
    if not return_lse:
        return out, None
    return out, torch.where(empty, -torch.inf, safe.log() + largest).float()


def get_scheduler_metadata(*args, **kwargs) -> None:
    """None, which every `scheduler_metadata` accepts: heed plans each call itself."""


# ---- from the caller's words to heed.attention's and back ----


def _problem(
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float | None,
    attention_chunk: int,
    learnable_sink: Tensor | None,
    s_aux: Tensor | None,
) -> tuple[dict, dict[str, str]]:
    """Arguments of `heed.attention`, and what the caller calls those that have another name."""
    for name, number in (("softmax_scale", softmax_scale), ("softcap", softcap)):
        if number is not None:
            _check_number(name, number)
    _check_number("attention_chunk", attention_chunk)
    if attention_chunk and not causal:
        raise NotImplementedError(
            f"attention_chunk = {attention_chunk} is not supported with causal = False: "
            "pass causal=True, or intervals to heed.attention"
        )
    left, right = (None, None) if window_size is None else window_size
    for limit in (left, right):
        if limit is not None and (not isinstance(limit, int) or limit < -1):
            raise ValueError(
                f"window_size = {_text(window_size)} must hold two numbers of at least 0; "
                "-1 and None mean no limit"
            )
    sink_name, sink = _either(learnable_sink=learnable_sink, s_aux=s_aux)
    problem = {
        "scale": softmax_scale,
        "softcap": softcap or 0.0,
        "left": None if left == -1 else left,
        "right": 0 if causal else None if right == -1 else right,
        "chunk": attention_chunk,
        "sink": sink,
    }
    return problem, {"scale": "softmax_scale", "chunk": "attention_chunk", "sink": sink_name}


def _attend(
    q: Tensor, k: Tensor, v: Tensor, problem: dict, names: dict[str, str]
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return attention(q, k, v, **problem, return_lse=True)
    try:
        return attention(q, k, v, **problem, return_lse=True)
    except (ValueError, NotImplementedError) as error:
        words = re.sub(r"\b\w+\b", lambda word: names.get(word[0], word[0]), str(error))
        raise type(error)(words) from None


def _returned(out: Tensor, lse: Tensor, return_attn_probs: bool, return_lse: bool | None) -> Result:
    if return_attn_probs:
        return out, lse, out.new_empty(0)
    return out if return_lse is None else (out, lse if return_lse else None)


def _either(**names: Tensor | None) -> tuple[str, Tensor | None]:
    """The one of two names for the same argument that was used, and its value."""
    (first, a), (second, b) = names.items()
    if a is not None and b is not None:
        raise ValueError(f"{first} and {second} are two names of one argument: pass one of them")
    return (first, a) if a is not None else (second, b)


def _unpacked(name: str, packed: Tensor, shape: str) -> tuple[Tensor, ...]:
    """The parts of qkv or kv, which lie along the third axis from the end."""
    parts = len(name)
    if packed.dim() != shape.count(",") + 1 or packed.shape[-3] != parts:
        raise ValueError(f"{name}.shape = {list(packed.shape)} must be {shape}")
    return packed.unbind(-3)


def _text(value: object) -> str:
    """Without reading a tensor's values."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_text, value))})"
    return getattr(value, "__name__", None) or str(value)


def _check_number(name: str, value: float) -> None:
    if value is None or isinstance(value, (Tensor, bool)):
        raise ValueError(
            f"{name} = {_text(value)} must be a number. By position, arguments have "
            "FlashAttention-2's order: pass those of FlashAttention 3 and 4 by name"
        )


def _check_shape(name: str, tensor: Tensor, shape: list[int | str]) -> None:
    """A word in shape means any size."""
    if tensor.dim() != len(shape) or any(
        isinstance(want, int) and size != want
        for size, want in zip(tensor.shape, shape, strict=True)
    ):
        want = f"[{', '.join(map(str, shape))}]"
        raise ValueError(f"{name}.shape = {list(tensor.shape)} must be {want}")


def _check_indices(name: str, array: Tensor | None, q: Tensor, shape: list[int | str]) -> None:
    if array is None:
        return
    if array.dtype != torch.int32:
        raise ValueError(f"{name}.dtype = {array.dtype} must be torch.int32")
    if array.device != q.device:
        raise ValueError(f"{name}.device = {array.device} must be q.device = {q.device}")
    _check_shape(name, array, shape)


# ---- lengths and ALiBi ----


def _lengths(extent: int, cu_seqlens: Tensor | None, seqused: Tensor | None) -> int | Tensor:
    """Tokens of every entry: int32 [batch], or one number for all."""
    if seqused is not None:
        return seqused
    return extent if cu_seqlens is None else cu_seqlens.diff()


def _extent(name: str, max_seqlen: int | Tensor | None, x: Tensor, table: Tensor | None) -> int:
    """Slots that an entry of x can have at most, as a bias counts them."""
    if x.dim() == 4:
        return x.shape[1] * (1 if table is None else table.shape[1])
    if not isinstance(max_seqlen, int):
        raise NotImplementedError(
            f"alibi_slopes is not supported with {name} = {_text(max_seqlen)} and a packed tensor: "
            "pass an int, a tensor would have to be read"
        )
    return max_seqlen


def _alibi_bias(
    slopes: Tensor,
    q: Tensor,
    batch: int,
    rows: int,
    columns: int,
    len_q: int | Tensor,
    end_k: int | Tensor,
) -> Tensor:
    """[batch or 1, heads, rows, columns]; end_k is the slot after the last key."""
    heads = q.shape[-2]
    _check_shape("alibi_slopes", slopes, [batch, heads] if slopes.dim() == 2 else [heads])
    diagonal = end_k - len_q
    if isinstance(diagonal, Tensor):
        diagonal = diagonal[:, None, None, None]
    position = torch.arange(rows, device=q.device)[:, None] + diagonal
    distance = (position - torch.arange(columns, device=q.device)).abs()
    slopes = slopes.to(torch.promote_types(slopes.dtype, torch.float32))
    return -slopes.view(-1, heads, 1, 1) * distance


# ---- the cache ----


def _checked_batch(q: Tensor, cu_seqlens_q: Tensor | None) -> int:
    if cu_seqlens_q is None:
        _check_shape("q", q, ["batch", "seqlen", "heads", "head_dim"])
        return q.shape[0]
    _check_shape("q", q, ["total", "heads", "head_dim"])
    _check_indices("cu_seqlens_q", cu_seqlens_q, q, ["batch + 1"])
    return cu_seqlens_q.shape[0] - 1


def _checked_new(
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_seqlens_k_new: Tensor | None,
    batch: int,
) -> int:
    """New tokens of every entry; 0 when they are packed."""
    if k is None and v is None:
        if cu_seqlens_k_new is not None:
            raise ValueError("cu_seqlens_k_new must be None when k and v are None")
        return 0
    if k is None or v is None:
        raise ValueError("k and v must be given together")
    lead = [batch, "seqlen_new"] if cu_seqlens_k_new is None else ["total_new"]
    _check_shape("k", k, [*lead, *k_cache.shape[2:]])
    _check_shape("v", v, [*k.shape[:-2], *v_cache.shape[2:]])
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.dtype != cache.dtype:
            raise ValueError(
                f"{name}.dtype = {new.dtype} must be {name}_cache.dtype = {cache.dtype}"
            )
    return k.shape[1] if cu_seqlens_k_new is None else 0


def _used_slots(
    cache_seqlens: int | Tensor | None, q: Tensor, batch: int, capacity: int, added: int | None
) -> Tensor:
    """int32 [batch]; `added` is None when nothing is written."""
    if isinstance(cache_seqlens, Tensor):
        _check_indices("cache_seqlens", cache_seqlens, q, [batch])
        return cache_seqlens
    if cache_seqlens is None:
        if added is not None:
            raise ValueError("cache_seqlens must be given when k and v are: it says where they go")
        cache_seqlens = capacity
    room = capacity - (added or 0)
    if not 0 <= cache_seqlens <= room:
        raise ValueError(
            f"cache_seqlens = {cache_seqlens} must be in [0, {room}]: "
            f"the cache has {capacity} slots"
        )
    return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)


def _pages(
    block_table: Tensor | None,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    q: Tensor,
    batch: int,
) -> tuple[str, Tensor | None]:
    """Where the pages of every entry come from, and [batch, max_pages]; None: from its own row."""
    name, table = _either(block_table=block_table, page_table=page_table)
    if cache_batch_idx is None:
        _check_indices(name, table, q, [batch, "max_pages"])
        return name, table
    _check_indices("cache_batch_idx", cache_batch_idx, q, [batch])
    if table is None:  # every row of the cache is a page
        return "cache_batch_idx", cache_batch_idx[:, None]
    _check_indices(name, table, q, ["rows", "max_pages"])
    inside = cache_batch_idx.clamp(0, table.shape[0] - 1)
    return name, torch.where((inside == cache_batch_idx)[:, None], table[inside], -1)


def _check_rotary(cos: Tensor | None, sin: Tensor | None, k: Tensor | None, capacity: int) -> None:
    if cos is None or sin is None:
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if k is None:
        raise ValueError("rotary_cos must be None when k and v are: it rotates new tokens")
    _check_shape("rotary_cos", cos, ["positions", "rotary_dim / 2"])
    _check_shape("rotary_sin", sin, list(cos.shape))
    if 2 * cos.shape[1] > k.shape[-1]:
        raise ValueError(
            f"rotary_cos.shape[1] = {cos.shape[1]} must be at most {k.shape[-1] // 2}, half of "
            "k's head_dim"
        )
    if cos.shape[0] < capacity:
        raise ValueError(
            f"rotary_cos.shape[0] = {cos.shape[0]} must be at least {capacity}, the cache's slots"
        )


def _tokens(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of every token of x: its entry, and its number in it, or -1 for a token of no entry."""
    if cu_seqlens is None:
        shape = x.shape[:2]
        entry = torch.arange(shape[0], device=x.device)[:, None].expand(shape)
        return entry.flatten(), torch.arange(shape[1], device=x.device).expand(shape).flatten()
    token = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    entry = torch.searchsorted(cu_seqlens, token, right=True) - 1
    entry = entry.clamp(0, cu_seqlens.shape[0] - 2)
    inside = (cu_seqlens[entry] <= token) & (token < cu_seqlens[entry + 1])
    return entry, torch.where(inside, token - cu_seqlens[entry], -1)


def _rotated(
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    start: Tensor,
    x: Tensor,
    cu_seqlens: Tensor | None,
    advances: bool,
) -> Tensor:
    """x with its first channels rotated to position start, and following when it advances."""
    entry, number = _tokens(x, cu_seqlens)
    position = start[entry] + number if advances else start[entry]
    position = position.clamp(0, cos.shape[0] - 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = (t.to(wide)[position, None] for t in (cos, sin))
    channels = 2 * cos.shape[1]
    flat = x.reshape(-1, *x.shape[-2:])
    turned, rest = flat[..., :channels].to(wide), flat[..., channels:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)
    else:
        a, b = turned.chunk(2, dim=-1)
        turned = torch.cat([a * c - b * s, a * s + b * c], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1).view(x.shape)


def _append(
    caches: tuple[tuple[Tensor, Tensor], ...],
    used: Tensor,
    cu_seqlens: Tensor | None,
    table: Tensor | None,
    capacity: int,
) -> None:
    """Writes new tokens behind the used slots of their entries, for every (cache, new)."""
    cache, new = caches[0]
    entry, number = _tokens(new, cu_seqlens)
    if entry.shape[0] == 0 or capacity == 0 or cache.shape[0] == 0:
        return
    slot = used[entry].long() + number
    first, second = entry, slot  # where the token goes: cache[first, second]
    if table is not None:
        page = (slot // cache.shape[1]).clamp(0, table.shape[1] - 1)
        first, second = table[entry, page].long(), slot % cache.shape[1]
    valid = (number >= 0) & (slot >= 0) & (slot < capacity)
    valid &= (first >= 0) & (first < cache.shape[0])
    # Writes to one place are not ordered. A token without a place repeats the write of one that has
    # one; when none has, all write what one place holds already.
    source = torch.where(valid, torch.arange(len(valid), device=valid.device), valid.int().argmax())
    first = first.clamp(0, cache.shape[0] - 1)[source]
    second = second.clamp(0, cache.shape[1] - 1)[source]
    for cache, new in caches:
        rows = new.reshape(-1, *new.shape[-2:])[source]
        cache[first, second] = torch.where(valid.any(), rows, cache[first, second])
