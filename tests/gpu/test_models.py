"""Transformers on the GPU: heed's functions never wait, and compiled decoding decodes the same."""

from __future__ import annotations

import pytest
import torch
from gpu import GPU, no_synchronisation
from transformers import AttentionInterface, AttentionMaskInterface

import heed.transformers
from device import moved
from generation import assert_same_tokens, cast, greedy, skip_impossible
from heed import ops
from models import MODELS, available, build

DECODERS = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "llama4_text", "gpt_oss")
GENERATING = (*DECODERS, "gemma3", "paligemma", "t5", "bart")


@pytest.fixture
def strict(monkeypatch) -> dict[str, int]:
    """Every synchronisation raises in attention, its backward and the making of masks.

    Elsewhere models and `generate` synchronise by themselves: on counts of image tokens, on the
    tokens of each expert, on whether all sequences have ended.
    """
    calls = {"attention": 0, "mask": 0, "backward": 0}

    def within(name: str, function):
        def call(*arguments, **options):
            calls[name] += 1
            with no_synchronisation():
                return function(*arguments, **options)

        return call

    for name, registry, function in (
        ("attention", AttentionInterface, heed.transformers.attention_forward),
        ("mask", AttentionMaskInterface, heed.transformers.key_interval_mask),
    ):
        monkeypatch.setitem(registry._global_mapping, "heed", within(name, function))
    monkeypatch.setattr(ops, "_gradients", within("backward", ops._gradients))
    return calls


@pytest.mark.parametrize(
    ("name", "padding"), [(name, padding) for name in MODELS for padding in MODELS[name].paddings]
)
def test_forward_and_backward_do_not_wait(name: str, padding: str, strict: dict) -> None:
    tiny = available(name)
    model = build(tiny, "heed", dtype=torch.bfloat16, device=GPU)
    result = model(**cast(moved(tiny.inputs(padding), GPU), torch.bfloat16))
    sum(result[output].float().sum() for output in tiny.outputs).backward()
    assert strict["attention"] and strict["backward"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", GENERATING)
def test_generation_does_not_wait(name: str, padding: str, cache: str, strict: dict) -> None:
    tiny = available(name)
    skip_impossible(name, cache)
    model = build(tiny, "heed", dtype=torch.bfloat16, device=GPU)
    inputs = moved(tiny.inputs(padding), GPU)
    arguments = {"cache_implementation": "static"} if cache == "static" else {}
    greedy(model, inputs, **arguments, disable_compile=True)
    assert strict["attention"] >= 20 and (strict["mask"] or name == "t5")


@pytest.mark.parametrize("positions", [False, True])
def test_packed_training_does_not_wait(positions: bool, strict: dict) -> None:
    """Documents by restarting positions, with and without a cache object, and by lengths."""
    model = build(available("mistral"), "heed", dtype=torch.bfloat16, device=GPU)
    ids = torch.randint(3, 60, (1, 24), device=GPU)
    restarting = torch.cat([torch.arange(n) for n in (5, 9, 10)])[None].to(GPU)
    ends = torch.tensor([0, 5, 14, 24], dtype=torch.int32, device=GPU)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    lengths |= {"max_length_q": torch.tensor(10, device=GPU), "max_length_k": 10}
    for use_cache in (False, True):
        more = {} if positions else lengths
        result = model(ids, position_ids=restarting, use_cache=use_cache, **more)
        result.logits.float().sum().backward()
    assert strict["attention"] and strict["backward"]


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_compiled_decoding(name: str, padding: str) -> None:
    """A static cache, as `generate` compiles it by itself on a GPU: CUDA graphs, full graph."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    tiny = available(name)
    inputs = moved(tiny.inputs(padding), GPU)
    model = build(tiny, "heed", dtype=torch.float16, device=GPU)
    compiled = greedy(model, inputs, cache_implementation="static")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    eager = greedy(build(tiny, "eager", device=GPU), inputs)
    for other in (eager, greedy(model, inputs)):
        assert_same_tokens(compiled, other, torch.float16)
