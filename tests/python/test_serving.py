""" "paged|heed" in continuous batching against "paged|eager", on tiny random models."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import transformers
from packaging.version import Version

import heed.transformers
from device import DEVICE, EXACT
from heed import _paged_cache
from models import available, build, tokens

if Version(transformers.__version__) < Version("5.4.0"):
    pytest.skip("continuous batching on heed needs Transformers 5.4", allow_module_level=True)

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import cache as cb_cache

pytestmark = pytest.mark.usefixtures("one_thread")

NEEDS_GRAPHS = pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
NEW = 12
FULL, WINDOWED = ("llama", "qwen3", "paligemma"), ("mistral", "gemma3_text", "gemma3", "gpt_oss")
FIELDS = {f.name for f in dataclasses.fields(ContinuousBatchingConfig)}
WINDOWS_WORK = Version(transformers.__version__) >= Version("5.18.0")


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(1, length, seed)[0].tolist()


PROMPTS = [prompt(n, seed) for seed, n in enumerate((5, 17, 1, 30, 11, 8))]


def serve(name: str, attention: str, prompts: list[list[int]], **options):
    """What generate_batch returns for every prompt, from a cache of 64 pages of 4 tokens."""
    model = build(available(name), attention)
    options = {
        "page_size": 4,
        "num_blocks": 64,
        "max_batch_tokens": 64,
        "auto_switch_to_flash": False,
        "return_logprobs": not EXACT,
        **options,
    }
    if "page_size" not in FIELDS:  # its name in older releases
        options["block_size"] = options.pop("page_size")
    generation = GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    try:
        results = model.generate_batch(
            prompts,
            generation_config=generation,
            continuous_batching_config=ContinuousBatchingConfig(
                **{name: x for name, x in options.items() if name in FIELDS}
            ),
        )
    except MemoryError as error:
        pytest.skip(f"this Transformers needs psutil on a CPU: {error}")
    assert model.config._attn_implementation.removeprefix("paged|") == attention.removeprefix(
        "paged|"
    )
    assert len(results) == len(prompts)
    return list(results.values())


@functools.cache
def expected(name: str, first: int = 0, last: int = len(PROMPTS)):
    """Of "paged|eager", with room for everything."""
    return serve(name, "paged|eager", PROMPTS[first:last])


def assert_same(actual: list, wanted: list) -> None:
    """The same tokens; in 16 bits a request may leave the other one where two tokens nearly tie."""
    for got, want in zip(actual, wanted, strict=True):
        assert got.error is None and want.error is None
        if EXACT:
            assert got.generated_tokens == want.generated_tokens
            continue
        steps = (got.generated_tokens, want.generated_tokens, got.logprobs, want.logprobs)
        for token, other, logprob, other_logprob in zip(*steps, strict=True):
            assert abs(logprob - other_logprob) < 0.1
            if token != other:
                break


@torch.no_grad()
def assert_follow_from_their_context(name: str, results: list) -> None:
    """Every token, after the tokens that the result itself has before it, as "eager" sees them in
    float32: its log-probability, and that no other token is clearly more likely."""
    model = build(available(name), "eager", dtype=torch.float32)
    bound = 1e-4 if EXACT else 0.1
    for result in results:
        start, new = len(result.prompt_ids), result.generated_tokens
        ids = torch.tensor([result.prompt_ids + new], device=DEVICE)
        known = model(ids).logits[0, start - 1 : -1].log_softmax(-1).cpu()
        logprobs = known.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert len(new) == NEW and result.error is None
        assert (known.amax(-1) - logprobs).max() <= bound, "not the most likely token"
        assert (torch.tensor(result.logprobs) - logprobs).abs().max() <= bound, "other logits"


@pytest.fixture
def steps(monkeypatch):
    """(kind of layer, requests, longest new part of a request) of every call."""
    recorded = []
    attend = _paged_cache.attend

    def recording(own, step, *arguments, **scores):
        requests = step.cu_seqlens_q.shape[0] - 1
        recorded.append((own.kind, requests, step.max_seqlen_q, step.block_table is not None))
        return attend(own, step, *arguments, **scores)

    monkeypatch.setattr(_paged_cache, "attend", recording)
    return recorded


def skip_broken_windows(name: str) -> None:
    if name in WINDOWED and not WINDOWS_WORK:
        pytest.skip("before Transformers 5.18 a full window loses its newest key")


@pytest.mark.parametrize("name", FULL + WINDOWED)
def test_same_tokens_as_eager(name, steps):
    """Prompts in parts of 9 tokens, between the next tokens of other requests."""
    skip_broken_windows(name)
    assert_same(serve(name, "heed", PROMPTS, max_batch_tokens=9), expected(name))
    assert any(requests > 1 and 1 < longest for _, requests, longest, _ in steps), "mixed"
    assert any(requests > 1 and longest == 1 for _, requests, longest, _ in steps), "decode"
    kinds = {kind for kind, *_ in steps}
    assert ("sliding_attention" in kinds) == (name in WINDOWED)


@pytest.mark.parametrize("graphs", [False, pytest.param(True, marks=NEEDS_GRAPHS)])
@pytest.mark.parametrize("name", [*FULL, *WINDOWED, "gemma2"])
def test_every_token_follows_from_its_context(name, graphs):
    skip_broken_windows("gemma3_text" if name == "gemma2" else name)
    options = {"use_cuda_graph": graphs, "return_logprobs": True}
    results = serve(name, "heed", PROMPTS, max_batch_tokens=9, **options)
    assert_follow_from_their_context(name, results)
    results[2].generated_tokens[5] ^= 1
    with pytest.raises(AssertionError):
        assert_follow_from_their_context(name, results)


@pytest.mark.parametrize("page_size", [5, 16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_page_size(name, page_size):
    skip_broken_windows(name)
    assert_same(serve(name, "heed", PROMPTS, page_size=page_size), expected(name))


def test_softcap_counts():
    """Transformers' "paged|eager" leaves it out, so this one is compared with generate()."""
    skip_broken_windows("gemma3_text")
    model = build(available("gemma2"), "eager")
    for given, got in zip(PROMPTS, serve("gemma2", "heed", PROMPTS), strict=True):
        want = model.generate(
            torch.tensor([given], device=DEVICE),
            generation_config=GenerationConfig(
                max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
        )
        same = got.generated_tokens == want[0, len(given) :].tolist()
        assert same or not EXACT


def test_name_with_prefix():
    assert_same(serve("llama", "paged|heed", PROMPTS[:2]), expected("llama", 0, 2))


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_preemption(name, monkeypatch):
    """A cache in which not all requests fit at a time: some are put off and computed once more."""
    skip_broken_windows(name)
    frees = []
    free = cb_cache.PagedAttentionCache.free_blocks

    def recording(cache, request, *arguments, **options):
        frees.append(request)
        return free(cache, request, *arguments, **options)

    monkeypatch.setattr(cb_cache.PagedAttentionCache, "free_blocks", recording)
    assert_same(serve(name, "heed", PROMPTS, num_blocks=12, max_batch_tokens=42), expected(name))
    assert len(frees) > len(PROMPTS), "no request was put off"


def test_shared_prefixes(monkeypatch):
    matched = []
    search = cb_cache.PagedAttentionCache.search_prefix_match

    def recording(cache, *arguments):
        matched.append(search(cache, *arguments))
        return matched[-1]

    monkeypatch.setattr(cb_cache.PagedAttentionCache, "search_prefix_match", recording)
    shared = prompt(21, seed=9)
    prompts = [shared + more for more in PROMPTS]
    options = {"max_batch_tokens": 24, "num_blocks": 96}
    actual = serve("llama", "heed", prompts, **options)
    assert max(matched) >= 20
    assert_same(actual, serve("llama", "paged|eager", prompts, **options))


@pytest.mark.skipif(
    "paged|sdpa" in transformers.AttentionInterface(),
    reason="this Transformers gives block tables to FlashAttention only",
)
def test_block_tables(steps):
    assert_same(serve("llama", "heed", PROMPTS), expected("llama"))
    assert any(table for *_, table in steps)
    steps.clear()
    assert_same(serve("llama", "heed", PROMPTS, max_blocks_per_request=0), expected("llama"))
    assert not any(table for *_, table in steps)
    steps.clear()  # one request outgrows its table
    actual = serve("llama", "heed", PROMPTS[:3], max_blocks_per_request=6)
    assert_same(actual, expected("llama", 0, 3))
    assert {table for *_, table in steps} == {False, True}


@NEEDS_GRAPHS
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("use_async", [False, True])
def test_cuda_graphs(name, use_async):
    skip_broken_windows(name)
    options = {"use_cuda_graph": True, "use_async_batching": use_async}
    assert_same(serve(name, "heed", PROMPTS, **options), expected(name))


def test_other_models_keep_their_attention():
    """The wrapped functions of Transformers do nothing to a model that is not heed's."""
    assert_same(serve("llama", "sdpa", PROMPTS[:2]), expected("llama", 0, 2))


# ---- what is refused ----


def paged_call(is_encoder_decoder=False, **changes):
    model = build(available("llama"), "eager")
    model.config.is_encoder_decoder = is_encoder_decoder
    q, k = (torch.randn(1, heads, 3, 8, device=DEVICE) for heads in (4, 2))
    arguments = {"attention_mask": None, "cache": object(), **changes}
    return heed.transformers.paged_attention_forward(
        model.model.layers[0].self_attn, q, k, k, **arguments
    )


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"cache": None}, ValueError, "cache = None must be the cache of continuous batching"),
        ({"cache": object()}, NotImplementedError, "cache = object is not supported by heed"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, NotImplementedError, "attention_mask is not"),
        ({"position_bias": torch.ones(1, 1, 3, 3)}, NotImplementedError, "position_bias is not"),
        ({"is_encoder_decoder": True}, NotImplementedError, "config.is_encoder_decoder = True is"),
        ({"output_attentions": True}, NotImplementedError, "output_attentions is not supported"),
    ],
)
def test_refused(changes, error, words):
    with pytest.raises(error, match=words):
        paged_call(**changes)


def test_serve_command_knows_heed():
    """The command's manager of models refuses names that are not on its list."""
    try:
        from transformers.cli.serving import model_manager as serving
    except Exception as error:  # a NameError in some releases
        pytest.skip(f"needs transformers[serving]: {error}")
    from heed import _serving

    class Manager(serving.ModelManager):
        pass

    with pytest.raises(ValueError, match="Unsupported attention implementation: 'heed'"):
        Manager(attn_implementation="heed")
    _serving._wrap(Manager, "_validate_args", _serving._allow_heed)
    assert Manager(attn_implementation="heed").attn_implementation == "heed"
    with pytest.raises(ValueError, match="Unsupported attention implementation: 'other'"):
        Manager(attn_implementation="other")
