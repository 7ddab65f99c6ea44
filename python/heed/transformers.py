"""Registers "heed" and "paged|heed" in Transformers; importing this module does it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from heed import _masks, _paged_cache, _serving, attention, ops

OLDEST, NEWEST, BEYOND = "4.53.0", "5.23.0", "6.0.0"

try:
    import transformers
    from packaging.version import Version
except ImportError as error:
    raise ImportError(
        f"heed.transformers needs Transformers {OLDEST} or newer: pip install transformers"
    ) from error

if not Version(OLDEST) <= Version(transformers.__version__) < Version(BEYOND):
    raise ImportError(
        f"transformers = {transformers.__version__} is not supported by heed: it must be {OLDEST} "
        f"or newer and older than {BEYOND} (tested up to {NEWEST})"
    )

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

from heed import _ulysses  # noqa: E402

# Arguments that change the result and that heed does not compute, each with the way out.
_EAGER = 'load the model with attn_implementation="eager"'
_SDPA = 'load the model with attn_implementation="sdpa"'
_PAGED_EAGER = 'load the model with attn_implementation="paged|eager"'
_PAGED = 'generate_batch and init_continuous_batching choose "paged|heed" by themselves'
_REFUSED = {
    "output_attentions": _EAGER,
    "head_mask": _EAGER,
    "layer_head_mask": _EAGER,
    "alibi": "add the slopes to a float attention_mask",
    "attention_similarity": _EAGER,
    "sinks": _EAGER,
    "indices": _SDPA,
    "block_indices": _SDPA,
    "cache": _PAGED,
    "block_table": _PAGED,
}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attends from query to key and value [batch, heads, seqlen, head_dim].

    `attention_mask` is what `key_interval_mask` returned or a bool or float mask [batch or 1,
    heads or 1, seqlen_q or 1, seqlen_k] of the user. Returns [batch, seqlen_q, heads, head_dim_v].
    """
    if kwargs:
        _refuse(kwargs)
    batch, heads, seqlen_q, _ = query.shape
    seqlen_k = key.shape[2]
    if s_aux is not None:
        s_aux = _ulysses.local_sink(s_aux, heads)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    left = right = intervals = None
    bias = position_bias
    if attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        left = None if sliding_window is None else sliding_window - 1
        right = 0 if is_causal else left
    elif attention_mask.dtype == torch.int32 and attention_mask.ndim == 4:
        _masks.check(attention_mask, seqlen_q, seqlen_k)
        intervals = attention_mask
    else:
        bias = _bias_of(attention_mask, position_bias, seqlen_q, seqlen_k)

    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if attention_mask is None and position_bias is None:
            out = attention(
                query.flatten(0, 1),  # documents lie one after the other, entry after entry
                key.flatten(0, 1),
                value.flatten(0, 1),
                left=left,
                right=right,
                cu_seqlens_q=cu_seq_lens_q.to(torch.int32),
                cu_seqlens_k=cu_seq_lens_k.to(torch.int32),
                max_seqlen_q=max_length_q,
                max_seqlen_k=max_length_k,
                scale=scaling,
                softcap=softcap or 0.0,
                sink=s_aux,
                dropout_p=dropout,
            )
            return out.unflatten(0, (batch, seqlen_q)), None
        if batch > 1 or not _is_own(attention_mask):
            raise NotImplementedError(
                "cu_seq_lens_q is not supported together with a position_bias, with an "
                "attention_mask of your own or with a padded batch: leave one of the two out"
            )
        intervals = _once_per_forward(
            _masks.listed_documents, attention_mask, seqlen_q, cu_seq_lens_q, cu_seq_lens_k
        )
    elif (  # where FlashAttention's path in Transformers takes restarting positions for documents
        position_ids is not None
        and 1 < seqlen_q == seqlen_k
        and position_ids.ndim <= 2
        and position_ids.numel() in (seqlen_q, batch * seqlen_q)
        and (batch == 1 or (attention_mask is None and _ulysses.is_active()))
        and _is_own(attention_mask)
    ):
        intervals = _once_per_forward(
            _masks.restarting_documents, attention_mask, seqlen_q, position_ids
        )
    out = attention(
        query,
        key,
        value,
        left=left,
        right=right,
        intervals=intervals,
        bias=bias,
        scale=scaling,
        softcap=softcap or 0.0,
        sink=s_aux,
        dropout_p=dropout,
    )
    return out, None


@torch.compiler.disable  # writes into the cache, of which functionalization would make a copy
def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: object = None,
    block_table: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: dict[str, Tensor] | Tensor | None = None,
    read_index: list[Tensor] | None = None,
    write_index: list[Tensor] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attends from the new tokens of many requests, query, key and value [1, heads, tokens,
    head_dim], to these and to what a PagedAttentionCache holds. Returns [1, tokens, heads,
    head_dim]."""
    if cache is None:
        raise ValueError(
            'cache = None must be the cache of continuous batching: "paged|heed" is for '
            'generate_batch, attn_implementation="heed" for everything else'
        )
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(
            'config.is_encoder_decoder = True is not supported by "paged|heed", which serves '
            "decoders without cross-attention: use generate()"
        )
    for name, given in (("attention_mask", attention_mask), ("position_bias", position_bias)):
        if given is not None:
            raise NotImplementedError(f'{name} is not supported by "paged|heed": {_PAGED_EAGER}')
    _refuse(kwargs)
    if s_aux is not None:
        s_aux = _ulysses.local_sink(s_aux, query.shape[1])
    own = _paged_cache.layer_cache(cache, module.layer_idx)
    step = _paged_cache.Step(
        cu_seq_lens_q,
        cu_seq_lens_k,
        *(kwargs.get(f"max_length_{x}", kwargs.get(f"max_seqlen_{x}")) for x in "qk"),
        read_index,
        write_index,
        block_table,
    )
    out = _paged_cache.attend(
        own,
        step,
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        own.window if sliding_window is None else sliding_window,
        scale=scaling,
        softcap=softcap or 0.0,
        sink=s_aux,
        dropout_p=dropout,
    )
    return out[None], None


def _refuse(arguments: dict) -> None:
    for name, value in arguments.items():
        if name in _REFUSED and value is not None and value is not False:
            raise NotImplementedError(f'{name} is not supported by "heed": {_REFUSED[name]}')


def _bias_of(mask: Tensor, position_bias: Tensor | None, seqlen_q: int, seqlen_k: int) -> Tensor:
    """A bool or float mask of the user, or a bool mask of heed as int8, with the bias."""
    if mask.dtype == torch.int8:
        mask = mask.view(torch.bool)
    if mask.ndim != 4 or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(
            f"attention_mask = {mask.dtype} {list(mask.shape)} must be a bool or float tensor "
            f"[batch, heads or 1, {seqlen_q}, {seqlen_k}]"
        )
    mask = mask[..., :seqlen_k]  # made for a whole static cache in some models
    if position_bias is None:
        return mask
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, float("-inf"))
    return position_bias + mask


def _is_own(mask: Tensor | None) -> bool:
    """Made by `key_interval_mask`, and so without knowledge of documents."""
    return mask is None or mask.dtype in (torch.int32, torch.int8)


# First of the tensors -> (function, weak references to the tensors, their versions, result)
_KNOWN = WeakTensorKeyDictionary()


def _once_per_forward(
    function: Callable, mask: Tensor | None, seqlen_q: int, *documents: Tensor
) -> Tensor:
    """function(mask, seqlen_q, *documents), which the layers of a forward pass share.

    A graph must hold the computation itself; `torch.compile` merges the layers' copies of it.
    """
    tensors = documents if mask is None else (mask, *documents)
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or any(t.is_inference() for t in tensors)  # have no version
        or (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing())
    ):
        return function(mask, seqlen_q, *documents)
    versions = [t._version for t in tensors]
    known = _KNOWN.get(tensors[0])
    if (
        known is None
        or known[0] is not function
        or any(reference() is not t for reference, t in zip(known[1], tensors, strict=True))
        or known[2] != versions
    ):
        result = function(mask, seqlen_q, *documents)
        known = (function, [weakref.ref(t) for t in tensors], versions, result)
        _KNOWN[tensors[0]] = known
    return known[3]


def key_interval_mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    **call,
) -> Tensor | None:
    """What the queries see, from the mask function that Transformers composed for them.

    Returns key intervals (`_masks.encode`), or a bool mask [batch, 1, seqlen_q, seqlen_k] where
    `mask_function` is not known, or None where `is_causal` of the layer says it all. In intervals
    of self-attention a query that is padding itself sees nothing, as in FlashAttention's path.
    """
    queries = _Queries(**call)
    if _ulysses.is_active():
        _ulysses.check_mask(mask_function, queries.length, kv_length, attention_mask)
    may_skip = call.get("allow_is_causal_skip", True) or call.get("allow_is_bidirectional_skip")
    name, _ = _masks.name_and_closure(mask_function)
    causal, bidirectional = name == "causal_mask_function", name == "bidirectional_mask_function"
    if attention_mask is None and may_skip:
        if bidirectional or (causal and queries.end_at(kv_offset + kv_length)):
            return None

    # A model that wants a mask which `is_causal` could replace edits it, so it gets a bool one.
    edits = not may_skip and (causal or bidirectional) and call.get("q_length", 1) > 1
    if not edits:
        rows_are_slots = (
            attention_mask is not None
            and queries.are_slots(kv_length, kv_offset)
            and (_masks.is_causal(mask_function) or _is_encoder(call.get("config")))
        )
        # Before Transformers 5.0 the offset of a sliding cache lies on the device.
        band = None if isinstance(kv_offset, Tensor) else _masks.read_band(mask_function)
        if band is not None:
            return ops.make_band_mask(
                attention_mask,
                queries.positions,
                band.chunk_start,
                batch_size,
                queries.length,
                queries.offset,
                kv_length,
                kv_offset,
                band.left,
                band.right,
                band.chunk,
                rows_are_slots,
                queries.device,
            )
        interval = _masks.read_tree(mask_function, queries.all_positions(), attention_mask)
        if interval is not None:
            valid = None
            if attention_mask is not None:
                valid = _masks.valid_keys(attention_mask, kv_offset, kv_length)
            interval = _masks.slot_interval(interval, valid, kv_offset, kv_length)
            if rows_are_slots:
                interval = _masks.hide_rows(interval, valid)
            return _masks.encode(interval, valid, batch_size)

    mask = sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        mask_function=mask_function,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        **call | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )
    # int8 tells `attention_forward` that this is no user's mask, so documents may still cut it.
    return mask if edits or attention_mask is not None else mask.view(torch.int8)


# Packages of Transformers whose models make bidirectional masks for self-attention, and for
# cross-attention only where their config says so. Those of others (SAM 3) do not always say it.
_ENCODERS = frozenset(
    f"transformers.models.{name}"
    for name in (
        "albert bert camembert distilbert electra ernie esm eurobert gte jina_embeddings_v3 "
        "modernbert mt5 nomic_bert roberta roberta_prelayernorm t5 umt5 xlm_roberta "
        "xlm_roberta_xl xmod"
    ).split()
)


def _is_encoder(config: object) -> bool:
    """Whether bidirectional masks of this config's models are of self-attention."""
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return False
    return type(config).__module__.rpartition(".")[0] in _ENCODERS


class _Queries:
    """Where the queries stand: at offset, offset + 1, ..., or where a tensor says.

    `positions` holds that of the first query, for a static cache, or that of each query.
    """

    def __init__(
        self,
        cache_position: Tensor | None = None,
        q_length: int = 0,
        q_offset: int | Tensor = 0,
        device: torch.device | None = None,
        **_,
    ):
        self.positions, self.offset, self.length, self.device = None, 0, q_length, device
        if cache_position is not None:  # Transformers before 5.4
            self.positions, self.device = cache_position, cache_position.device
            self.length = cache_position.shape[0]
        elif isinstance(q_offset, Tensor):
            self.positions = q_offset
        else:
            self.offset = q_offset
        self._listed = cache_position is not None

    def end_at(self, kv_end: int | Tensor) -> bool:
        """Whether the last query is known to stand at the last key."""
        if self._listed:
            return self.length == kv_end
        # A static cache has slots after the last query.
        return self.positions is None and self.offset + self.length == kv_end

    def are_slots(self, kv_length: int, kv_offset: int | Tensor) -> bool:
        """Whether query i of self-attention is known to be the token in key slot i."""
        if isinstance(kv_offset, Tensor) or not (self._listed or self.positions is None):
            return False
        # Listed positions of as many queries as there are slots fill the slots in order.
        return self.length == kv_length and kv_offset == 0 and self.offset == 0

    def all_positions(self) -> Tensor:
        """[1, seqlen_q]"""
        if self._listed:
            return self.positions[None]
        offset = self.offset if self.positions is None else self.positions
        return torch.arange(self.length, device=self.device)[None] + offset


AttentionInterface.register("heed", attention_forward)
AttentionMaskInterface.register("heed", key_interval_mask)
_serving.register(paged_attention_forward)
run_server = _serving.run_server
