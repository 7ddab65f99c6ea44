"""Registers "paged|heed" for Transformers' continuous batching.

Until 5.18 Transformers puts "paged|" before the name of a model's attention while it serves it,
and so finds what is registered here. Later releases have no such names: they take "paged|heed" for
"heed", and then refuse every name that is not on a list of their own. There, and only there, two
functions of Transformers are wrapped: the one with this list, and the one that gives block tables
to a list of names. While such a release serves a model of "heed", its attention is "paged_heed".

No mask function has these names: Transformers then makes no mask, and the lengths say it all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from transformers import AttentionInterface

_SERVED = "paged_heed"


def register(attention_forward: Callable) -> None:
    """Makes continuous batching call attention_forward for models of "heed"."""
    if "paged|sdpa" in AttentionInterface():
        AttentionInterface.register("paged|heed", attention_forward)
        return
    try:
        from transformers.generation.continuous_batching import continuous_api, initialization
    except ImportError:  # before Transformers 5.0
        return
    AttentionInterface.register(_SERVED, attention_forward)
    _wrap(continuous_api.ContinuousBatchingManager, "switch_to_cb_friendly_attn", _switch)
    _wrap(initialization, "ensure_decode_fast_path_is_available", _offer_block_tables)


def run_server(arguments: list[str]) -> None:
    """`transformers serve` with these arguments, and with models of "heed" unless they say other.

    Its manager of models has a closed list of names too, which this process does without.
    """
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.transformers import app

    _wrap(ModelManager, "_validate_args", _allow_heed)
    if not any(argument.startswith("--attn-implementation") for argument in arguments):
        arguments = [*arguments, "--attn-implementation", "heed"]
    app(args=["serve", *arguments], prog_name="python -m heed")


def _allow_heed(original: Callable, models: object) -> None:
    name = models.attn_implementation
    models.attn_implementation = None if name in ("heed", "paged|heed") else name
    try:
        original(models)
    finally:
        models.attn_implementation = name


def _wrap(owner: object, name: str, wrapper: Callable) -> None:
    """owner.name(...) becomes wrapper(the function that it was, ...), where there is one."""
    original = getattr(owner, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def _switch(original: Callable, manager: object, model: object, *args, **kwargs) -> None:
    name = model.config._attn_implementation
    if name == "heed":
        model.set_attn_implementation(_SERVED)
        manager._original_attn_impl = name  # which stop() goes back to
    elif name != _SERVED:
        original(manager, model, *args, **kwargs)


def _offer_block_tables(original: Callable, config: object, cb_config: object, *args) -> None:
    from transformers.generation.continuous_batching import initialization

    kinds = initialization.group_layers_by_attn_type(config)
    allocators = initialization.ATTN_TYPE_TO_ALLOCATOR
    served = config._attn_implementation == _SERVED
    if not served or not all(allocators[kind].supports_block_table for kind in kinds):
        original(config, cb_config, *args)
