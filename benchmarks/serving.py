"""Requests per second of Transformers' continuous batching with heed and with other attentions.

One set of random weights serves every attention. Each keeps its manager and its cache; rounds of
requests, the same for all and new in every round, go to them in turn, and a rate is that of the
median round. A round lasts from the first request to the last token of the last one. A request
generates a fixed number of tokens, all of them greedy.

In 16 bits two attentions seldom generate the same tokens: random weights leave many tokens nearly
equal, and after the first that differs so does all that follows. So every attention is judged by
itself: what it generated goes through the model in fp32 in one piece, and each token should be one
that fp32 would choose there, or nearly.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

import heed.transformers  # noqa: F401

HERE = Path(__file__).resolve().parent
ON_GPU = torch.cuda.is_available()
sys.path.insert(0, str(HERE / ("cuda" if ON_GPU else "cpu")))
if ON_GPU:
    from machine import machine
else:
    from bench import machine

DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
DEVICE = "cuda" if ON_GPU else "cpu"
SCALE = 8 if ON_GPU else 1  # requests, and how much longer prompts are
LONG = 16 if ON_GPU else 8  # requests with long prompts, which take sdpa seconds each
JUDGED = 4  # requests of the last round
# Between the logits of a token and of fp32's choice, in standard deviations of all logits there.
# With these weights bf16 leads to 0.03 on a CPU and to 0.12 on a GPU, where the model is larger;
# attention to the last 8 keys only leads to 3.8 in the mean.
BEHIND = {torch.bfloat16: 0.25, torch.float32: 1e-3}


@dataclass(frozen=True)
class Work:
    """Requests with prompts of shortest to longest tokens, spread evenly, behind a shared one."""

    name: str
    requests: int
    shortest: int
    longest: int
    new: int
    shared: int = 0
    window: int | None = None

    @property
    def shape(self) -> str:
        text = f"{self.requests} requests, prompts {self.shortest} to {self.longest}"
        text += f" after {self.shared} shared" if self.shared else ""
        text += f", window {self.window}" if self.window else ""
        return f"{text}, {self.new} new"

    def prompts(self, round: int, vocab: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(round)

        def ids(length: int) -> list[int]:
            return torch.randint(10, vocab, (length,), generator=generator).tolist()

        shared = ids(self.shared)
        lengths = torch.linspace(self.shortest, self.longest, self.requests).long()
        order = torch.randperm(self.requests, generator=generator)
        return [shared + ids(length) for length in lengths[order].tolist()]


WORKS = [
    Work("chat", 16 * SCALE, 16, 128, 64),
    Work("documents", LONG, 256 * SCALE, 1024 * SCALE, 32),
    Work("shared prefix", 16 * SCALE, 8, 64, 32, shared=512 * SCALE),
    Work("window layers", LONG, 256 * SCALE, 1024 * SCALE, 32, window=128 * SCALE),
]


def build(window: int | None, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A Llama, or a Mistral with a window; of the shape of Llama-3.2-1B on a GPU."""
    shape = {
        "hidden_size": 2048 if ON_GPU else 512,
        "intermediate_size": 8192 if ON_GPU else 1408,
        "num_hidden_layers": 16 if ON_GPU else 8,
        "num_attention_heads": 32 if ON_GPU else 8,
        "num_key_value_heads": 8 if ON_GPU else 2,
        "vocab_size": 128256 if ON_GPU else 8192,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    kind = transformers.LlamaForCausalLM if window is None else transformers.MistralForCausalLM
    config = (
        kind.config_class(**shape)
        if window is None
        else kind.config_class(**shape, sliding_window=window)
    )
    return kind(config).to(DEVICE, dtype).eval()


class Server:
    """A manager of continuous batching for the weights of a model, with an attention of its own."""

    def __init__(self, model: transformers.PreTrainedModel, attention: str, work: Work) -> None:
        own = {id(p): p for p in model.parameters()}  # not copied
        self.model = copy.deepcopy(model, own)
        self.model.set_attn_implementation(attention)
        page = 256 if ON_GPU else 64
        longest = work.shared + work.longest + work.new
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(
                max_new_tokens=work.new, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page,
                num_blocks=(longest // page + 2) * work.requests,
                max_batch_tokens=512 * SCALE,
                max_blocks_per_request=longest // page + 2,
                auto_switch_to_flash=False,
            ),
        )
        self.manager.start()

    def serve(self, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
        """Seconds, and the tokens of every request."""
        start = time.perf_counter()
        names = self.manager.add_requests(prompts)
        results = {}
        while len(results) < len(prompts):
            result = self.manager.get_result(timeout=60)
            if result is None or result.error:
                raise RuntimeError(result.error if result else "no result within a minute")
            if result.is_finished():
                results[result.request_id] = result.generated_tokens
        return time.perf_counter() - start, [results[name] for name in names]

    def stop(self) -> None:
        self.manager.stop(block=True)


def judge(reference, prompts: list[list[int]], tokens: list[list[int]]) -> dict[str, float]:
    """The share of tokens that `reference` chooses too, and how far the worst is behind."""
    behind = []
    for prompt, new in zip(prompts, tokens, strict=True):
        ids = torch.tensor([prompt + new], device=DEVICE)
        kept = reference(ids, use_cache=False, logits_to_keep=len(new) + 1).logits[0, :-1]
        chosen = kept.gather(1, torch.tensor(new, device=DEVICE)[:, None])[:, 0]
        behind.append((kept.amax(-1) - chosen) / kept.std(-1))
    behind = torch.cat(behind)
    return {"same": (behind == 0).double().mean().item(), "behind": behind.amax().item()}


def measure(work: Work, attentions: list[str], rounds: int, dtype: torch.dtype) -> dict:
    model = build(work.window, dtype)
    servers = {name: Server(model, name, work) for name in attentions}
    seconds: dict[str, list[float]] = {name: [] for name in attentions}
    for round in range(rounds + 1):
        prompts = work.prompts(round, model.config.vocab_size)
        tokens = {}
        for name, server in servers.items():
            taken, tokens[name] = server.serve(prompts)
            if round:  # the first one warms up
                seconds[name].append(taken)
    for server in servers.values():
        server.stop()
    servers.clear()  # their caches are large
    rates = {name: work.requests / statistics.median(times) for name, times in seconds.items()}
    reference = copy.deepcopy(model).float()
    reference.set_attn_implementation("sdpa")
    chosen = slice(None, None, -(-len(prompts) // JUDGED))
    judged = {name: judge(reference, prompts[chosen], tokens[name][chosen]) for name in attentions}
    print(
        f"{work.name:14} {work.shape:60} {DTYPES[dtype]} "
        + "  ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
        + " requests/s; tokens that fp32 chooses too, and the worst one behind its choice: "
        + "  ".join(f"{n} {j['same']:.1%}, {j['behind']:.2g}" for n, j in judged.items()),
        flush=True,
    )
    for name, told in judged.items():
        if not told["behind"] <= BEHIND[dtype]:
            raise SystemExit(
                f"{name}: a token is {told['behind']:.2g} deviations of the logits behind, "
                f"{BEHIND[dtype]} at most were expected"
            )
    return {
        "work": work.name,
        "shape": work.shape,
        "dtype": DTYPES[dtype],
        "new_tokens": work.new,
        "requests_per_s": rates,
        "seconds": seconds,
        "judged": judged,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=list(DTYPES.values()), help="default: both")
    parser.add_argument("--attentions", default="heed,sdpa", help="names, separated by commas")
    parser.add_argument(
        "--only", action="append", choices=[work.name for work in WORKS], help="repeat for several"
    )
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtypes = [d for d, name in DTYPES.items() if args.dtype in (None, name)]
    if ON_GPU:  # heed's kernels there take 16 bits
        dtypes = [torch.bfloat16]
    works = [work for work in WORKS if work.name in (args.only or [work.name])]
    own = {
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    cells = []
    for dtype in dtypes:
        for work in works:
            with torch.no_grad():
                cells.append(measure(work, args.attentions.split(","), args.rounds, dtype))
            if args.save:  # what there is, in case that the next one fails
                path = HERE / "results" / f"{args.save}.json"
                data = {"machine": machine() | own, "cells": cells}
                path.write_text(json.dumps(data, indent=1) + "\n")
    if args.save:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
