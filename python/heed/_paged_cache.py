"""Attention over the cache of Transformers' continuous batching, without gathering keys and values.

A cache keeps the keys of a layer in pages of rows, and a step of generation lists for every
request the rows to read, its own new ones among them. heed writes the new keys and values where
Transformers would, makes a page table of the list once per step, and reads the pages where they
lie.

The cache of a layer with a window is a ring: a prompt that goes on overwrites rows that its own
first queries still see. Only there, and only where a request has several new tokens, are keys
gathered, at most a window for each request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import attention


class Step(NamedTuple):
    """What one step of generation says about its requests, for all layers.

    The fields named `by_kind` are a dict of layer kinds ("full_attention", "sliding_attention") or
    the value of the only kind; lists have an element for each group of layers.
    """

    cu_seqlens_q: Tensor  # int32 [requests + 1]
    cu_seqlens_k: dict[str, Tensor] | Tensor  # by_kind, int32 [requests + 1]
    max_seqlen_q: int
    max_seqlen_k: dict[str, int] | int  # by_kind
    read_index: list[Tensor]  # rows of keys, request after request; empty if nothing was cached
    write_index: list[Tensor]  # rows of the new keys, [tokens]
    block_table: Tensor | None  # int32 [groups, requests, pages], instead of the two lists


class LayerCache(NamedTuple):
    """Where the cache keeps one layer."""

    group: int
    k: Tensor  # [pages, page_size, heads, head_dim]
    v: Tensor
    window: int | None  # rows of the ring of a request
    trash: int  # a row that nothing reads

    @property
    def kind(self) -> str:
        return "full_attention" if self.window is None else "sliding_attention"


def layer_cache(cache: object, layer: int) -> LayerCache:
    """One layer of a PagedAttentionCache."""
    if hasattr(cache, "layer_to_allocator"):
        own = cache.layer_to_allocator[layer]
        window = getattr(own, "sliding_window", None)
        return LayerCache(own.index, *own._kv_page_views[layer], window, own.write_trash_index)
    if hasattr(cache, "layer_index_to_group_indices"):  # before Transformers 5.18
        group, index = cache.layer_index_to_group_indices[layer]
        k, v = (
            rows[index].unflatten(0, (-1, cache.block_size))
            for rows in (cache.key_cache, cache.value_cache)
        )
        window = cache.sliding_windows[layer]
        if window != 1:  # how these releases say that there is none
            # Up to 5.15 they read a full ring without its newest key.
            raise NotImplementedError(
                f"sliding_window = {window} is not supported in continuous batching of "
                f"Transformers {transformers.__version__}: install 5.18 or newer"
            )
        return LayerCache(group, k, v, None, -1)
    raise NotImplementedError(
        f"cache = {type(cache).__name__} is not supported by heed: it must be the "
        "PagedAttentionCache of Transformers 5.4 or newer"
    )


def attend(
    own: LayerCache, step: Step, q: Tensor, k: Tensor, v: Tensor, window: int | None, **scores
) -> Tensor:
    """Writes the new k and v [tokens, heads, head_dim]; attends from q over all keys of a request.

    `scores` are arguments of `heed.attention`. Tokens past the last request are padding: their rows
    of the result are 0.
    """
    cu_q = step.cu_seqlens_q
    cu_k, max_k = (_of_kind(x, own.kind) for x in (step.cu_seqlens_k, step.max_seqlen_k))
    left = None if window is None else window - 1
    if step.block_table is not None:
        num_pages, page_size = own.k.shape[:2]
        pages = _once_per_step(
            _listed_pages, step.block_table, cu_k, own.group, num_pages, page_size, own.trash
        )
        _write(own, pages.new_rows, k, v)
        return _decode(q, own.k, own.v, pages, left, scores)

    read, write = step.read_index[own.group], step.write_index[own.group]
    packed = {
        "left": left,
        "right": 0,
        "cu_seqlens_q": cu_q,
        "max_seqlen_q": step.max_seqlen_q,
        **scores,
    }
    if read.numel() == 0:
        _write(own, write, k, v)
        return attention(q, k, v, cu_seqlens_k=cu_k, max_seqlen_k=max_k, **packed)
    decodes = step.max_seqlen_q == 1 and q.shape[0] == cu_q.shape[0] - 1
    if own.window is None:
        _write(own, write, k, v)
        pages = _once_per_step(_pages, read, cu_k, own.k.shape[1], max_k)
        if decodes:
            return _decode(q, own.k, own.v, pages, left, scores)
        return attention(q, own.k, own.v, seqused_k=pages.lengths, page_table=pages.table, **packed)
    if decodes:
        _write(own, write, k, v)
        # Rows of a ring are not in order and need no order: one query sees all of them.
        rows = _once_per_step(_ring_rows, read, cu_k, write, max_k)
        k, v = (x.flatten(0, 1)[:, None] for x in (own.k, own.v))  # pages of one row
        return _decode(q, k, v, rows, None, scores)
    place = _once_per_step(_places_of_new, read, cu_k, cu_q, k.shape[0])
    packed_k, packed_v = (
        cached.flatten(0, 1).index_select(0, read).index_copy_(0, place, new)
        for cached, new in ((own.k, k), (own.v, v))
    )
    _write(own, write, k, v)
    return attention(q, packed_k, packed_v, cu_seqlens_k=cu_k, max_seqlen_k=max_k, **packed)


def _of_kind(value: object, kind: str):
    return value[kind] if isinstance(value, dict) else value


def _write(own: LayerCache, rows: Tensor, k: Tensor, v: Tensor) -> None:
    own.k.flatten(0, 1)[rows] = k
    own.v.flatten(0, 1)[rows] = v


class _Pages(NamedTuple):
    table: Tensor  # int32 [requests, pages]
    lengths: Tensor  # int32 [requests]
    new_rows: Tensor | None = None  # int64 [requests]


def _decode(
    q: Tensor, k: Tensor, v: Tensor, pages: _Pages, left: int | None, scores: dict
) -> Tensor:
    """One query for each request, which stands at its last key."""
    out = attention(
        q[:, None],
        k,
        v,
        left=left,
        right=None if left is None else 0,
        seqused_k=pages.lengths,
        page_table=pages.table,
        **scores,
    )
    return out[:, 0]


def _pages(read: Tensor, cu_k: Tensor, page_size: int, max_k: int) -> _Pages:
    """The pages that rows, in order, begin with. -1, which is no page, for rows that begin none."""
    start = torch.arange(0, max(max_k, 1), page_size, device=read.device)
    row = read[(cu_k[:-1, None] + start).clamp(max=read.shape[0] - 1)]
    page = torch.div(row, page_size, rounding_mode="floor")
    table = torch.where(page * page_size == row, page, -1)
    return _Pages(table.to(torch.int32), cu_k.diff().to(torch.int32))


def _ring_rows(read: Tensor, cu_k: Tensor, write: Tensor, max_k: int) -> _Pages:
    """The rows of every request; the last one in `read` stands for the new token."""
    lengths = cu_k.diff()
    key = torch.arange(max(max_k, 1), device=read.device)
    rows = read[(cu_k[:-1, None] + key).clamp(max=read.shape[0] - 1)]
    rows = torch.where(key == lengths[:, None] - 1, write[:, None], rows)
    return _Pages(rows.to(torch.int32), lengths.to(torch.int32))


def _listed_pages(
    tables: Tensor, cu_k: Tensor, group: int, num_pages: int, page_size: int, trash: int
) -> _Pages:
    """The pages of a block table, and the row of the last key of each request, the new one.

    A request without a key is padding and writes to the trash, and so does a request whose table
    has no page for its last key.
    """
    table, lengths = tables[group], cu_k.diff().to(torch.int32)
    last = lengths.long() - 1
    at = torch.div(last, page_size, rounding_mode="floor")
    page = table.gather(1, at.clamp(0, table.shape[1] - 1)[:, None])[:, 0].long()
    has_page = (last >= 0) & (at < table.shape[1]) & (page >= 0) & (page < num_pages)
    new_rows = torch.where(has_page, page * page_size + last % page_size, trash)
    return _Pages(table, lengths, new_rows)


def _places_of_new(read: Tensor, cu_k: Tensor, cu_q: Tensor, tokens: int) -> Tensor:
    """Where new tokens stand among the packed keys: behind the cached ones of their request."""
    token = torch.arange(tokens, dtype=cu_q.dtype, device=cu_q.device)
    end = torch.searchsorted(cu_q, token, right=True).clamp(max=cu_q.shape[0] - 1)
    return token.long() + (cu_k - cu_q)[end]


# First tensor of the arguments -> (function, state of the arguments, result)
_KNOWN = WeakTensorKeyDictionary()


def _once_per_step(function: Callable, first: Tensor, *rest):
    """function(first, *rest), which the layers of a step share.

    Transformers makes new views of its buffers for every step and writes into the buffers in place,
    so a tensor and its version name a step: the other tensors in `rest` are of the same step. What
    a CUDA graph computed is for this graph only.
    """
    if first.is_inference():  # has no version
        return function(first, *rest)
    capturing = first.is_cuda and torch.cuda.is_current_stream_capturing()
    numbers = [x for x in rest if not isinstance(x, Tensor)]
    state = (first._version, capturing, *numbers)
    known = _KNOWN.get(first)
    if known is None or known[0] is not function or known[1] != state:
        known = (function, state, function(first, *rest))
        _KNOWN[first] = known
    return known[2]
