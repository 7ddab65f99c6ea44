"""Greedy decoding, and when two runs of it are the same."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from transformers import masking_utils

STEPS = 20


def skip_impossible(name: str, cache: str) -> None:
    """Some releases, 5.17 among them, call a function with an argument that it does not take."""
    if name != "llama4_text" or cache != "static":
        return
    caller = inspect.signature(masking_utils.create_masks_for_generate).parameters
    called = inspect.signature(masking_utils.create_chunked_causal_mask).parameters
    if "block_sequence_ids" in caller and "block_sequence_ids" not in called:
        pytest.skip("this Transformers makes no chunked mask for a static cache: TypeError")


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    def is_float(x):
        return isinstance(x, Tensor) and x.is_floating_point()

    return {name: x.to(dtype) if is_float(x) else x for name, x in inputs.items()}


def greedy(model, inputs: dict, **arguments):
    """20 tokens after the prompt, with the logits that they were chosen by."""
    inputs = cast(inputs, next(model.parameters()).dtype)
    inputs = {name: x for name, x in inputs.items() if "decoder" not in name and name != "labels"}
    return model.generate(
        **inputs,
        **arguments,
        do_sample=False,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )


def assert_same_tokens(actual, expected, dtype: torch.dtype) -> None:
    """The same tokens; in 16 bits a row may leave the other one where two logits nearly tie.

    So at every step that both rows reach with the same tokens, all logits differ by less than 2 %
    of the largest, and a row ends where the tokens differ.
    """
    tokens, others = (result.sequences[:, -STEPS:] for result in (actual, expected))
    if dtype == torch.float32:
        assert torch.equal(tokens, others)
    same = torch.ones(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for step in range(STEPS):
        got, want = actual.logits[step][same].float(), expected.logits[step][same].float()
        if want.numel() == 0:
            break
        error, largest = (got - want).abs().max().item(), want.abs().max().item()
        assert error <= 0.02 * largest, f"step {step}: {error:.2e} of {largest:.2e}"
        same &= tokens[:, step] == others[:, step]
