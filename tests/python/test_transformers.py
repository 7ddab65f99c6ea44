"""heed.transformers against Transformers' eager attention on tiny random models.

Where heed's kernels take 16 bits only, its models run in them (DTYPE), with weights that 16 bits
hold exactly, and are compared with eager models in float32 or float64.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

import heed.transformers
from device import DEVICE, DTYPE, EXACT, cpu_only, moved, randn
from generation import assert_same_tokens, cast, greedy, skip_impossible
from models import BATCH, MODELS, SEQLEN, available, build, padding_mask, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

NEW_SIGNATURE = Version(transformers.__version__) >= Version("5.4.0")
DECODERS = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text", "llama4_text", "gpt_oss")


# Of the largest value. In 16 bits a model of two layers is off by 1 to 8 roundings.
TOLERANCE = 1e-4 if EXACT else 16 * torch.finfo(DTYPE).eps
# Their gradients jump where 16 bits change the sign of a ReLU's input.
WITH_RELU = ("t5", "sam3")


def assert_close(actual: Tensor, expected: Tensor, name: str = "") -> None:
    largest = expected.abs().max().item()
    torch.testing.assert_close(
        actual.float(),
        expected.float(),
        rtol=0,
        atol=TOLERANCE * max(1.0, largest),
        msg=name or None,
    )


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
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs)
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    return dict(zip(names, outputs, strict=True)), gradients


def assert_as_exact_as_eager(actual: dict, eager: dict, exact: dict, relu: bool) -> None:
    """Error at most 1e-5 of the tensor's maximum plus the error of eager in the same dtype. Twice
    that for sam3's embeddings of boxes, which amplify rounding: 1.4e-5 with AVX-512, by chance,
    since with other seeds it is 1e-6 to 5e-6.

    In 16 bits, of which both errors are random: 8 roundings of the maximum plus twice eager's.
    """
    floor, factor = (1e-5, 1) if EXACT else (0.5 if relu else 8 * torch.finfo(DTYPE).eps, 2)
    # These add one number to all scores of a row: their gradient is 0 but for rounding errors.
    no_effect = ("k_proj.bias", "key.bias", "rpb_embed_x.layer2.bias", "rpb_embed_y.layer2.bias")
    largest = max(x.abs().max() for x in exact.values())
    for name in exact:
        scale = largest if name.endswith(no_effect) else exact[name].abs().max()
        eager_error = (eager[name].double() - exact[name]).abs().max().item()
        error = (actual[name].double() - exact[name]).abs().max().item()
        allowed = 2 * floor if EXACT and "box_rpb_embed" in name else floor
        assert error <= allowed * scale + factor * eager_error, (
            f"{name}: {error:.2e} of {scale:.2e}, where eager's is {eager_error:.2e}"
        )


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
        wide = arguments.get("dtype") == torch.float64
        return eager_mask(**(arguments | {"dtype": torch.float32} if wide else arguments))

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
        ("heed", "heed", DTYPE),
        ("eager", "eager", DTYPE),
        ("exact", "eager", torch.float64),
    ):
        model = build(tiny, attention, dtype=dtype)
        results[kind] = outputs_and_gradients(model, inputs, tiny.outputs)
    assert calls
    outputs, gradients = zip(*(results[kind] for kind in ("heed", "eager", "exact")), strict=True)
    assert_as_exact_as_eager(*outputs, relu=False)
    assert_as_exact_as_eager(*gradients, relu=name in WITH_RELU)


# ---- masks ----


def trees(device: str = DEVICE) -> dict:
    """Every mask function that Transformers composes, as far as this release has the parts."""
    parts = transformers.masking_utils
    causal, both, either = parts.causal_mask_function, parts.and_masks, parts.or_masks
    window = parts.sliding_window_overlay(6)
    result = {"causal": causal, "window": both(window, causal)}
    if hasattr(parts, "packed_sequence_mask_function"):
        ids = torch.tensor([[0] * 5 + [1] * 9 + [2] * 10, [0] * 24], device=device)
        documents = parts.packed_sequence_mask_function(ids)
        result["documents"] = both(causal, documents)
        result["window, documents"] = both(result["window"], documents)
    if hasattr(parts, "bidirectional_mask_function"):
        result["bidirectional"] = parts.bidirectional_mask_function
    if hasattr(parts, "sliding_window_bidirectional_overlay"):
        overlay = parts.sliding_window_bidirectional_overlay(4)
        result["two-sided window"] = both(overlay, parts.bidirectional_mask_function)
    if "left_padding" in parts.chunked_overlay.__code__.co_varnames:
        overlay = parts.chunked_overlay(7, torch.tensor([3, 0], device=device))
    else:
        overlay = parts.chunked_overlay(7)
    result["chunks"] = both(overlay, causal)
    if hasattr(parts, "blockwise_overlay"):
        blocks = torch.full((2, 40), -1, device=device)  # as long as the longest cache below
        blocks[0, 2:6], blocks[0, 12:16], blocks[1, :7] = 0, 1, 0
        overlay = parts.blockwise_overlay(blocks)
        result["blocks"] = either(causal, overlay)
        result["window, blocks"] = both(either(causal, overlay), window)
    if hasattr(parts, "remap_positions_for_packed_sequence"):
        positions = torch.cat([torch.arange(n, device=device) for n in (5, 9, 10)])[None]
        positions = positions.expand(2, -1)
        ids = (positions == 0).cumsum(-1)
        for name in ("window", "chunks"):
            tree = parts.packed_sequence_compatibility_function(result[name], positions, ids)
            result[f"{name}, remapped documents"] = tree
    return result


BIDIRECTIONAL = ("bidirectional", "two-sided window", "only chunks")


def mask_call(
    function, padding: str, q_length=24, q_offset=0, kv_length=24, kv_offset=0, config=None
) -> dict:
    mask = padding_mask(padding)
    call = {
        "batch_size": BATCH,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": None if mask is None else mask.bool(),
        "allow_is_causal_skip": False,
        "config": config,
    }
    if NEW_SIGNATURE:
        return moved(call | {"q_length": q_length, "q_offset": q_offset, "device": DEVICE})
    return moved(call | {"cache_position": torch.arange(q_length) + q_offset})


def visible(mask: Tensor, q_length: int, kv_length: int) -> Tensor:
    """The bool mask [batch, 1, q_length, kv_length] that an int32 mask of heed stands for."""
    rows, words = heed._masks.decode(mask, q_length, kv_length)
    key = torch.arange(kv_length, device=mask.device)
    seen = (key >= rows[..., :1]) & (key < rows[..., 1:])
    if words is not None:
        seen &= ((words[:, key // 32] >> (key % 32)) & 1).bool()[:, None]
    return seen[:, None]


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", trees())
def test_intervals_say_what_sdpa_sees(name, padding):
    """But for rows of padding in self-attention."""
    shapes = [{}, {"config": transformers.BertConfig()}]
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
        if padding != "none" and ("config" in shape or (not shape and name not in BIDIRECTIONAL)):
            sdpa = sdpa & call["attention_mask"][:, None, :, None]
        assert torch.equal(visible(mask, sdpa.shape[2], sdpa.shape[3]), sdpa)


def bands() -> dict:
    """Every tree that is a band, and intersections that Transformers does not compose."""
    parts, known = transformers.masking_utils, trees()
    both, window = parts.and_masks, parts.sliding_window_overlay
    names = ("causal", "window", "bidirectional", "two-sided window", "chunks")
    result = {name: known[name] for name in names if name in known}
    result["two windows"] = both(both(window(9), parts.causal_mask_function), window(4))
    result["window, chunks"] = both(window(3), known["chunks"])
    if "two-sided window" in known:
        result["two-sided window, causal"] = both(known["two-sided window"], known["causal"])
    if NEW_SIGNATURE:
        starts = torch.tensor([3, 0], dtype=torch.int32, device=DEVICE)
        result["only chunks"] = parts.chunked_overlay(7, starts)
    return result


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes", "all"])
@pytest.mark.parametrize("name", bands())
def test_one_operation_makes_the_mask_of_a_band(name, padding, monkeypatch):
    """Value by value what the tensor operations make."""
    made = []

    def band_mask(*arguments):
        made.append(arguments)
        return make_band_mask(*arguments)

    make_band_mask = heed.ops.make_band_mask
    monkeypatch.setattr(heed.ops, "make_band_mask", band_mask)
    offset = torch.tensor(9)
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.float32):
        for shape in (
            {},
            {"config": transformers.BertConfig()},
            {"q_length": 1, "q_offset": 23},
            {"q_length": 5, "q_offset": 19},
            {"q_length": 0},
            {"q_length": 1, "q_offset": 20, "kv_length": 8, "kv_offset": 13},
            {"q_length": 3, "q_offset": 21, "kv_length": 8, "kv_offset": 30},
            {"q_length": 7, "q_offset": offset, "kv_length": 40},
            {"q_length": 1, "q_offset": offset, "kv_length": 130},
            {"q_length": 70, "q_offset": offset, "kv_length": 64, "kv_offset": 2},
            {"q_length": 3, "q_offset": torch.tensor([9]), "kv_length": 33},
        ):
            call = mask_call(bands()[name], padding, **shape) | {"allow_is_causal_skip": True}
            if call["attention_mask"] is not None:
                call["attention_mask"] = call["attention_mask"].to(dtype)
            with monkeypatch.context() as patch:
                patch.setattr(heed._masks, "read_band", lambda function: None)
                expected = heed.transformers.key_interval_mask(**call)
            assert not made
            mask = heed.transformers.key_interval_mask(**call)
            if expected is None:
                assert mask is None and padding == "none"
                continue
            assert mask.dtype == torch.int32 and torch.equal(mask, expected)
            assert made.pop() and mask.is_contiguous()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("padding", ["none", "left"])
def test_mask_of_a_band_compiled(padding):
    """One graph for all positions of a static cache, and one for all lengths of a dynamic one."""
    if not NEW_SIGNATURE:
        pytest.skip("older releases of Transformers pass the positions as a tensor")

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def make(padding_mask, **arguments):
        call = arguments | {"attention_mask": padding_mask, "mask_function": tree}
        return heed.transformers.key_interval_mask(**call)

    tree = trees()["window"]
    for cache in ("static", "dynamic"):
        for index, at in enumerate((7, 12, 19)):
            offset = torch.tensor(at, device=DEVICE) if cache == "static" else at
            length = 24 if cache == "static" else at + 2
            call = mask_call(tree, padding, q_length=2, q_offset=offset, kv_length=length)
            expected = heed.transformers.key_interval_mask(**call)
            del call["mask_function"]
            with torch._dynamo.config.patch(error_on_recompile=index > 1):
                assert torch.equal(make(call.pop("attention_mask"), **call), expected)


def composed(*lengths: int):
    """Like models do it, a tree made where it is used: packed documents, a window in them."""
    parts = transformers.masking_utils
    tree = parts.sliding_window_causal_mask_function(6)
    if not lengths:
        return tree
    positions = torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None]
    documents = (positions == 0).cumsum(-1)
    return parts.packed_sequence_compatibility_function(tree, positions, documents)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("lengths", [(), (5, 9, 10)])
def test_mask_of_a_tree_made_in_the_graph(lengths):
    """Closures that only Dynamo knows are read too: the mask is one of intervals."""
    if lengths and not hasattr(
        transformers.masking_utils, "packed_sequence_compatibility_function"
    ):
        pytest.skip("this Transformers does not remap positions")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def make(padding_mask):
        call = mask_call(composed(*lengths), "none") | {"attention_mask": padding_mask}
        return heed.transformers.key_interval_mask(**call)

    for padding in ("none", "left"):
        expected = heed.transformers.key_interval_mask(**mask_call(composed(*lengths), padding))
        mask = make(mask_call(composed(), padding)["attention_mask"])
        assert mask.dtype == torch.int32 and torch.equal(mask, expected)


def test_function_that_wraps_one_is_not_read_as_it():
    causal = trees()["causal"]
    assert heed._masks.name_and_closure(causal) == ("causal_mask_function", {})

    @functools.wraps(causal)
    def without_itself(batch_idx, head_idx, q_idx, kv_idx):
        return causal(batch_idx, head_idx, q_idx, kv_idx + 1)

    assert heed._masks.name_and_closure(without_itself) == ("", {})
    mask = heed.transformers.key_interval_mask(**mask_call(without_itself, "none"))
    assert torch.equal(
        mask.view(torch.bool)[0, 0], torch.ones(24, 24, device=DEVICE).tril(-1).bool()
    )


def test_operator_of_bands():
    mask = padding_mask("left")
    start = torch.tensor([3, 0], device=DEVICE)
    for arguments in (
        (mask.bool(), None, None, BATCH, SEQLEN, 0, SEQLEN, 0, -1, 0, 0, True, mask.device),
        (mask, start[0], start, BATCH, 5, 0, 40, 8, 4, -1, 7, False, mask.device),
        (None, start[:1], None, BATCH, 5, 0, 40, 0, 4, 4, 0, False, mask.device),
    ):
        torch.library.opcheck(heed.ops.band_mask, arguments)
    with pytest.raises(ValueError, match="seqlen_q = 5 must be slots = 40 with rows_are_slots"):
        heed.ops.make_band_mask(mask, None, None, BATCH, 5, 0, 40, 0, -1, 0, 0, True, mask.device)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", trees())
def test_no_value_reaches_the_host(name, padding):
    """Tensors without data have none to give."""
    call = moved(mask_call(trees("meta")[name], padding), "meta")
    call |= {"device": "meta"} if NEW_SIGNATURE else {}
    with torch.device("meta"):
        mask = heed.transformers.key_interval_mask(**call)
        positions = torch.arange(SEQLEN)[None]
        one = mask[:1].to(mask.dtype)
        heed._masks.restarting_documents(one, SEQLEN, positions)
        heed._masks.listed_documents(one, SEQLEN, *torch.ones(2, 4, dtype=torch.int32))


# ---- rows of padding ----


@pytest.mark.parametrize("seqlen", [SEQLEN, 200])
@pytest.mark.parametrize("padding", ["left", "right", "holes", "all"])
@pytest.mark.parametrize(
    ("left", "right", "chunk"), [(-1, 0, 0), (5, 0, 0), (-1, 0, 7), (-1, -1, 0), (4, 4, 0)]
)
def test_operator_hides_rows_of_padding(left, right, chunk, padding, seqlen):
    mask = padding_mask(padding, seqlen=seqlen)
    start = torch.tensor([3, 0], device=DEVICE) if chunk else None
    key = torch.arange(seqlen, device=DEVICE)
    query = key[:, None]
    seen = mask.bool()[:, None].expand(-1, seqlen, -1)
    if left >= 0:
        seen = seen & (key >= query - left)
    if right >= 0:
        seen = seen & (key <= query + right)
    if chunk:
        chunk_of = (key - start[:, None]).div(chunk, rounding_mode="floor")
        seen = seen & (chunk_of[:, None] == chunk_of[:, :, None])
    for rows_are_slots in (False, True):
        if rows_are_slots:
            seen = seen & mask.bool()[:, :, None]
        shape = (BATCH, seqlen, 0, seqlen, 0)
        band = (left, right, chunk, rows_are_slots)
        for padding_of in (mask, mask.bool(), mask.t().contiguous().t(), mask.repeat(1, 2)):
            made = heed.ops.make_band_mask(padding_of, None, start, *shape, *band, mask.device)
            assert torch.equal(visible(made, seqlen, seqlen)[:, 0], seen)
    first, end = made[:, 0, :seqlen][mask == 0].unbind(-1)
    assert (first >= end).all()  # empty, not only without valid keys


@pytest.fixture
def attended(monkeypatch):
    """[batch, seqlen_q, heads, head_dim] of every call of heed.attention that Transformers made."""
    recorded = []

    def attention(*tensors, **arguments):
        recorded.append(heed.attention(*tensors, **arguments))
        return recorded[-1]

    monkeypatch.setattr(heed.transformers, "attention", attention)
    return recorded


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("name", [*DECODERS, "gemma3", "bert", "t5"])
def test_rows_of_padding_are_not_computed(name, padding, attended):
    """test_outputs_and_gradients shows that nothing else depends on them."""
    tiny = available(name)
    if name == "gemma3" and "blocks" not in trees():
        pytest.skip("this Transformers makes image masks of functions that heed cannot read")
    real = padding_mask(padding).bool()
    build(tiny, "heed")(**cast(tiny.inputs(padding), DTYPE))
    of_tokens = [out for out in attended if out.shape[:2] == real.shape]
    assert len(of_tokens) == 2
    for out in of_tokens:
        assert not out[~real].any()
        assert out[real].abs().amax((-1, -2)).min() > 0


@pytest.mark.parametrize("name", ["llama", "mistral", "bert"])
def test_right_padding_changes_nothing(name):
    tiny = available(name)
    model = build(tiny, "heed")
    inputs = tiny.inputs("right")
    logits = model(**inputs).logits
    for row, ids, mask in zip(logits, *inputs.values(), strict=True):
        alone = model(ids[mask.bool()][None]).logits[0]
        assert_close(row[mask.bool()], alone)


def test_documents_leave_rows_of_padding_empty():
    mask = padding_mask("right", batch=1)
    call = mask_call(trees()["window"], "none") | {"batch_size": 1, "attention_mask": mask.bool()}
    made = heed.transformers.key_interval_mask(**call)
    for cut in (
        heed._masks.restarting_documents(made, SEQLEN, POSITIONS),
        heed._masks.listed_documents(made, SEQLEN, CU_SEQLENS, CU_SEQLENS),
    ):
        assert not visible(cut, SEQLEN, SEQLEN)[0, 0][mask[0] == 0].any()
        first, end = cut[0, 0, :SEQLEN][mask[0] == 0].unbind(-1)
        assert (first >= end).all()


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("name", ["bart", "t5", "bert"])
def test_cross_attention_of_equal_lengths(name, padding, calls):
    """Slots of an encoder that are padding say nothing about the decoder's rows."""
    tiny = available(name)
    changes, mask = {}, padding_mask(padding)
    if name == "bert":
        tiny = replace(tiny, architecture="BertLMHeadModel")
        changes = {"is_decoder": True, "add_cross_attention": True}
        states = randn(BATCH, SEQLEN, 32, generator=torch.Generator().manual_seed(1))
        inputs = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
    else:
        inputs = {"attention_mask": mask, "decoder_input_ids": tokens(seed=1)}
    inputs["input_ids"] = tokens()
    actual = build(tiny, "heed", **changes)(**inputs).logits
    eager = build(tiny, "eager", **changes)
    assert_close(actual, eager(**cast(inputs, torch.float32)).logits)
    assert calls


@pytest.mark.parametrize("package", sorted(heed.transformers._ENCODERS))
def test_encoders_attend_to_another_only_as_decoders(package):
    """Which bidirectional masks are of self-attention, in this release of Transformers."""
    name = package.rpartition(".")[2]
    try:
        path = Path(importlib.util.find_spec(package).origin).with_name(f"modeling_{name}.py")
    except (AttributeError, ModuleNotFoundError):
        pytest.skip(f"Transformers {transformers.__version__} has no {name}")
    source = path.read_text()
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("create_bidirectional")
    ]
    given = {part.arg: ast.unparse(part.value) for node in calls for part in node.keywords}
    assert "encoder_hidden_states" not in given or "config.is_decoder" in source


# ---- generation ----


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", [*DECODERS, "gemma3", "paligemma", "t5", "bart", "whisper"])
def test_greedy_generation(name, padding, cache, calls):
    """Layers with a window have a sliding cache of 6 tokens, dynamic or static."""
    tiny = available(name)
    skip_impossible(name, cache)
    arguments = {"disable_compile": True}
    arguments |= {} if cache == "dynamic" else {"cache_implementation": "static"}
    results = [greedy(build(tiny, a), tiny.inputs(padding), **arguments) for a in ("heed", "eager")]
    assert calls
    assert_same_tokens(*results, DTYPE)


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
    assert_same_tokens(result, greedy(build(tiny, "eager"), inputs), DTYPE)


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
        assert_close(gradient, expected[parameter], parameter)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt_oss", "bert", "t5"])
def test_compiled_training(name):
    """One full graph for all lengths, forward and backward."""
    tiny = available(name)
    inputs = tiny.inputs("left")
    if name == "t5":  # of whose cache Transformers 5.23 copies the config, unlike Dynamo of 2.11
        inputs["use_cache"] = False
    model = build(tiny, "heed")
    expected, expected_gradients = outputs_and_gradients(model, inputs)
    model.zero_grad()
    backend = "inductor" if name in ("llama", "mistral") else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    outputs, gradients = outputs_and_gradients(compiled, inputs)
    assert_close(outputs["logits"], expected["logits"])
    for parameter, gradient in gradients.items():
        expected = expected_gradients[parameter.removeprefix("_orig_mod.")]
        assert_close(gradient, expected, parameter)
    shorter = {
        key: x[:, 4:].contiguous() if isinstance(x, Tensor) else x for key, x in inputs.items()
    }
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = compiled(**shorter).logits
    assert_close(actual, model(**shorter).logits)


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
POSITIONS = torch.cat([torch.arange(n, device=DEVICE) for n in LENGTHS])[None]
CU_SEQLENS = torch.tensor([0, 5, 14, 24], device=DEVICE)


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
    assert_close(logits, expected)
    logits.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        gradient = expected_gradients[name.removeprefix("_orig_mod.")]
        scale = gradient.abs().max().item()
        error = (parameter.grad.float() - gradient).abs().max().item()
        assert error <= TOLERANCE * scale, f"{name}: {error:.2e} of {scale:.2e}"


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
    positions = torch.arange(SEQLEN, device=DEVICE)[None]
    whole = model(ids, position_ids=positions, use_cache=use_cache).logits
    assert_close(whole, build(tiny, "eager")(ids).logits)


def test_a_padding_mask_of_ones_hides_no_documents():
    tiny = available("mistral")
    ones = torch.ones(1, SEQLEN, dtype=torch.long, device=DEVICE)
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
            assert_close(actual[shown], expected[shown])


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
    positions.copy_(torch.arange(SEQLEN, device=DEVICE))  # the same tensor with other values
    second = model(ids, position_ids=positions).logits
    assert len(found) == 2
    assert_close(second, model(ids).logits)
    assert not torch.allclose(first, second, atol=0.1)
    with torch.inference_mode():  # its tensors cannot tell whether they changed
        positions = POSITIONS.clone()
        assert_close(model(ids, position_ids=positions).logits, first)
        positions.copy_(torch.arange(SEQLEN, device=DEVICE))
        assert_close(model(ids, position_ids=positions).logits, second)


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
    added = torch.where(seen, torch.randn(seen.shape, generator=generator), lowest).to(DEVICE)
    seen = seen.to(DEVICE)
    if kind == "bool":
        added = torch.where(seen, 0.0, lowest)
    inputs = tiny.inputs("none")
    mine = {**inputs, "attention_mask": seen if kind == "bool" else added}
    actual = build(tiny, "heed")(**mine).logits
    expected = build(tiny, "eager")(**{**inputs, "attention_mask": added}).logits
    assert_close(actual, expected)


def sdpa(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    wide = (t.float() for t in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*wide, seen)


def test_own_mask_is_not_cut_to_documents():
    tiny = available("llama")
    ids = tokens(batch=1)
    causal = torch.ones(1, 1, SEQLEN, SEQLEN, dtype=torch.bool, device=DEVICE).tril()
    logits = build(tiny, "heed")(ids, position_ids=POSITIONS, attention_mask=causal).logits
    added = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    expected = build(tiny, "eager")(ids, position_ids=POSITIONS, attention_mask=added).logits
    assert_close(logits, expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_window_without_a_mask(is_causal):
    """As in FlashAttention's path the window counts the row's own key, on both sides."""
    query, key, value = randn(3, BATCH, 4, SEQLEN, 8)
    out, _ = heed.transformers.attention_forward(
        torch.nn.Identity(), query, key, value, None, sliding_window=6, is_causal=is_causal
    )
    distance = (torch.arange(SEQLEN)[:, None] - torch.arange(SEQLEN)).to(DEVICE)
    seen = (distance.abs() < 6) & ((distance >= 0) | (not is_causal))
    expected = sdpa(query, key, value, seen)
    assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("padding", ["none", "left"])
def test_unknown_mask_function_becomes_a_bool_mask(padding):
    def diagonal(batch_idx, head_idx, q_idx, kv_idx):
        return (kv_idx == q_idx) | (kv_idx == 0)

    call = mask_call(diagonal, padding)
    mask, seen = heed.transformers.key_interval_mask(**call), sdpa_mask(**call)
    assert torch.equal(mask.bool(), seen)
    query, key, value = randn(3, BATCH, 4, SEQLEN, 8)
    out, _ = heed.transformers.attention_forward(torch.nn.Identity(), query, key, value, mask)
    expected = sdpa(query, key, value, seen)
    seen = seen.any(-1).transpose(1, 2)[..., None]  # SDPA gives NaN or 0 to a row without keys
    assert_close(out, torch.where(seen, expected.transpose(1, 2), 0.0))


@cpu_only("on a GPU the device refuses it, and with that the process can use it no more")
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
    states = randn(2, 4, 6, 8)
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
