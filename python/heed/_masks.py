"""Transformers' composed mask functions as one interval of keys per query row.

Transformers describes a mask as a tree of small Python functions of (batch, head, query, key).
Each function in `_LEAVES` leaves every query row one interval of keys, so a tree of them is read
instead of evaluated. One operation makes the mask of a band, the most common tree; a few tensor
operations of size [batch, seqlen] make that of any other. No value reaches the host.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import NamedTuple

import torch
from packaging.version import Version
from torch import Tensor
from torch.nn import functional
from transformers import masking_utils

# First and end position of the keys that each row sees, int64 [batch or 1, seqlen_q]; none if
# first >= end.
Interval = tuple[Tensor, Tensor]

_FAR = 1 << 30  # beyond every position
_KEYS_PER_ROW = 64


def encode(interval: Interval, valid: Tensor | None, batch: int) -> Tensor:
    """Packs slot intervals and key validity [batch, seqlen_k] into int32 [batch, 1, rows, 2].

    A 4-D tensor is "already prepared" for every model and moves and splits like any other; int32
    tells it from a user's bool or float mask. The first seqlen_q rows are (first, end); with a
    padding mask, each row after them holds the validity bits of 64 keys.
    """
    rows = torch.stack(torch.broadcast_tensors(*interval), dim=-1).to(torch.int32)
    rows = rows.expand(batch, -1, -1)
    if valid is not None:
        rows = torch.cat((rows, _bits(valid)), dim=1)
    return rows[:, None]


def _bits(valid: Tensor) -> Tensor:
    """Bit (key % 32) of word (key / 32), two int32 words a row: [batch, ceil(keys / 64), 2]."""
    padded = functional.pad(valid, (0, -valid.shape[-1] % _KEYS_PER_ROW))
    place = torch.arange(32, dtype=torch.int32, device=valid.device)
    return (padded.unflatten(-1, (-1, 2, 32)).int() << place).sum(-1, dtype=torch.int32)


def check(mask: Tensor, seqlen_q: int, seqlen_k: int) -> None:
    """Refuses an int32 mask that `encode` cannot have made for these lengths."""
    _, _, rows, two = mask.shape
    bit_rows = rows - seqlen_q
    if two != 2 or (bit_rows != 0 and bit_rows * _KEYS_PER_ROW < seqlen_k):
        raise ValueError(
            f"attention_mask = int32 {list(mask.shape)} is not a mask that heed made for "
            f"{seqlen_q} queries and {seqlen_k} keys; a mask of your own must be a bool or float "
            "tensor [batch, heads or 1, seqlen_q, seqlen_k]"
        )


def decode(mask: Tensor, seqlen_q: int, seqlen_k: int) -> tuple[Tensor, Tensor | None]:
    """Splits a mask of `encode` into intervals [batch, seqlen_q, 2] and key bits [batch, words]."""
    check(mask, seqlen_q, seqlen_k)
    rows = mask[:, 0]
    bits = rows[:, seqlen_q:].flatten(1) if rows.shape[1] > seqlen_q else None
    return rows[:, :seqlen_q], bits


def valid_keys(padding_mask: Tensor, kv_offset: int | Tensor, kv_length: int) -> Tensor:
    """The padding mask of the key slots [batch, kv_length]; slots past its end are not valid."""
    known = padding_mask.shape[-1]
    position = torch.arange(kv_length, device=padding_mask.device) + kv_offset
    return padding_mask.bool()[:, position.clamp(max=known - 1)] & (position < known)


def slot_interval(
    interval: Interval, valid: Tensor | None, kv_offset: int | Tensor, kv_length: int
) -> Interval:
    """From positions to key slots, without the slots before and after all valid keys."""
    first, end = (bound - kv_offset for bound in interval)
    if valid is None:
        return first.clamp(min=0), end.clamp(max=kv_length)
    before = valid.int().argmax(-1, keepdim=True)
    after = valid.int().flip(-1).argmax(-1, keepdim=True)
    return torch.maximum(first, before), torch.minimum(end, kv_length - after)


def hide_rows(interval: Interval, shown: Tensor) -> Interval:
    """The interval of a row where `shown` [batch, seqlen_q] is true, and none where it is not."""
    return tuple(torch.where(shown, bound, 0) for bound in interval)


def restarting_documents(mask: Tensor | None, seqlen_q: int, position_ids: Tensor) -> Tensor:
    """Mask int32 [batch, 1, rows, 2] of documents, in `mask`; of several rows only without one.

    They start at the lowest position and where positions go back, but not where one repeats, which
    those of image tokens do. A row that has padding is one document, as in FlashAttention's path.
    """
    position_ids = position_ids.reshape(-1, seqlen_q)
    goes_back = position_ids.diff(dim=-1, prepend=position_ids[:, :1]) < 0
    starts = (position_ids == position_ids.amin(-1, keepdim=True)) | goes_back
    if mask is not None and mask.dtype == torch.int32:
        _, key_bits = decode(mask, seqlen_q, seqlen_q)
        if key_bits is not None:
            unpadded = _bits(torch.ones_like(starts)).flatten(1)
            starts = starts & (key_bits[:, : unpadded.shape[1]] == unpadded).all()
    document = starts.cumsum(-1)
    first = torch.searchsorted(document, document)
    return _cut(mask, (first, torch.searchsorted(document, document, right=True)))


def listed_documents(
    mask: Tensor | None, seqlen_q: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """Mask int32 [1, 1, rows, 2] of documents of these cumulative lengths, in `mask`."""
    row = torch.arange(seqlen_q, dtype=cu_seqlens_q.dtype, device=cu_seqlens_q.device)
    end = torch.searchsorted(cu_seqlens_q, row, right=True).clamp(max=cu_seqlens_q.shape[0] - 1)
    return _cut(mask, (cu_seqlens_k[end - 1][None], cu_seqlens_k[end][None]))


def _cut(mask: Tensor | None, documents: Interval) -> Tensor:
    if mask is None or mask.dtype != torch.int32:
        return encode(documents, None, documents[0].shape[0])
    rows, bits = mask.split((documents[0].shape[-1], mask.shape[2] - documents[0].shape[-1]), dim=2)
    seen = intersect(documents, rows[:, 0].unbind(-1))
    return torch.cat((encode(seen, None, 1), bits), dim=2)


def intersect(a: Interval, b: Interval) -> Interval:
    """The keys in both intervals."""
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])


def unite(a: Interval, b: Interval) -> Interval:
    """The keys in either of two intervals that overlap, or of which one is empty."""
    a_empty, b_empty = a[0] >= a[1], b[0] >= b[1]
    first = torch.where(a_empty, b[0], torch.where(b_empty, a[0], torch.minimum(a[0], b[0])))
    end = torch.where(a_empty, b[1], torch.where(b_empty, a[1], torch.maximum(a[1], b[1])))
    return first, end


class Band(NamedTuple):
    """Keys position - left to position + right, of the chunk that `position` is in; -1: no limit.

    Chunks of `chunk` keys begin at position 0, or at `chunk_start` [batch].
    """

    left: int = -1
    right: int = -1
    chunk: int = 0
    chunk_start: Tensor | None = None


def read_band(function: Callable) -> Band | None:
    """The band that `function` lets every position see, or None for another tree."""
    name, free = name_and_closure(function)
    if name == "causal_mask_function":
        return Band(right=0)
    if name == "bidirectional_mask_function":
        return Band()
    if name == "and_masks":
        left, right, chunk, chunk_start = Band()
        for part in free["mask_functions"]:
            band = read_band(part)
            if band is None or (chunk and band.chunk):
                return None
            left, right = _lower(left, band.left), _lower(right, band.right)
            chunk, chunk_start = (chunk, chunk_start) if chunk else (band.chunk, band.chunk_start)
        return Band(left, right, chunk, chunk_start)
    if (name, *sorted(free)) not in _LEAVES:
        return None
    if name == "sliding_window_overlay" and free["sliding_window"] > 0:
        return Band(left=free["sliding_window"] - 1)
    if name == "sliding_window_bidirectional_overlay" and free["sliding_window"] >= 0:
        return Band(left=free["sliding_window"], right=free["sliding_window"])
    if name == "chunked_overlay" and free["chunk_size"] > 0:
        return Band(chunk=free["chunk_size"], chunk_start=free.get("left_padding"))
    return None


def _lower(a: int, b: int) -> int:
    """The tighter of two limits."""
    return max(a, b) if a < 0 or b < 0 else min(a, b)


def read_tree(function: Callable, query: Tensor, padding_mask: Tensor | None) -> Interval | None:
    """The keys that `function` lets each position of `query` see, or None for an unknown tree.

    Every leaf is empty or contains the query's own position, and so does every intersection and
    union of leaves: two intervals that are not empty overlap, which is what `unite` needs.
    """
    name, free = name_and_closure(function)
    if name in ("and_masks", "or_masks"):
        parts = [read_tree(part, query, padding_mask) for part in free["mask_functions"]]
        if any(part is None for part in parts):
            return None
        result = parts[0]
        for part in parts[1:]:
            result = intersect(result, part) if name == "and_masks" else unite(result, part)
        return result
    if name == "remap_positions_for_packed_sequence":
        # Within a document, and it is intersected with one, position and slot differ by a constant.
        position = free["position_ids"]
        inner = read_tree(free["mask_function"], position, padding_mask)
        return None if inner is None else tuple(bound + (query - position) for bound in inner)
    leaf = _LEAVES.get((name, *sorted(free)))
    return None if leaf is None else leaf(query, padding_mask, **free)


def is_causal(function: Callable) -> bool:
    """Whether one of the tree's functions is the causal one, which Transformers composes for
    self-attention only."""
    name, free = name_and_closure(function)
    if "mask_functions" in free:
        return any(is_causal(part) for part in free["mask_functions"])
    if "mask_function" in free:
        return is_causal(free["mask_function"])
    return name == "causal_mask_function"


def name_and_closure(function: Callable) -> tuple[str, dict]:
    """A function of Transformers' masking_utils by its name, or that of the function which made it,
    and its free variables; ("", {}) for others."""
    code = getattr(function, "__code__", None)
    name, free = _name_of(code), {}
    if name and code.co_freevars:
        cells = None
        if _CLOSURES_ARE_HIDDEN and torch.compiler.is_dynamo_compiling():
            from torch._dynamo.comptime import comptime

            comptime(_show_closure)
        if cells is None:
            cells = function.__closure__
        for index in range(len(code.co_freevars)):
            free[code.co_freevars[index]] = cells[index].cell_contents
    return name, free


@torch.compiler.assume_constant_result
def _name_of(code: CodeType | None) -> str:
    return _NAMES.get(code, "")


# Dynamo of these releases has no __closure__ for a function that was made in what it traces.
_CLOSURES_ARE_HIDDEN = Version(torch.__version__) < Version("2.14")


def _show_closure(context) -> None:
    """Gives `cells`, in the caller that Dynamo traces, the closure that it knows of `function`."""
    variables = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().symbolic_locals
    closure = getattr(variables["function"], "closure", None)
    if closure is not None:
        variables["cells"] = closure


def _names() -> dict[CodeType, str]:
    names = {}
    for function in vars(masking_utils).values():
        if getattr(function, "__module__", "") == masking_utils.__name__:
            code = getattr(inspect.unwrap(function), "__code__", None)
            if code is not None:
                inner = (x for x in code.co_consts if isinstance(x, CodeType))
                names |= dict.fromkeys((code, *inner), function.__name__)
    return names


# Every function of masking_utils, and those that it makes, by their code: Dynamo knows the code of
# each, but of some neither the module nor the qualified name.
_NAMES = _names()


def _causal(query: Tensor, padding_mask: Tensor | None) -> Interval:
    return torch.full_like(query, -_FAR), query + 1


def _bidirectional(query: Tensor, padding_mask: Tensor | None) -> Interval:
    return torch.full_like(query, -_FAR), torch.full_like(query, _FAR)


def _window(query: Tensor, padding_mask: Tensor | None, sliding_window: int) -> Interval:
    return query - sliding_window + 1, torch.full_like(query, _FAR)


def _two_sided_window(query: Tensor, padding_mask: Tensor | None, sliding_window: int) -> Interval:
    return query - sliding_window, query + sliding_window + 1


def _chunk(
    query: Tensor,
    padding_mask: Tensor | None,
    chunk_size: int,
    left_padding: Tensor | None = None,
) -> Interval:
    start = 0 if left_padding is None else left_padding[:, None]
    first = (query - start) // chunk_size * chunk_size + start
    return first, first + chunk_size


def _document(query: Tensor, padding_mask: Tensor | None, packed_sequence_mask: Tensor) -> Interval:
    counts = torch.ones_like(packed_sequence_mask, dtype=torch.bool)
    return _run_of(packed_sequence_mask, counts, query)


def _block(query: Tensor, padding_mask: Tensor | None, block_sequence_ids: Tensor) -> Interval:
    counts = block_sequence_ids >= 0
    in_block = counts.gather(-1, query.expand(counts.shape[0], -1))
    if padding_mask is not None:
        counts = counts & valid_keys(padding_mask, 0, counts.shape[-1])
    first, end = _run_of(block_sequence_ids, counts, query)
    return first, torch.where(in_block, end, first)


def _run_of(ids: Tensor, counts: Tensor, query: Tensor) -> Interval:
    """The run of equal ids [batch, positions] around each query: all keys of that id that count."""
    run = functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0)).cumsum(-1)
    none = torch.iinfo(ids.dtype).min
    sorted_ids, order = torch.where(counts, ids, none).sort(dim=-1, stable=True)
    same_id = (sorted_ids.diff(dim=-1) == 0) & (sorted_ids[:, 1:] != none)
    other_run = run.gather(-1, order).diff(dim=-1) != 0
    torch._assert_async(
        ~(same_id & other_run).any(),
        "block_sequence_ids: an id that returns after another id is no interval of keys; "
        "load the model with attn_implementation='sdpa'",  # inductor puts no \ before a "
    )
    own = run.gather(-1, query.expand(ids.shape[0], -1))
    return torch.searchsorted(run, own), torch.searchsorted(run, own, right=True)


# By name and free variables, so that a function that changes in Transformers is no longer known.
_LEAVES: dict[tuple[str, ...], Callable[..., Interval]] = {
    ("causal_mask_function",): _causal,
    ("bidirectional_mask_function",): _bidirectional,
    ("sliding_window_overlay", "sliding_window"): _window,
    ("sliding_window_bidirectional_overlay", "sliding_window"): _two_sided_window,
    ("chunked_overlay", "chunk_size"): _chunk,
    ("chunked_overlay", "chunk_size", "left_padding"): _chunk,
    ("packed_sequence_mask_function", "packed_sequence_mask"): _document,
    ("blockwise_overlay", "block_sequence_ids"): _block,
}
