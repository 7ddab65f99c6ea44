"""One of two processes that share a model: python parallel.py DEVICE RANK SIZE FOLDER ENGINE.

Every case of an engine (fsdp, tp, ulysses) compares a step of training, and generation where the
engine generates, with the same in a single process. It fails where they differ, at the first case.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
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

SEQLEN = 24
HEADS, KEY_HEADS = 4, 2
RELEASE = Version(transformers.__version__)
# Of the models. heed's kernels for GPUs take 16 bits, so there a model in float32 has its attention
# in float16, which rounds 8 times finer than bfloat16 and in no other place.
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}
TOLERANCE = {"cpu": {torch.float32: 1e-4}, "cuda": {torch.bfloat16: 6e-2, torch.float32: 3e-2}}

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


def model_of(name: str):
    return build(MODELS[name], "heed", dtype=World.dtype, device=World.device)


def documents(*lengths: int) -> Tensor:
    """position_ids that restart, [1, tokens]"""
    return torch.cat([torch.arange(n) for n in lengths])[None].to(World.device)


def weights(batch: int, seqlen: int) -> Tensor:
    """What the logits are multiplied by for a loss that no mean can hide anything in."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(batch, seqlen, 64, generator=generator).to(World.device, World.dtype)


def train(model, weight: Tensor, **inputs) -> Tensor:
    """The loss, whose gradients are added to those that the parameters have."""
    model.train()
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


def assert_close(got: Tensor, want: Tensor, what: str, scale: float = 1.0) -> None:
    error, largest = (got.float() - want.float()).abs().amax(), max(scale, want.abs().amax())
    bound = TOLERANCE[World.device][World.dtype]
    assert error <= bound * largest, f"{what}: {error:.1e} of {largest:.1e}"


def assert_same_tokens(got: Tensor, want: Tensor) -> None:
    if World.dtype == torch.float32:  # in 16 bits nearly equal logits may change places
        assert torch.equal(got, want), f"tokens {got.tolist()} are not {want.tolist()}"


def assert_same_gradients(model, reference, scale: float = 1.0, plain_is_local: bool = False):
    """Parameters of `model` are whole, DTensors, or this process's part of those of `reference`.

    In a model of 16 bits all of them together: the gradient of a router's bias is a sum of terms
    that cancel, and in one process and with "eager" too bfloat16 is off by 0.1 to 0.5 of it.
    """
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    errors, norms = [], []
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
        if World.dtype == torch.float32:
            assert_close(got * scale, want, name)
        errors.append((got * scale - want).float().norm())
        norms.append(want.float().norm())
    error, norm = (torch.stack(x).norm() for x in (errors, norms))
    bound = TOLERANCE[World.device][World.dtype]
    assert error <= bound * norm, f"gradients: {error:.1e} of {norm:.1e}"


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
    losses = []
    for index, inputs in enumerate(steps):
        losses.append(train(reference, weight[index : index + 1], **inputs))
    own = steps[World.rank]
    with watched() as seen:
        loss = train(model, weight[World.rank : World.rank + 1], **own)
    assert {call[:2] for call in seen} == {(HEADS, KEY_HEADS)}
    assert_close(loss, losses[World.rank], "loss", scale=weight[0].numel() ** 0.5)
    assert_same_gradients(model, reference, scale=World.size)  # FSDP takes the mean
    if generates:
        mask = own.get("attention_mask")
        want = decode(reference, own["input_ids"], mask)
        assert_same_tokens(decode(model, own["input_ids"], mask), want)


def one_row_each(**inputs: Tensor) -> list[dict]:
    inputs["input_ids"] = tokens(World.size, SEQLEN)
    return [{name: x[i : i + 1] for name, x in inputs.items()} for i in range(World.size)]


@case()
def fsdp_dense() -> None:
    data_parallel("llama", one_row_each(attention_mask=padding_mask("left", World.size, SEQLEN)))


@case()
def fsdp_packed() -> None:
    position_ids = torch.cat((documents(9, 4, 11), documents(3, 21)))
    data_parallel("llama", one_row_each(position_ids=position_ids), generates=False)


@case(RELEASE >= Version("4.55"))
def fsdp_sinks() -> None:
    # 5.0 looks for the source of the class that fully_shard made, and generate() fails.
    generates = not Version("5.0") <= RELEASE < Version("5.4")
    data_parallel("gpt_oss", one_row_each(), generates)


@case()
def fsdp_rows_of_other_lengths() -> None:
    """No collective of a step sees the lengths, so processes need not agree on them."""
    steps = one_row_each()
    reference, model = model_of("llama"), sharded(model_of("llama"))
    lengths = [SEQLEN - 7 * index for index in range(World.size)]
    weight = weights(1, SEQLEN)
    for index, length in enumerate(lengths):
        train(reference, weight[:, :length], input_ids=steps[index]["input_ids"][:, :length])
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


def loaded(reference, plan, folder: str):
    """`reference`, with the layers that `plan` names spread over the processes."""
    options = {"tp_plan": plan}
    if hasattr(transformers, "distributed"):
        config = transformers.distributed.DistributedConfig
        if "tp_plan" in config.__dataclass_fields__:  # since Transformers 5.15 at the latest
            options = {"distributed_config": config(tp_plan=plan, tp_size=World.size)}
    experts = getattr(reference.config, "_experts_implementation", None)
    if experts is not None:
        options["experts_implementation"] = experts
    options["dtype" if RELEASE >= Version("4.56") else "torch_dtype"] = World.dtype
    return getattr(transformers, type(reference).__name__).from_pretrained(
        saved(folder, reference), attn_implementation="heed", **options
    )


def tensor_parallel(name: str, reference, plan, heads: tuple, trains: bool = True) -> None:
    """`heads` of query, keys and sinks that a process has."""
    model = loaded(reference, plan, name)
    ids = tokens(seqlen=SEQLEN)
    padded = {"input_ids": ids, "attention_mask": padding_mask("left", seqlen=SEQLEN)}
    packed = {"input_ids": ids[:1], "position_ids": documents(9, 4, 11)}
    for inputs in (padded, packed, {"input_ids": ids}) if trains else ():
        weight = weights(inputs["input_ids"].shape[0], SEQLEN)
        model.zero_grad()
        reference.zero_grad()
        want = train(reference, weight, **inputs)
        with watched() as seen:
            got = train(model, weight, **inputs)
        assert seen == {heads}, f"{seen} heads of query, keys and sinks, not {heads}"
        assert_close(got, want, "loss", scale=weight.numel() ** 0.5)
        assert_same_gradients(model, reference, plain_is_local=True)
    for mask in (None, padded["attention_mask"]):
        with watched() as seen:
            got = decode(model, ids, mask)
        assert seen == {heads}, f"{seen} heads of query, keys and sinks, not {heads}"
        assert_same_tokens(got, decode(reference, ids, mask))


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


@case(Version("4.55") <= RELEASE < Version("5.0"))
def tp_sinks() -> None:
    """These releases cannot train what they shard by rows and has a bias."""
    heads = (HEADS // World.size, KEY_HEADS // World.size, HEADS // World.size)
    tensor_parallel("gpt_oss", model_of("gpt_oss"), "auto", heads, trains=False)


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
        transformers.GraniteSWAConfig(
            **{name: config[name] for name in names}, tie_word_embeddings=False
        ),
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
    model = loaded(reference, plan_with(None), "refused")
    sentence = f"s_aux.shape = [{HEADS}] must be [{HEADS // World.size}], one sink for each head"
    refused(ValueError, sentence, lambda: model(tokens(seqlen=SEQLEN)))


# ---- DeepSpeed's Ulysses: each process has its own tokens, and in attention its own heads ----


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
    assert_close(got, want, "loss", scale=weight.numel() ** 0.5)
    assert_same_gradients(model, reference)


# The last of three documents crosses from one process to the other.
@case()
def ulysses_dense() -> None:
    sequence_parallel("llama", documents(SEQLEN).expand(2, -1))


@case()
def ulysses_packed() -> None:
    sequence_parallel("llama", documents(9, 1, 14))


@case(RELEASE > Version("4.53.0"))  # which lets the documents of several rows see each other
def ulysses_packed_rows() -> None:
    sequence_parallel("llama", torch.cat((documents(9, 1, 14), documents(12, 12))))


@case()
def ulysses_window() -> None:
    sequence_parallel("mistral", documents(SEQLEN).expand(2, -1))


@case(RELEASE >= Version("4.55"))
def ulysses_sinks() -> None:
    sequence_parallel("gpt_oss", documents(9, 1, 14))


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
    inputs = {"input_ids": ids, "position_ids": documents(SEQLEN).expand(2, -1)}
    model = model_of("llama4_text")
    with ulysses.registered(model, 2):
        refused(NotImplementedError, "with DeepSpeed's Ulysses", lambda: model(**inputs))
        other = model_of("llama")
        cache = transformers.DynamicCache()
        past = torch.zeros(2, KEY_HEADS, 3, 8, dtype=World.dtype, device=World.device)
        cache.update(past, past, 0)
        call = lambda: other(**inputs, past_key_values=cache)  # noqa: E731
        refused(NotImplementedError, "24 queries of 27 keys are not supported", call)
        if RELEASE >= Version("5.0"):
            encoder, mask = model_of("bert"), padding_mask("right", seqlen=SEQLEN)
            call = lambda: encoder(ids, attention_mask=mask)  # noqa: E731
            refused(NotImplementedError, "(bidirectional_mask_function with an", call)


def in_16_bits(attention: Callable) -> Callable:
    """heed's attention for a model of float32, between conversions."""

    def converted(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        q, k, v = (x.half() for x in (query, key, value))
        return attention(q, k, v, **options).to(query.dtype)

    return converted


def main(device: str, rank: int, size: int, folder: Path, engine: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    World.device, World.rank, World.size, World.folder = device, rank, size, folder
    if device == "cuda":
        torch.cuda.set_device(rank)
    transformers.logging.set_verbosity_error()
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
    )
    attention = heed.transformers.attention
    for name, function in CASES.items():
        for World.dtype in DTYPES[device] if name.startswith(engine) else ():
            print(name, World.dtype, flush=True)
            if World.dtype == torch.float32 and len(DTYPES[device]) > 1:
                heed.transformers.attention = in_16_bits(attention)
            try:
                function()
            except BaseException:
                traceback.print_exc()
                os._exit(1)  # the other process waits for this one
            heed.transformers.attention = attention
    dist.barrier()
    os._exit(0)  # Gloo's threads sometimes terminate the process in an orderly end (PyTorch 2.10)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
