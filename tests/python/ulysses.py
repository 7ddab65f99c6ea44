"""DeepSpeed's Ulysses around "heed": the real one, or where it is missing the same for tests.

What stands in for it has the names by which heed knows it, and exchanges tokens and heads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PACKAGE = "deepspeed.runtime.sequence_parallel"
INSTALLED = importlib.util.find_spec("deepspeed") is not None


@contextlib.contextmanager
def registered(model, batch: int) -> Iterator[None]:
    """All processes are one group."""
    if INSTALLED:
        groups = _register(model, batch)
    else:
        _stand_in()
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["heed"]
        if INSTALLED:
            groups._SEQUENCE_PARALLEL_GROUP = groups._SEQUENCE_DATA_PARALLEL_GROUP = None


def _register(model, batch: int) -> types.ModuleType:
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    UlyssesSPAttentionHF.register_with_transformers(
        model,
        core_attn_implementation="heed",
        sequence_parallel_size=dist.get_world_size(),
        micro_batch_size=batch,
    )
    return parallel_state_sp


def _stand_in() -> None:
    core, size = ALL_ATTENTION_FUNCTIONS["heed"], dist.get_world_size()

    def exchange(x: Tensor) -> Tensor:
        x = x.contiguous()
        return all_to_all_single(torch.empty_like(x), x)

    def attend(module, query, key, value, attention_mask, **options):
        ids = [torch.empty_like(options["position_ids"]) for _ in range(size)]
        dist.all_gather(ids, options["position_ids"].contiguous())
        options["position_ids"] = torch.cat(ids, dim=1)
        parts = (x.unflatten(1, (size, -1)).movedim(1, 0) for x in (query, key, value))
        whole = [exchange(x).movedim(0, 2).flatten(2, 3) for x in parts]
        out, _ = core(module, *whole, None, **options)
        out = exchange(out.unflatten(1, (size, -1)).movedim(1, 0))
        return out.permute(1, 2, 0, 3, 4).flatten(2, 3), None

    attend.__module__ = f"{_PACKAGE}.ulysses_sp"
    groups = types.ModuleType(f"{_PACKAGE}.parallel_state_sp")
    groups.get_sequence_parallel_world_size = dist.get_world_size
    groups.get_sequence_parallel_rank = dist.get_rank
    sys.modules[groups.__name__] = groups
    ALL_ATTENTION_FUNCTIONS["heed"] = attend
