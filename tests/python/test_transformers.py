"""heed.transformers against Transformers' eager attention on tiny random models."""

from __future__ import annotations

import runpy

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

import heed.transformers
from models import BATCH, MODELS, SEQLEN, available, build, padding_mask, tokens

NEW_SIGNATURE = Version(transformers.__version__) >= Version("5.4.0")
DECODERS = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "llama4_text", "gpt_oss")


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    def is_float(x):
        return isinstance(x, Tensor) and x.is_floating_point()

    return {name: x.to(dtype) if is_float(x) else x for name, x in inputs.items()}


def outputs_and_gradients(model, inputs: dict, names=("logits",), **arguments):
    """The outputs at positions that are no padding, and the gradient of every parameter."""
    dtype = next(model.parameters()).dtype
    result = model(**cast(inputs, dtype), **arguments)
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    outputs = []
    for name in names:
        output = result[name]
        if mask is not None and output.shape[:2] == mask.shape:
            output = output[mask.bool()]
        outputs.append(output)
    generator = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(dtype)).sum() for x in outputs)
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return dict(zip(names, outputs, strict=True)), gradients


def assert_as_exact_as_eager(actual: dict, eager: dict, exact: dict) -> None:
    """Error at most 1e-5 of the tensor's maximum plus eager's own error."""
    # These add one number to all scores of a row: their gradient is 0 but for rounding errors.
    no_effect = ("k_proj.bias", "key.bias", "rpb_embed_x.layer2.bias", "rpb_embed_y.layer2.bias")
    largest = max(x.abs().max() for x in exact.values())
    for name in exact:
        scale = largest if name.endswith(no_effect) else exact[name].abs().max()
        eager_error = (eager[name].double() - exact[name]).abs().max().item()
        error = (actual[name].double() - exact[name]).abs().max().item()
        assert error <= 1e-5 * scale + eager_error, f"{name}, where eager's is {eager_error:.2e}"


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors as small as these are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler():
    """Models share code, and PyTorch counts its recompilations over all of them."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of heed.attention that Transformers made."""
    recorded = []

    def attention(*tensors, **arguments):
        recorded.append(arguments)
        return heed.attention(*tensors, **arguments)

    monkeypatch.setattr(heed.transformers, "attention", attention)
    return recorded


@pytest.fixture
def float64_masks(monkeypatch):
    """Some models' softmax runs in float32: the lowest float64 would become -inf, and then NaN."""

    def mask(**arguments):
        return eager_mask(**{**arguments, "dtype": torch.float32})

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "eager", mask)


@pytest.mark.usefixtures("float64_masks")
@pytest.mark.parametrize(
    ("name", "padding"), [(name, padding) for name in MODELS for padding in MODELS[name].paddings]
)
def test_outputs_and_gradients(name, padding, calls):
    tiny = available(name)
    inputs = tiny.inputs(padding)
    results = {}
    for kind, attention, dtype in (
        ("heed", "heed", torch.float32),
        ("eager", "eager", torch.float32),
        ("exact", "eager", torch.float64),
    ):
        model = build(tiny, attention, dtype=dtype)
        results[kind] = outputs_and_gradients(model, inputs, tiny.outputs)
    assert calls
    for tensors in zip(results["heed"], results["eager"], results["exact"], strict=True):
        assert_as_exact_as_eager(*tensors)


# ---- masks ----


def trees() -> dict:
    """Every mask function that Transformers composes, as far as this release has the parts."""
    parts = transformers.masking_utils
    causal, both, either = parts.causal_mask_function, parts.and_masks, parts.or_masks
    window = parts.sliding_window_overlay(6)
    result = {"causal": causal, "window": both(window, causal)}
    if hasattr(parts, "packed_sequence_mask_function"):
        ids = torch.tensor([[0] * 5 + [1] * 9 + [2] * 10, [0] * 24])
        documents = parts.packed_sequence_mask_function(ids)
        result["documents"] = both(causal, documents)
        result["window, documents"] = both(result["window"], documents)
    if hasattr(parts, "bidirectional_mask_function"):
        result["bidirectional"] = parts.bidirectional_mask_function
    if hasattr(parts, "sliding_window_bidirectional_overlay"):
        overlay = parts.sliding_window_bidirectional_overlay(4)
        result["two-sided window"] = both(overlay, parts.bidirectional_mask_function)
    if "left_padding" in parts.chunked_overlay.__code__.co_varnames:
        overlay = parts.chunked_overlay(7, torch.tensor([3, 0]))
    else:
        overlay = parts.chunked_overlay(7)
    result["chunks"] = both(overlay, causal)
    if hasattr(parts, "blockwise_overlay"):
        blocks = torch.full((2, 40), -1)  # as long as the longest cache below
        blocks[0, 2:6], blocks[0, 12:16], blocks[1, :7] = 0, 1, 0
        overlay = parts.blockwise_overlay(blocks)
        result["blocks"] = either(causal, overlay)
        result["window, blocks"] = both(either(causal, overlay), window)
    if hasattr(parts, "remap_positions_for_packed_sequence"):
        positions = torch.cat([torch.arange(n) for n in (5, 9, 10)])[None].expand(2, -1)
        ids = (positions == 0).cumsum(-1)
        for name in ("window", "chunks"):
            tree = parts.packed_sequence_compatibility_function(result[name], positions, ids)
            result[f"{name}, remapped documents"] = tree
    return result


def mask_call(function, padding: str, q_length=24, q_offset=0, kv_length=24, kv_offset=0) -> dict:
    mask = padding_mask(padding)
    call = {
        "batch_size": BATCH,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": None if mask is None else mask.bool(),
        "allow_is_causal_skip": False,
    }
    if NEW_SIGNATURE:
        return call | {"q_length": q_length, "q_offset": q_offset, "device": "cpu"}
    return call | {"cache_position": torch.arange(q_length) + q_offset}


def visible(mask: Tensor, q_length: int, kv_length: int) -> Tensor:
    """The bool mask [batch, 1, q_length, kv_length] that an int32 mask of heed stands for."""
    rows, words = heed._masks.decode(mask, q_length, kv_length)
    key = torch.arange(kv_length)
    seen = (key >= rows[..., :1]) & (key < rows[..., 1:])
    if words is not None:
        seen &= ((words[:, key // 32] >> (key % 32)) & 1).bool()[:, None]
    return seen[:, None]


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", trees())
def test_intervals_say_what_sdpa_sees(name, padding):
    shapes = [{}]
    if "documents" not in name:
        shapes += [
            {"q_length": 5, "q_offset": 19},
            {"q_length": 1, "q_offset": 20, "kv_length": 8, "kv_offset": 13},
            {"q_length": 7, "q_offset": torch.tensor(9), "kv_length": 40},
        ]
    for shape in shapes:
        call = mask_call(trees()[name], padding, **shape)
        sdpa = sdpa_mask(**call)
        mask = heed.transformers.key_interval_mask(**call | {"allow_is_causal_skip": True})
        if mask is None:  # the layer's own causal band, bottom right
            assert name in ("causal", "bidirectional") and padding == "none"
            continue
        assert mask.dtype == torch.int32
        assert torch.equal(visible(mask, sdpa.shape[2], sdpa.shape[3]), sdpa)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", trees())
def test_no_value_reaches_the_host(name, padding):
    """Tensors without data have none to give."""
    with torch.device("meta"):
        call = mask_call(trees()[name], padding)
        call |= {"device": "meta"} if NEW_SIGNATURE else {}
        mask = heed.transformers.key_interval_mask(**call)
        positions = torch.arange(SEQLEN)[None]
        one = mask[:1].to(mask.dtype)
        heed._masks.restarting_documents(one, SEQLEN, positions)
        heed._masks.listed_documents(one, SEQLEN, *torch.ones(2, 4, dtype=torch.int32))


# ---- generation ----


def greedy(model, inputs: dict, **arguments) -> Tensor:
    """20 tokens after the prompt."""
    inputs = {name: x for name, x in inputs.items() if "decoder" not in name and name != "labels"}
    return model.generate(
        **inputs, **arguments, do_sample=False, max_new_tokens=20, min_new_tokens=20, pad_token_id=0
    )


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", [*DECODERS, "gemma3", "paligemma", "t5", "bart", "whisper"])
def test_greedy_generation(name, padding, cache, calls):
    """Layers with a window have a sliding cache of 6 tokens, dynamic or static."""
    tiny = available(name)
    arguments = {} if cache == "dynamic" else {"cache_implementation": "static"}
    results = [greedy(build(tiny, a), tiny.inputs(padding), **arguments) for a in ("heed", "eager")]
    assert calls
    assert torch.equal(*results)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_greedy_generation_compiled(name):
    tiny = available(name)
    inputs = tiny.inputs("left")
    compiled = transformers.CompileConfig(fullgraph=True, mode="default")
    compiled._compile_all_devices = True
    result = greedy(
        build(tiny, "heed"), inputs, cache_implementation="static", compile_config=compiled
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(result, greedy(build(tiny, "eager"), inputs))


# ---- training ----


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "bert", "t5", "whisper"])
def test_gradient_checkpointing(name):
    tiny = available(name)
    inputs = tiny.inputs("left")
    model = build(tiny, "heed")
    _, expected = outputs_and_gradients(model, inputs)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    _, gradients = outputs_and_gradients(model.train(), inputs)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], msg=parameter)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt_oss", "bert", "t5"])
def test_compiled_training(name):
    """One full graph for all lengths, forward and backward."""
    tiny = available(name)
    inputs = tiny.inputs("left")
    model = build(tiny, "heed")
    expected, expected_gradients = outputs_and_gradients(model, inputs)
    model.zero_grad()
    backend = "inductor" if name in ("llama", "mistral") else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    outputs, gradients = outputs_and_gradients(compiled, inputs)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in gradients.items():
        expected = expected_gradients[parameter.removeprefix("_orig_mod.")]
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4, msg=parameter)
    shorter = {key: x[:, 4:].contiguous() for key, x in inputs.items()}
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = compiled(**shorter).logits
    torch.testing.assert_close(actual, model(**shorter).logits, rtol=1e-4, atol=1e-5)


def test_dropout_in_training():
    tiny = available("llama")
    model = build(tiny, "heed", attention_dropout=0.25)
    ids = tokens()
    still = model(ids).logits
    model.train()

    def dropped(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids).logits

    assert torch.equal(dropped(1), dropped(1))
    assert not torch.allclose(dropped(1), dropped(2), atol=1e-3)
    model.eval()
    assert torch.equal(model(ids).logits, still)


# ---- packed documents ----

LENGTHS = (5, 9, 10)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
CU_SEQLENS = torch.tensor([0, 5, 14, 24])


def one_by_one(tiny, ids: Tensor):
    """Outputs and gradients of documents that never meet."""
    model = build(tiny, "eager")
    logits = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], 1)
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_packed(tiny, model, **arguments) -> None:
    ids = tokens(batch=1)
    expected, expected_gradients = one_by_one(tiny, ids)
    logits = model(ids, **arguments).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        gradient = expected_gradients[name.removeprefix("_orig_mod.")]
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_restarting_positions_are_documents(name, use_cache):
    counts_chunks = hasattr(transformers.masking_utils, "remap_positions_for_packed_sequence")
    if name == "llama4_text" and (use_cache or not counts_chunks):
        pytest.skip("Transformers counts these chunks from the row's start, not the document's")
    tiny = available(name)
    assert_packed(tiny, build(tiny, "heed"), position_ids=POSITIONS, use_cache=use_cache)


@pytest.mark.parametrize("max_length", [10, torch.tensor(10)])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_explicit_lengths_are_documents(name, max_length):
    tiny = available(name)
    lengths = {"cu_seq_lens_q": CU_SEQLENS, "cu_seq_lens_k": CU_SEQLENS}
    lengths |= {"max_length_q": max_length, "max_length_k": max_length}
    assert_packed(tiny, build(tiny, "heed"), position_ids=POSITIONS, **lengths)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("use_cache", [False, True])
def test_restarting_positions_compiled(use_cache):
    tiny = available("mistral")
    model = torch.compile(build(tiny, "heed"), fullgraph=True, dynamic=True, backend="aot_eager")
    assert_packed(tiny, model, position_ids=POSITIONS, use_cache=use_cache)
    # The graph holds no documents of its own: other positions give other ones.
    ids = tokens(batch=1)
    whole = model(ids, position_ids=torch.arange(SEQLEN)[None], use_cache=use_cache).logits
    torch.testing.assert_close(whole, build(tiny, "eager")(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_padding_mask_of_ones_hides_no_documents():
    tiny = available("mistral")
    ones = torch.ones(1, SEQLEN, dtype=torch.long)
    assert_packed(tiny, build(tiny, "heed"), position_ids=POSITIONS, attention_mask=ones)


def test_positions_of_a_padded_row_are_no_documents():
    """Left padding counts its positions as 1 or 0, and a hole repeats one."""
    tiny = available("mistral")
    heed_model, eager = build(tiny, "heed"), build(tiny, "eager")
    ids = tokens(batch=1)
    for padding in ("left", "right", "holes"):
        mask = padding_mask(padding, batch=1)
        for fill in (0, 1):
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, fill)
            arguments = {"attention_mask": mask, "position_ids": positions}
            actual, expected = [m(ids, **arguments).logits for m in (heed_model, eager)]
            shown = mask.bool()
            torch.testing.assert_close(actual[shown], expected[shown], rtol=1e-4, atol=1e-4)


def test_documents_are_found_once_per_forward(monkeypatch):
    tiny = available("llama")
    model = build(tiny, "heed", num_hidden_layers=3)
    found = []

    def document_intervals(*arguments):
        found.append(arguments)
        return original(*arguments)

    original = heed._masks.restarting_documents
    monkeypatch.setattr(heed._masks, "restarting_documents", document_intervals)
    ids, positions = tokens(batch=1), POSITIONS.clone()
    first = model(ids, position_ids=positions).logits
    assert len(found) == 1
    positions.copy_(torch.arange(SEQLEN))  # the same tensor with other values
    second = model(ids, position_ids=positions).logits
    assert len(found) == 2
    torch.testing.assert_close(second, model(ids).logits)
    assert not torch.allclose(first, second)
    with torch.inference_mode():  # its tensors cannot tell whether they changed
        positions = POSITIONS.clone()
        torch.testing.assert_close(model(ids, position_ids=positions).logits, first)
        positions.copy_(torch.arange(SEQLEN))
        torch.testing.assert_close(model(ids, position_ids=positions).logits, second)


# ---- masks of the user, and what is refused ----


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "bert", "t5"])
def test_own_mask(name, kind):
    tiny = available(name)
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(BATCH, 1, SEQLEN, SEQLEN, generator=generator) < 0.7
    seen |= torch.eye(SEQLEN, dtype=torch.bool)
    if name == "t5":  # one mask for the encoder and for the 10 queries of the cross-attention
        seen = seen[:, :, :1]
    lowest = torch.finfo(torch.float32).min
    added = torch.where(seen, torch.randn(seen.shape, generator=generator), lowest)
    if kind == "bool":
        added = torch.where(seen, 0.0, lowest)
    inputs = tiny.inputs("none")
    mine = {**inputs, "attention_mask": seen if kind == "bool" else added}
    actual = build(tiny, "heed")(**mine).logits
    expected = build(tiny, "eager")(**{**inputs, "attention_mask": added}).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_unknown_mask_function_becomes_a_bool_mask(padding):
    def diagonal(batch_idx, head_idx, q_idx, kv_idx):
        return (kv_idx == q_idx) | (kv_idx == 0)

    call = mask_call(diagonal, padding)
    mask, sdpa = heed.transformers.key_interval_mask(**call), sdpa_mask(**call)
    assert torch.equal(mask.bool(), sdpa)
    query, key, value = torch.randn(3, BATCH, 4, SEQLEN, 8)
    out, _ = heed.transformers.attention_forward(torch.nn.Identity(), query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, sdpa)
    seen = sdpa.any(-1).transpose(1, 2)[..., None]  # SDPA gives NaN or 0 to a row without keys
    torch.testing.assert_close(out, torch.where(seen, expected.transpose(1, 2), 0.0))


def test_block_that_returns_is_refused():
    if not hasattr(transformers.masking_utils, "blockwise_overlay"):
        pytest.skip(f"blockwise_overlay is newer than Transformers {transformers.__version__}")
    ids = torch.tensor([[0] * 6 + [-1] * 6 + [0] * 12] * 2)
    overlay = transformers.masking_utils.blockwise_overlay(ids)
    tree = transformers.masking_utils.or_masks(trees()["causal"], overlay)
    with pytest.raises(RuntimeError, match="returns after another id"):
        heed.transformers.key_interval_mask(**mask_call(tree, "none"))


def attend(**arguments):
    module = torch.nn.Identity()
    states = torch.randn(2, 4, 6, 8)
    arguments.setdefault("attention_mask", None)
    return heed.transformers.attention_forward(module, states, states, states, **arguments)


@pytest.mark.parametrize("name", heed.transformers._REFUSED)
def test_refused_argument(name):
    attend(**{name: None})
    with pytest.raises(NotImplementedError, match=f"{name} is not supported"):
        attend(**{name: True})


def test_output_attentions_of_a_model():
    model = build(available("llama"), "heed")
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(tokens(), output_attentions=True)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 6),
        torch.ones(2, 1, 6, 6, dtype=torch.long),
        torch.ones(2, 1, 6, 6, dtype=torch.int32),
    ],
)
def test_mask_of_wrong_kind(mask):
    with pytest.raises(ValueError, match=r"attention_mask = .* must be a bool or float"):
        attend(attention_mask=mask)


def test_lengths_together_with_an_own_mask():
    cu_seqlens = torch.tensor([0, 6, 12])
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match=r"cu_seq_lens_q .* attention_mask"):
        attend(attention_mask=mask, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens)


@pytest.mark.parametrize("version", ["4.52.4", "6.0.0"])
def test_version_outside_the_range(monkeypatch, version):
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ImportError, match=f"transformers = {version} is not supported"):
        runpy.run_path(heed.transformers.__file__)
