"""Times a Llama on one GPU with heed and with the other attentions, in turn in one process.

The model has the shape of Llama-3.2-1B, random weights and bf16. Its attention is switched from one
measurement to the next, so that all see the same clocks. A time is the median of the rounds, from
an idle GPU to an idle GPU. A training step is forward, loss and backward, without gradient
checkpointing and without an optimizer. Masks are the 2-D ones of a tokenizer; where nothing is
padded, generation gets one of ones, and prefill and training get none.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from machine import machine
from torch import Tensor

import heed
import heed.transformers

RESULT = Path(__file__).resolve().parents[1] / "results" / "cuda_transformers.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16
FILL = 0.69  # real tokens of all, where padded
DOCUMENTS = (6144, 4096, 2560, 1792, 1152, 640)  # of one packed row of 16384

Run = Callable[[], Tensor]


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def implementations() -> list[str]:
    """heed, sdpa, and the FlashAttentions that are installed."""
    flash = []
    for version in (2, 3, 4):
        is_available = getattr(transformers.utils, f"is_flash_attn_{version}_available", bool)
        flash += [f"flash_attention_{version}"] if is_available() else []
    return ["heed", "sdpa", *flash]


def works(runs: dict[str, Run]) -> list[str]:
    """Those that do not fail, warmed up. Prints how results differ."""
    results: dict[str, Tensor] = {}
    for name, run in runs.items():
        try:
            results[name] = run().detach()
            run()
        except Exception as error:
            print(f"  {name} fails: {type(error).__name__}: {str(error).splitlines()[0]}")
    first = results.get("heed", torch.zeros(())).double()
    for name, result in results.items():
        if "heed" in results and name != "heed" and result.is_floating_point():
            if result.shape != first.shape:  # heads before tokens
                result = result.transpose(1, 2)
            difference = (first - result.double()).abs().max() / first.abs().max()
            print(f"  largest difference to {name}: {difference.item():.1e}")
    return list(results)


def interleaved(
    shapes: dict[str, dict[str, Run]], rounds: int, calls: int = 1, wait_for_gpu: bool = True
) -> dict[str, dict[str, float | None]]:
    """Median ms of a call, the runs of all shapes in turn; None for one that fails."""
    times = {shape: {name: [] for name in works(runs)} for shape, runs in shapes.items()}
    for _ in range(rounds):
        for shape, logs in times.items():
            for name, log in logs.items():
                synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    shapes[shape][name]()
                if wait_for_gpu:
                    synchronize()
                log.append((time.perf_counter() - start) * 1e3 / calls)
    return {
        shape: {name: statistics.median(logs[name]) if name in logs else None for name in runs}
        for (shape, runs), logs in zip(shapes.items(), times.values(), strict=True)
    }


# ---- the model ----


def llama(tiny: bool) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=128 if tiny else 2048,
        intermediate_size=256 if tiny else 8192,
        num_hidden_layers=2 if tiny else 16,
        num_attention_heads=4 if tiny else 32,
        num_key_value_heads=2 if tiny else 8,
        vocab_size=512 if tiny else 128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        attn_implementation="heed",
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


def lengths(batch: int, seqlen: int) -> Tensor:
    """Evenly spread, the last one seqlen, FILL of all slots together. [batch]"""
    return torch.linspace((2 * FILL - 1) * seqlen, seqlen, batch, device=DEVICE).round().int()


def padding_mask(batch: int, seqlen: int, side: str) -> Tensor:
    slot = torch.arange(seqlen, device=DEVICE)
    slot = slot if side == "right" else slot.flip(0)
    return (slot < lengths(batch, seqlen)[:, None]).long()


class Model:
    """What is measured of a model; every method returns {implementation: run}."""

    def __init__(self, names: list[str], tiny: bool) -> None:
        self.model = llama(tiny)
        self.names = names
        self.vocab = self.model.config.vocab_size

    def ids(self, batch: int, seqlen: int) -> Tensor:
        return torch.randint(10, self.vocab, (batch, seqlen), device=DEVICE)

    def of_each(self, call: Callable[[], Tensor]) -> dict[str, Run]:
        # A Llama reads the name in every layer's call, so switching is an assignment.
        def run(name: str) -> Tensor:
            self.model.config._attn_implementation = name
            return call()

        for name in self.names:
            self.model.set_attn_implementation(name)  # loads what it needs
        return {name: lambda name=name: run(name) for name in self.names}

    def generate(self, batch: int, seqlen: int, padding: str = "none") -> dict[str, Run]:
        ids = self.ids(batch, seqlen)
        mask = torch.ones_like(ids) if padding == "none" else padding_mask(batch, seqlen, padding)
        settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}

        def call() -> Tensor:
            return self.model.generate(ids, attention_mask=mask, pad_token_id=0, **settings)

        return self.of_each(call)

    def prefill(self, batch: int, seqlen: int, padding: str = "none") -> dict[str, Run]:
        ids = self.ids(batch, seqlen)
        mask = None if padding == "none" else padding_mask(batch, seqlen, padding)

        @torch.no_grad()
        def call() -> Tensor:
            result = self.model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
            return result.logits[-1]  # the row without padding

        return self.of_each(call)

    def train(self, batch: int, seqlen: int, documents: tuple[int, ...] = ()) -> dict[str, Run]:
        ids = self.ids(batch, seqlen)
        positions = None
        if documents:
            positions = torch.cat([torch.arange(n, device=DEVICE) for n in documents])[None]

        def call() -> Tensor:
            self.model.zero_grad(set_to_none=True)
            loss = self.model(ids, position_ids=positions, labels=ids, use_cache=False).loss
            loss.backward()
            return self.model.model.layers[0].self_attn.q_proj.weight.grad

        return self.of_each(call)


# ---- one call ----


def random(*shape: int, requires_grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=requires_grad)


def host_time(requires_grad: bool) -> dict[str, Run]:
    """Until a call returns; both get, and give, the layout that they are made for."""
    q, k, v = (random(1, 128, 8, 64, requires_grad=requires_grad) for _ in range(3))
    heads_first = [t.detach().transpose(1, 2).contiguous() for t in (q, k, v)]
    heads_first = [t.requires_grad_(requires_grad) for t in heads_first]
    return {
        "heed": lambda: heed.attention(q, k, v, causal=True),
        "sdpa": lambda: F.scaled_dot_product_attention(*heads_first, is_causal=True),
    }


def padded(tiny: bool, packed_only: bool) -> dict[str, Run]:
    """heed on the real tokens beside SDPA on all of them, causal, without a mask.

    From the padded tensors and their mask to the padded result; or on tensors that are packed.
    """
    batch, seqlen = (2, 128) if tiny else (16, 2048)
    mask = padding_mask(batch, seqlen, "right")
    q, k, v = (random(batch, seqlen, heads, 128) for heads in (32, 8, 8))

    def from_mask() -> Tensor:
        used = mask.sum(-1, dtype=torch.int32)
        return heed.attention(q, k, v, causal=True, seqused_q=used, seqused_k=used)[-1]

    real = mask.bool()
    packed = [t[real] for t in (q, k, v)]
    ends = F.pad(real.sum(-1).cumsum(0), (1, 0)).int()

    def from_packed() -> Tensor:
        out = heed.attention(*packed, causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends)
        return out[-seqlen:]  # the last entry has no padding

    heads_first = [t.transpose(1, 2) for t in (q, k, v)]

    def dense() -> Tensor:
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out[-1].transpose(0, 1)

    return {"heed": from_packed if packed_only else from_mask, "sdpa": dense}


# ---- the table ----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: a check")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    args = parser.parse_args()
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    names = implementations()
    cells = []

    def measure(work: str, shapes: dict[str, dict[str, Run]], times: int = 1, **options) -> None:
        """Shapes that are compared with each other are measured together, in `times` the rounds."""
        for shape, ms in interleaved(shapes, times * args.rounds, **options).items():
            cells.append({"work": work, "shape": shape, "ms": ms})
            text = [f"{ms[name]:10.3f}" if ms.get(name) else f"{'-':>10}" for name in names]
            ratio = f"{ms['sdpa'] / ms['heed']:10.2f}x" if ms["sdpa"] and ms["heed"] else ""
            print(f"{work:10} {shape:36}" + "".join(text) + ratio)
        sys.stdout.flush()

    columns = "".join(f"{name.replace('_attention_', ' ') + ' ms':>10}" for name in names)
    print(f"{'work':10} {'shape':36}{columns}  sdpa / heed")
    calls = 3 if args.tiny else 300
    for grad in (False, True):
        shape = f"B1 S128 H8 D64, {'forward with' if grad else 'no'} grad"
        measure("host time", {shape: host_time(grad)}, calls=calls, wait_for_gpu=False)
    calls = 1 if args.tiny else 20
    shape = f"B16 S2048 H32/8 D128 {FILL:.0%}"
    kinds = {
        f"{shape}, mask": padded(args.tiny, False),
        f"{shape}, packed": padded(args.tiny, True),
    }
    measure("padded", kinds, calls=calls)

    model = Model(names, args.tiny)
    part = 64 if args.tiny else 1  # of every length
    n, long = 512 // part, 2048 // part
    # Generating waits for the host, whose load comes and goes.
    measure("generate", {"1 x 8 + 20": model.generate(1, 8)}, times=3)
    shapes = {"4 x 512 + 20": model.generate(4, n)}
    shapes |= {"4 x 512 + 20, left-padded": model.generate(4, n, "left")}
    measure("generate", shapes, times=3)
    shapes = {"16 x 2048": model.prefill(16, long)}
    measure("prefill", shapes | {f"16 x 2048, {FILL:.0%} full": model.prefill(16, long, "right")})
    model.model.train()
    documents = tuple(length // part for length in DOCUMENTS)
    shapes = {"2 x 8192": model.train(2, 8192 // part)}
    packed = {f"1 x 16384, {len(documents)} documents": model.train(1, sum(documents), documents)}
    measure("training", shapes | packed)

    if args.save:
        versions = {"transformers": transformers.__version__, "python": platform.python_version()}
        data = {"machine": machine() | versions, "cells": cells}
        RESULT.write_text(json.dumps(data, indent=1) + "\n")
        print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
