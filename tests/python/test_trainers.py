"""Trainers that lay documents end to end: no document sees another, and losses are eager's.

What collators send is what the tests send: `position_ids` that restart, or lengths, and no mask.
The reference is eager attention on each document alone, or on a padded batch of them.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    masking_utils,
)

import heed.transformers  # noqa: F401  registers "heed"
from device import DEVICE, DTYPE, EXACT, ON_CPU, moved
from models import VOCAB, available, build, tokens

LENGTHS = (5, 1, 8, 10)
TOLERANCE = 1e-5 if EXACT else 16 * torch.finfo(DTYPE).eps
COLLATORS = {
    "positions": {},
    "positions and lengths": {"return_flash_attn_kwargs": True},
    "lengths": {"return_flash_attn_kwargs": True, "return_position_ids": False},
}
MODES = ("plain", "cache", "checkpointing", "reentrant checkpointing")

STEPS = [(n, m, c) for n in ("llama", "mistral", "gpt_oss") for m in MODES for c in COLLATORS]
STEPS += [("llama", "compiled, cache", "positions")]
STEPS += [("mistral", "compiled, checkpointing", "positions and lengths")]


def documents(*changed: int) -> list[Tensor]:
    """[tokens] of each document; those in `changed` are others of the same length."""
    return [tokens(1, n, seed=i + 50 * (i in changed))[0] for i, n in enumerate(LENGTHS)]


def collated(texts: list[Tensor], collator: str = "positions") -> dict:
    features = [{"input_ids": text.tolist()} for text in texts]
    return moved(DataCollatorWithFlattening(**COLLATORS[collator])(features, return_tensors="pt"))


def changes(mode: str) -> dict:
    """Of the configuration. A compiler needs a second or two per layer."""
    return {"use_cache": "cache" in mode} | ({"num_hidden_layers": 1} if "comp" in mode else {})


def prepared(name: str, mode: str):
    """The model on heed, and what to call: itself or its compiled form."""
    model = build(available(name), "heed", **changes(mode)).train()
    if "checkpointing" in mode:
        model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in mode})
    if "compiled" not in mode:
        return model, model
    torch.compiler.reset()
    return model, torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def each_alone(model, texts: list[Tensor]) -> Tensor:
    """The mean loss of documents that never meet."""
    logits = torch.cat([model(text[None]).logits[0, :-1] for text in texts])
    return cross_entropy(logits.float(), torch.cat([text[1:] for text in texts]))


def assert_same_step(model, loss: Tensor, eager, expected: Tensor) -> None:
    """Equal losses, and after backward() equal gradients of every parameter."""
    assert abs(loss.item() - expected.item()) <= TOLERANCE * expected.item()
    loss.backward()
    expected.backward()
    actual, wanted = gradients(model), gradients(eager)
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    for name, gradient in wanted.items():
        allowed = TOLERANCE * (10 * gradient.abs().max().item() + largest / 100)
        error = (actual[name].float() - gradient).abs().max().item()
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize(("name", "mode", "collator"), STEPS)
def test_a_step_is_that_of_each_document_alone(name, mode, collator):
    model, called = prepared(name, mode)
    eager = build(available(name), "eager", **changes(mode))
    loss = called(**collated(documents(), collator)).loss
    assert_same_step(model, loss, eager, each_alone(eager, documents()))


@pytest.mark.parametrize("collator", COLLATORS)
@pytest.mark.parametrize("mode", MODES)
def test_documents_do_not_see_each_other(mode, collator):
    """On a CPU to the last bit: another second and third document change nothing in the others."""
    model, called = prepared("llama", mode)
    others = torch.repeat_interleave(
        torch.tensor([True, False, False, True]), torch.tensor(LENGTHS)
    )
    seen = []
    for texts in (documents(), documents(1, 2)):
        inputs = collated(texts, collator)
        inputs.pop("labels")
        embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        logits = called(inputs_embeds=embedded, **inputs).logits[0, others]
        logits.float().square().sum().backward()
        assert not embedded.grad[0, ~others].any()
        assert embedded.grad[0, others].any(-1).all()
        seen.append((logits, embedded.grad[0, others]))
    for first, second in zip(*seen, strict=True):
        if ON_CPU:
            assert torch.equal(first, second)
        torch.testing.assert_close(first, second, rtol=0, atol=TOLERANCE * first.abs().max().item())


def test_documents_that_see_each_other_would_be_noticed():
    """What eager attention does with a cache object, which is why the tests above can fail."""
    eager = build(available("llama"), "eager")
    inputs = collated(documents())
    packed = eager(**inputs, use_cache=True).loss
    assert abs(packed - each_alone(eager, documents())) > 0.05


# ---- positions that no collator sends ----

ODD_POSITIONS = {
    "go back, but not to the lowest": (0, 1, 2, 3, 4, 3, 1, 2, 3, 4, 0, 1, 2, 1, 2, 3),
    "repeat, and jump ahead": (4, 5, 5, 5, 8, 9, 9, 10, 20, 21, 4, 5, 6, 7, 7, 8),
    "fall": tuple(range(15, -1, -1)),
    "make no sense": (3, -7, 60, 60, -7, -6, 2, 100, 0, 0, 1, -2, 50, 51, 52, 3),
}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("case", ODD_POSITIONS)
def test_odd_positions_have_a_meaning(case, use_cache):
    """A document starts at the lowest position and where they go back. Where Transformers puts
    them into its mask, a document also starts wherever they do not count up by one."""
    positions = torch.tensor([ODD_POSITIONS[case]], device=DEVICE)
    step = positions.diff(prepend=positions[:, :1] - 1)
    starts = (positions == positions.min()) | (step < 0)
    if not use_cache and hasattr(masking_utils, "find_packed_sequence_indices"):
        starts |= step != 1
    document = starts.cumsum(-1)
    seen = (document[..., None] == document[:, None]).tril()[:, None]
    ids = tokens(1, positions.shape[1])
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": use_cache}
    model, eager = build(available("llama"), "heed"), build(available("llama"), "eager")
    hidden = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    expected = eager(**inputs, attention_mask=hidden).loss
    assert_same_step(model, model(**inputs).loss, eager, expected)


# ---- runs of trainers ----

TEXTS = [{"input_ids": tokens(1, 4 + 3 * (i % 5), seed=i)[0].tolist()} for i in range(12)]
STEPS_OF_A_RUN = 3
# A trainer keeps float32 weights; on a GPU it computes in bfloat16, where two implementations agree
# to this, a third of what documents that see each other change.
LOSS_TOLERANCE = 1e-4 if EXACT else 3e-3
RUNS = {
    "plain": {"gradient_checkpointing": False},
    "cache": {"gradient_checkpointing": False, "use_cache": True},
    "checkpointing": {"gradient_checkpointing": True},
    "compiled": {
        "gradient_checkpointing": False,
        "torch_compile": True,
        "torch_compile_backend": "aot_eager",
    },
}


def settings(folder, run: str = "plain") -> dict:
    """Four documents a step, in the same order in every run."""
    arguments = RUNS[run] | {
        "output_dir": str(folder),
        "use_cpu": ON_CPU,
        "bf16": not EXACT,
        "max_steps": STEPS_OF_A_RUN,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if "use_cache" not in TrainingArguments.__dataclass_fields__:
        arguments.pop("use_cache", None)  # older releases leave it to the model
    return arguments


def small(attention: str):
    torch.compiler.reset()
    return build(available("llama"), attention, dtype=torch.float32, num_hidden_layers=1)


def padded(features: list[dict]) -> dict:
    """A right-padded batch, whose mask keeps documents apart in any implementation."""
    ids, mask, labels = (
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler)
        for rows, filler in (
            ([f["input_ids"] for f in features], 0),
            ([[1] * len(f["input_ids"]) for f in features], 0),
            # Older trainers divide by the number of labels, the first ones included.
            ([[-100, *f["input_ids"][1:]] for f in features], -100),
        )
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_losses(actual: list[float], expected: list[float]) -> None:
    assert len(expected) == STEPS_OF_A_RUN and abs(expected[0] - expected[-1]) > 0.01
    assert actual == pytest.approx(expected, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("run", RUNS)
def test_trainer_without_padding(run, tmp_path):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    results = []
    for attention, kind, collator in (
        ("heed", run, DataCollatorWithFlattening()),
        ("eager", "plain", padded),
    ):
        arguments = TrainingArguments(**settings(tmp_path, kind))
        model = small(attention)
        trainer = Trainer(model, arguments, train_dataset=TEXTS, data_collator=collator)
        results.append(losses(trainer))
    assert_same_losses(*results)


@pytest.fixture
def sft(tmp_path):
    """Makes a trainer of TRL's for texts that are tokens already."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    datasets = pytest.importorskip("datasets", reason="TRL needs datasets")
    words = Tokenizer(WordLevel({f"<{i}>": i for i in range(VOCAB)}, unk_token="<0>"))
    names = {"pad_token": "<0>", "eos_token": "<2>"}

    def make(attention: str, run: str, **options):
        return trl.SFTTrainer(
            small(attention),
            trl.SFTConfig(**settings(tmp_path, run), **options),
            train_dataset=datasets.Dataset.from_list(TEXTS),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **names),
        )

    return make


@pytest.mark.parametrize("run", list(RUNS)[:3])
def test_trl_without_padding(run, sft):
    free = losses(sft("heed", run, padding_free=True, max_length=None))
    assert_same_losses(free, losses(sft("eager", "plain")))


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
@pytest.mark.parametrize("run", list(RUNS)[:3])
def test_trl_packing(run, strategy, sft, monkeypatch):
    """Rows of 14 tokens, four a step; "bfd_split" cuts the longest text in two."""
    packing = {"packing": True, "packing_strategy": strategy, "max_length": 14}
    trainer = sft("heed", run, **packing)
    batches = []

    def collate(features):
        batches.append(trainer_collates(features))
        return batches[-1]

    trainer_collates = trainer.data_collator
    monkeypatch.setattr(trainer, "data_collator", collate)
    actual = losses(trainer)
    # Without a cache Transformers' own masks keep documents apart.
    assert_same_losses(actual, losses(sft("eager", "plain", **packing)))
    ids, positions = (batches[0][name][0].to(DEVICE) for name in ("input_ids", "position_ids"))
    starts = (positions == 0).nonzero()[:, 0].tolist()
    assert len(starts) > 4
    texts = ids.tensor_split(starts[1:])
    assert actual[0] == pytest.approx(
        each_alone(small("eager"), texts).item(), rel=LOSS_TOLERANCE
    )
