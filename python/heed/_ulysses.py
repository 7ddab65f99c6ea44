"""Attention whose heads are spread over processes, and DeepSpeed's Ulysses, which does it.

Ulysses puts a function of its own in the place of "heed" in Transformers' registry. It hands heed
all tokens of some heads, the position_ids of all tokens, s_aux of all heads, and never a mask.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from heed import _masks

_PACKAGE = "deepspeed.runtime.sequence_parallel"
# What a layer that gets no mask says by is_causal, sliding_window and position_ids.
_SAID_BY_LAYERS = (
    "causal_mask_function",
    "sliding_window_overlay",
    "packed_sequence_mask_function",
)
_INNER = {"and_masks": "mask_functions", "remap_positions_for_packed_sequence": "mask_function"}


def is_active() -> bool:
    """Whether DeepSpeed's function stands between the models of "heed" and heed."""
    return getattr(ALL_ATTENTION_FUNCTIONS["heed"], "__module__", "") == f"{_PACKAGE}.ulysses_sp"


def local_sink(sink: Tensor, heads: int) -> Tensor:
    """The sinks [heads] of this process's query heads, from those of the model's layer."""
    if hasattr(sink, "to_local"):  # a DTensor, of a plan that shards it but not its module
        sink = sink.to_local()
    if sink.ndim != 1 or sink.shape[0] <= heads:
        return sink
    if is_active():
        groups = sys.modules[f"{_PACKAGE}.parallel_state_sp"]
        if sink.shape[0] == heads * groups.get_sequence_parallel_world_size():
            return sink.narrow(0, groups.get_sequence_parallel_rank() * heads, heads)
    raise ValueError(
        f"s_aux.shape = {list(sink.shape)} must be [{heads}], one sink for each head of query: "
        "where the heads of a layer are spread over processes, its sinks must be too (a rule for "
        '"layers.*.self_attn.sinks" in the tp_plan)'
    )


def check_mask(
    function: Callable, q_length: int, kv_length: int, padding_mask: Tensor | None
) -> None:
    """Refuses, before DeepSpeed drops it, a mask that the layers do not know without it."""
    if q_length != kv_length:
        raise NotImplementedError(
            f"{q_length} queries of {kv_length} keys are not supported by DeepSpeed's Ulysses, "
            "which drops the masks that generation needs: generate in a process without it"
        )
    if not _said_by_layers(function, padding_mask):
        name, _ = _masks.name_and_closure(function)
        padded = "" if padding_mask is None else " with an attention_mask"
        raise NotImplementedError(
            f"the mask of this model ({name}{padded}) is not supported with DeepSpeed's Ulysses, "
            "which drops it: causal masks, sliding windows and packed documents need none"
        )


def _said_by_layers(function: Callable, padding_mask: Tensor | None) -> bool:
    name, free = _masks.name_and_closure(function)
    if name == "bidirectional_mask_function":
        return padding_mask is None
    if name in _INNER:
        inner = free[_INNER[name]]
        inner = inner if isinstance(inner, (tuple, list)) else (inner,)
        return all(_said_by_layers(part, padding_mask) for part in inner)
    return name in _SAID_BY_LAYERS
