"""Trains a small BERT and a small Llama with eager and with heed and compares their losses.

The BERT takes padded batches and dropout, the Llama packed documents.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data"
PLOT = ROOT / "build" / "finetune.png"

# Tokens are the bytes of the text, and three more.
PAD, BEGIN, MASK, VOCABULARY = 256, 257, 258, 259
IGNORED = -100  # label of a token without a loss
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
}

Batch = dict[str, torch.Tensor]


def read_documents(longest: int) -> list[list[int]]:
    """Returns the sample texts as token ids, cut at `longest`."""
    blocks = [
        block for file in sorted(DATA.glob("*.txt")) for block in file.read_text().split("\n\n")
    ]
    return [[BEGIN, *" ".join(block.split()).encode()][:longest] for block in blocks]


def padded_batches(documents: list[list[int]], steps: int, batch_size: int) -> Iterator[Batch]:
    """Masked language modelling: right-padded texts, 15 % of the tokens to be guessed."""
    draw = torch.Generator().manual_seed(1)
    shuffle = random.Random(1)
    for _ in range(steps):
        texts = shuffle.sample(documents, batch_size)
        length = max(map(len, texts))
        ids = torch.tensor([text + [PAD] * (length - len(text)) for text in texts])
        guessed = (torch.rand(ids.shape, generator=draw) < 0.15) & (ids < PAD)
        yield {
            "input_ids": ids.masked_fill(guessed, MASK),
            "attention_mask": (ids != PAD).long(),
            "labels": ids.masked_fill(~guessed, IGNORED),
        }


def packed_batches(documents: list[list[int]], steps: int, length: int) -> Iterator[Batch]:
    """Causal language modelling: documents end to end in one row without a mask.

    The position_ids start again at each document, which is what keeps them apart.
    """
    shuffle = random.Random(2)
    for _ in range(steps):
        ids: list[int] = []
        positions: list[int] = []
        labels: list[int] = []
        while len(ids) < length:
            text = shuffle.choice(documents)[: length - len(ids)]
            ids += text
            positions += range(len(text))
            labels += [
                IGNORED,
                *text[1:],
            ]  # the model shifts labels by one: no document predicts the next one's start
        yield {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
        }


def bert(attention: str) -> PreTrainedModel:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = BertConfig(**SIZES, **dropout, num_attention_heads=3)
    return BertForMaskedLM._from_config(config, attn_implementation=attention)


def llama(attention: str) -> PreTrainedModel:
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(**SIZES, **heads, attention_dropout=0.0, use_cache=False)
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def train(model: PreTrainedModel, batches: list[Batch], progress: tqdm) -> list[float]:
    """Returns the loss of every step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 15))
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
        progress.update()
    return losses


def smooth(losses: list[float], width: int) -> list[float]:
    """Returns the running mean over the last `width` steps."""
    return [
        sum(losses[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(losses))
    ]


@dataclass
class Run:
    """A model to train twice, and how far its two loss curves may be apart."""

    title: str
    build: Callable[[str], PreTrainedModel]
    batches: list[Batch]
    width: int  # steps of the running mean
    tolerance: float

    @property
    def label(self) -> str:
        return "loss" if self.width == 1 else f"loss, mean over {self.width} steps"


def compare(run: Run, names: list[str]) -> tuple[dict[str, list[float]], bool]:
    """Trains with both implementations; returns the loss curves and whether they agree."""
    curves = {}
    for name in names:
        torch.manual_seed(0)
        with tqdm(total=len(run.batches), desc=f"{run.title}, {name}", unit="step") as progress:
            curves[name] = smooth(train(run.build(name), run.batches, progress), run.width)
    reference, actual = curves.values()
    deviation = max(abs(a - b) for a, b in zip(actual, reference, strict=True))
    learnt = actual[-1] < actual[0] - 1
    agrees = deviation <= run.tolerance and learnt

    steps = len(run.batches)
    print(f"\n{run.title}: {run.label}\n")
    print("  step  " + "  ".join(f"{name:>9}" for name in curves))
    for step in [*range(0, steps - 1, max(1, steps // 6)), steps - 1]:
        print(f"  {step:4}  " + "  ".join(f"{curve[step]:9.5f}" for curve in curves.values()))
    verdict = "ok" if agrees else "FAILED" if learnt else "FAILED: the loss did not fall"
    print(
        f"\n  largest deviation {deviation:.1e}, allowed {run.tolerance:g}: {verdict}\n", flush=True
    )
    return curves, agrees


def draw(run: Run, curves: dict[str, list[float]], axis: plt.Axes) -> None:
    styles = [{"lw": 4, "alpha": 0.4}, {"lw": 1.5, "ls": "--"}]
    for (name, curve), style in zip(curves.items(), styles, strict=True):
        axis.plot(curve, label=name, **style)
    axis.set(title=run.title, xlabel="step", ylabel=run.label)
    axis.legend()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--attention", nargs=2, default=["eager", "heed"], help="what to compare")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    if "heed" in args.attention:
        import heed.transformers  # noqa: F401  registers attn_implementation="heed"

    padded = padded_batches(read_documents(256), args.steps, 8)
    packed = packed_batches(read_documents(400), args.steps, 768)
    runs = [
        # Each implementation draws dropout masks of its own, so the curves agree on average only:
        # eager runs that differ in the dropout seed alone deviate by up to 0.02; three times that.
        Run("BERT, padded, dropout 0.1", bert, list(padded), width=20, tolerance=0.06),
        # Only rounding differs: weights perturbed by 3e-7 of their size deviate by 3e-6 at most.
        Run("Llama, packed, no dropout", llama, list(packed), width=1, tolerance=1e-4),
    ]
    figure, axes = plt.subplots(1, len(runs), figsize=(11, 4), layout="constrained")
    all_agree = True
    for axis, run in zip(axes, runs, strict=True):
        curves, agrees = compare(run, args.attention)
        all_agree &= agrees
        draw(run, curves, axis)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=120)
    print(f"Plot: {PLOT.relative_to(ROOT)}")
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
