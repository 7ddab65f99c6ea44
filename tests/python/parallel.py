"""One process of models that are spread over several: python parallel.py DEVICE RANK SIZE FOLDER.

Every case compares a step of training, and often generation, with the same in a single process.
FOLDER/RANK.json says for each case null, or why it failed; cases that need a package or a release
that is not there are missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import heed.transformers
import ulysses
from models import MODELS, build, padding_mask, tokens

WIDTH, SEQLEN = 2, 24
HEADS, KEY_HEADS = 4, 2
RELEASE = Version(transformers.__version__)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}

CASES: dict[str, Callable] = {}


def case(needs: bool = True) -> Callable:
    def keep(function: Callable) -> Callable:
        if needs:
            CASES[function.__name__] = function
        return function

    return keep


class World:
    device: str
    rank: int
    size: int
    folder: Path
    dtype: torch.dtype


def model_of(name: str, **changes):
    model = build(MODELS[name], "heed", dtype=World.dtype, device=World.device, **changes)
    return model


def documents(*lengths: int) -> Tensor:
    """position_ids that restart, [1, tokens]"""
    return torch.cat([torch.arange(n) for n in lengths])[None].to(World.device)


def weights(batch: int, seqlen: int) -> Tensor:
    """What the logits are multiplied by for a loss that no mean can hide anything in."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, seqlen, 64, generator=generator).to(World.device, World.dtype)


def train(model, weight: Tensor, **inputs) -> Tensor:
    """The loss, whose gradients the parameters have afterwards."""
    model.train()
    model.zero_grad()
    loss = (model(**inputs).logits * weight).sum(dtype=torch.float32)
    loss.backward()
    model.eval()
    return loss.detach()


def decode(model, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Greedy tokens [batch, 8] after the prompt."""
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **settings)[:, -8:]


@contextlib.contextmanager
def watched() -> Iterator[set]:
    """(query heads, key heads, sinks) of the calls that reach heed."""
    seen, original = set(), heed.transformers.attention

    def attention(query, key, value, **options):
        sink = options["sink"]
        seen.add((query.shape[-2], key.shape[-2], None if sink is None else sink.shape[0]))
        return original(query, key, value, **options)

    heed.transformers.attention = attention
    try:
        yield seen
    finally:
        heed.transformers.attention = original


def assert_close(got: Tensor, want: Tensor, what: str) -> None:
    error, largest = (got.float() - want.float()).abs().amax(), max(1.0, want.abs().amax())
    assert error <= TOLERANCE[World.dtype] * largest, f"{what}: {error:.1e} of {largest:.1e}"


def assert_same_tokens(got: Tensor, want: Tensor) -> None:
    if World.dtype == torch.float32:  # in 16 bits nearly equal logits may change places
        assert torch.equal(got, want), f"tokens {got.tolist()} are not {want.tolist()}"


def assert_same_gradients(model, reference, scale: float = 1.0, plain_is_local: bool = False):
    """Parameters of `model` are whole, DTensors, or this process's part of those of `reference`."""
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name not in wanted:
            continue
        got, want = parameter.grad, wanted[name]
        assert got is not None, f"{name} has no gradient"
        if isinstance(got, DTensor):
            got = got.full_tensor()
        elif plain_is_local and got.shape != want.shape:
            (dim,) = (i for i in range(want.ndim) if got.shape[i] != want.shape[i])
            want = want.chunk(World.size, dim)[World.rank]
        assert_close(got * scale, want, name)


# ---- FSDP2: each process has its own rows ----


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def data_parallel(name: str, steps: list[dict], generates: bool = True) -> None:
    """steps[rank] are the inputs of a process; one process takes them one after the other."""
    seqlen = steps[0]["input_ids"].shape[1]
    weight = weights(World.size, seqlen)
    reference, model = model_of(name), sharded(model_of(name))
    losses, total = [], None
    for index, inputs in enumerate(steps):
        losses.append(train(reference, weight[index : index + 1], **inputs))
        grads = [None if p.grad is None else p.grad.clone() for p in reference.parameters()]
        total = (
            grads if total is None else [a if b is None else a + b for a, b in zip(total, grads)]
        )
    for parameter, gradient in zip(reference.parameters(), total, strict=True):
        parameter.grad = gradient
    own = steps[World.rank]
    with watched() as seen:
        loss = train(model, weight[World.rank : World.rank + 1], **own)
    assert {call[:2] for call in seen} == {(HEADS, KEY_HEADS)}
    assert_close(loss, losses[World.rank], "loss")
    assert_same_gradients(model, reference, scale=World.size)  # FSDP takes the mean
    if generates:
        mask = own.get("attention_mask")
        want = decode(reference, own["input_ids"], mask)
        assert_same_tokens(decode(model, own["input_ids"], mask), want)


def one_row_each(**more: Tensor | None) -> list[dict]:
    ids = tokens(batch=World.size, seqlen=SEQLEN)
    more = {name: x for name, x in more.items() if x is not None}
    return [
        {"input_ids": ids[i : i + 1], **{name: x[i : i + 1] for name, x in more.items()}}
        for i in range(World.size)
    ]


@case()
def fsdp_dense() -> None:
    data_parallel("llama", one_row_each(attention_mask=padding_mask("left", World.size, SEQLEN)))


@case()
def fsdp_packed() -> None:
    ids = torch.cat((documents(9, 4, 11), documents(3, 21)))[: World.size]
    ids = torch.cat([ids] * (World.size // 2))
    data_parallel("llama", one_row_each(position_ids=ids), generates=False)


@case(RELEASE >= Version("4.55"))
def fsdp_sinks() -> None:
    data_parallel("gpt_oss", one_row_each())


@case()
def fsdp_rows_of_other_lengths() -> None:
    """No collective of a step sees the lengths, so processes need not agree on them."""
    steps = one_row_each()
    steps[1] = {"input_ids": steps[1]["input_ids"]}
    reference, model = model_of("llama"), sharded(model_of("llama"))
    lengths = [SEQLEN - 7 * index for index in range(World.size)]
    weight = weights(1, SEQLEN)
    total = None
    for index, length in enumerate(lengths):
        train(reference, weight[:, :length], input_ids=steps[index]["input_ids"][:, :length])
        grads = [p.grad.clone() for p in reference.parameters()]
        total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
    for parameter, gradient in zip(reference.parameters(), total, strict=True):
        parameter.grad = gradient
    own = lengths[World.rank]
    train(model, weight[:, :own], input_ids=steps[World.rank]["input_ids"][:, :own])
    assert_same_gradients(model, reference, scale=World.size)


# ---- Transformers' tensor parallelism: each process has its own heads ----


def saved(name: str, reference) -> Path:
    folder = World.folder / name
    if World.rank == 0:
        reference.save_pretrained(folder)
    dist.barrier()
    return folder


def tensor_parallel(name: str, reference, plan, heads: tuple, gradients: bool = True) -> None:
    """`heads` of query, keys and sinks that a process has."""
    options = {"tp_plan": plan}
    if RELEASE >= Version("5.20"):
        options = {"distributed_config": transformers.distributed.DistributedConfig(tp_plan=plan)}
    if World.device == "cpu" and RELEASE < Version("5.0"):
        options["device_mesh"] = dist.init_device_mesh("cpu", (World.size,))
    model = getattr(transformers, type(reference).__name__).from_pretrained(
        saved(name, reference), attn_implementation="heed", dtype=World.dtype, **options
    )
    ids = tokens(seqlen=SEQLEN)
    padded = {"input_ids": ids, "attention_mask": padding_mask("left", seqlen=SEQLEN)}
    packed = {"input_ids": ids[:1], "position_ids": documents(9, 4, 11)}
    for inputs in (padded, packed, {"input_ids": ids}):
        weight = weights(inputs["input_ids"].shape[0], SEQLEN)
        want = train(reference, weight, **inputs)
        with watched() as seen:
            got = train(model, weight, **inputs)
        assert seen == {heads}, f"{seen} heads of query, keys and sinks, not {heads}"
        assert_close(got, want, "loss")
        assert_same_gradients(model, reference, plain_is_local=True)
    for mask in (None, padded["attention_mask"]):
        assert_same_tokens(decode(model, ids, mask), decode(reference, ids, mask))


@case()
def tp_dense_packed_grouped() -> None:
    heads = (HEADS // World.size, KEY_HEADS // World.size, None)
    tensor_parallel("llama", model_of("llama"), "auto", heads)


def plan_with(sinks: str | None) -> dict[str, str]:
    layer = "model.layers.*.self_attn"
    plan = {f"{layer}.{x}_proj": "colwise" for x in "qkv"} | {f"{layer}.o_proj": "rowwise"}
    return plan | ({f"{layer}.sinks": sinks} if sinks else {})


@case(RELEASE >= Version("5.20"))
def tp_sinks_of_a_plan() -> None:
    """The rule makes a DTensor of a layer's sinks, which reaches heed as it is."""
    heads = (HEADS // World.size, KEY_HEADS // World.size, HEADS // World.size)
    tensor_parallel("gpt_oss", model_of("gpt_oss"), plan_with("colwise"), heads)


@case(Version("4.55") <= RELEASE < Version("5.4"))
def tp_sinks() -> None:
    heads = (HEADS // World.size, KEY_HEADS // World.size, HEADS // World.size)
    tensor_parallel("gpt_oss", model_of("gpt_oss"), "auto", heads)


@case(RELEASE >= Version("5.4"))
def tp_whole_attention_with_sinks() -> None:
    """The plan of GPT-OSS leaves its attention whole in these releases."""
    heads = (HEADS, KEY_HEADS, HEADS)
    tensor_parallel("gpt_oss", model_of("gpt_oss"), "auto", heads)


@case(hasattr(transformers, "GraniteSWAForCausalLM"))
def tp_sinks_as_local_parameters() -> None:
    config = MODELS["gpt_oss"].config().to_dict()
    names = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size "
        "num_key_value_heads pad_token_id bos_token_id eos_token_id sliding_window"
    ).split()
    torch.manual_seed(0)
    model = transformers.GraniteSWAForCausalLM._from_config(
        transformers.GraniteSWAConfig(**{name: config[name] for name in names}),
        attn_implementation="heed",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.15)
    heads = (HEADS // World.size, KEY_HEADS // World.size, HEADS // World.size)
    model = model.to(World.device, World.dtype).eval()
    tensor_parallel("granite_swa", model, "auto", heads)


@case(RELEASE >= Version("5.20"))
def tp_sinks_of_all_heads_are_refused() -> None:
    reference = model_of("gpt_oss")
    options = {
        "distributed_config": transformers.distributed.DistributedConfig(tp_plan=plan_with(None))
    }
    model = type(reference).from_pretrained(
        saved("refused", reference), attn_implementation="heed", dtype=World.dtype, **options
    )
    sentence = f"s_aux.shape = [{HEADS}] must be [{HEADS // World.size}], one sink for each head"
    refused(ValueError, sentence, lambda: model(tokens(seqlen=SEQLEN)))


# ---- DeepSpeed's Ulysses: each process has its own tokens, and in attention its own heads ----


def positions(*rows: Tensor) -> Tensor:
    return torch.cat(rows).to(World.device)


def sequence_parallel(name: str, position_ids: Tensor, mask: Tensor | None = None) -> None:
    """Packed where position_ids restart; reference and mask know nothing of processes."""
    batch, seqlen = position_ids.shape
    weight = weights(batch, seqlen)
    if mask is not None:
        weight = weight * mask[..., None]
    inputs = {"input_ids": tokens(batch, seqlen), "position_ids": position_ids}
    if mask is not None:
        inputs["attention_mask"] = mask
    reference, model = model_of(name), model_of(name)
    want = train(reference, weight, **inputs, use_cache=False)
    part = slice(World.rank * seqlen // World.size, (World.rank + 1) * seqlen // World.size)
    own = {name: x[:, part].contiguous() for name, x in inputs.items()}
    with ulysses.registered(model, batch), watched() as seen:
        got = train(model, weight[:, part], **own, use_cache=False)
    sinks = HEADS // World.size if name == "gpt_oss" else None
    heads = (HEADS // World.size, KEY_HEADS // World.size, sinks)
    assert seen == {heads}, f"{seen} heads of query, keys and sinks, not {heads}"
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
    dist.all_reduce(got)
    assert_close(got, want, "loss")
    assert_same_gradients(model, reference)


# The third document of 24 tokens crosses from one process to the other.
@case()
def ulysses_dense() -> None:
    sequence_parallel("llama", positions(documents(SEQLEN), documents(SEQLEN)))


@case()
def ulysses_packed() -> None:
    sequence_parallel("llama", documents(9, 1, 14))


@case()
def ulysses_packed_rows() -> None:
    sequence_parallel("llama", positions(documents(9, 1, 14), documents(12, 12)))


@case()
def ulysses_window() -> None:
    sequence_parallel("mistral", positions(documents(SEQLEN), documents(SEQLEN)))


@case(RELEASE >= Version("4.55"))
def ulysses_sinks() -> None:
    sequence_parallel("gpt_oss", positions(documents(9, 1, 14), documents(24)))


@case()
def ulysses_padding_that_positions_show() -> None:
    mask = padding_mask("left", seqlen=SEQLEN)
    ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    sequence_parallel("llama", ids, mask)


def refused(error: type[Exception], sentence: str, call: Callable) -> None:
    try:
        call()
    except error as raised:
        assert sentence in str(raised), raised
    else:
        raise AssertionError(f"nothing said: {sentence}")


@case()
def ulysses_refusals() -> None:
    ids = tokens(seqlen=SEQLEN)
    inputs = {"input_ids": ids, "position_ids": positions(*[documents(SEQLEN)] * 2)}
    model = model_of("llama4_text")
    with ulysses.registered(model, 2):
        refused(NotImplementedError, "with DeepSpeed's Ulysses", lambda: model(**inputs))
        other = model_of("llama")
        cache = transformers.DynamicCache()
        cache.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
        call = lambda: other(**inputs, past_key_values=cache)  # noqa: E731
        refused(NotImplementedError, "24 queries of 27 keys are not supported", call)
        if RELEASE >= Version("5.0"):
            encoder, mask = model_of("bert"), padding_mask("right", seqlen=SEQLEN)
            call = lambda: encoder(ids, attention_mask=mask)  # noqa: E731
            refused(NotImplementedError, "(bidirectional_mask_function with an", call)


def main(device: str, rank: int, size: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    World.device, World.rank, World.size, World.folder = device, rank, size, folder
    World.dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if device == "cuda":
        torch.cuda.set_device(rank)
    transformers.logging.set_verbosity_error()
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    results = {}
    only = os.environ.get("HEED_TEST_CASES", "")
    for name, function in CASES.items():
        if only not in name:
            continue
        try:
            function()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # Gloo's threads sometimes terminate the process in an orderly end (PyTorch 2.10)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
