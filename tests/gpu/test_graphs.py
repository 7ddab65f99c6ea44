"""CUDA graphs: a replay reads what the tensors then hold, lengths among it."""

from __future__ import annotations

import pytest
import torch
from gpu import (
    GPU,
    NAMES,
    WITH_BACKWARD,
    assert_same,
    capture,
    case_of,
    dense,
    forward,
    forward_and_backward,
    upstream,
)

from cases import Case, int32


def captured(name: str, case: Case):
    """The replay, its results, and the same calls without a graph."""
    if name not in WITH_BACKWARD:
        return *capture(lambda: forward(case)), lambda: forward(case)
    gradients = upstream(case)

    def call():
        return forward_and_backward(case, gradients)

    return *capture(call), call


@pytest.mark.parametrize("name", NAMES)
def test_replay_with_other_contents(name: str) -> None:
    case = case_of(name)
    replay, results, call = captured(name, case)
    with torch.no_grad():
        for t, factor in ((case.q, -0.5), (case.k, 1.25), (case.v, -3.0)):
            t.mul_(factor)
    replay()
    assert_same(results[:2], call()[:2], bits=True)
    assert_same(results[2:], call()[2:])


LENGTHS = {
    "packed_causal": {
        "cu_seqlens_q": int32([0, 1, 4, 4, 9]),
        "cu_seqlens_k": int32([0, 0, 5, 9, 11]),
    },
    "packed_and_used": {"seqused_q": int32([4, 0]), "seqused_k": int32([0, 7])},
    "left_padding": {"start_q": int32([2, 1]), "start_k": int32([3, 0])},
    "right_padding": {"seqused_q": int32([0, 7]), "seqused_k": int32([5, 9])},
    "static_cache": {"seqused_k": int32([16, 1])},
    "paged": {"seqused_k": int32([9, 2]), "page_table": int32([[5, 3, 1], [6, 0, 0]])},
    "intervals": {"intervals": int32([[[row, 2 * row + 1] for row in range(5)]] * 2)},
    "intervals_packed": {"intervals": int32([[row % 3, 7 - row % 2] for row in range(9)])},
    "key_bits": {"key_bits": int32([[0x0F0F0F0F, 0x55], [-1, 0]])},
    "dropout": {"seed": torch.tensor([-5])},
    "everything": {
        "start_q": int32([0, 3]),
        "start_k": int32([7, 1]),
        "seqused_q": int32([11, 18]),
        "seqused_k": int32([13, 36]),
        "intervals": int32([[[row - 5, row + 9] for row in range(21)]] * 2),
        "seed": torch.tensor([100]),
    },
}


@pytest.mark.parametrize("name", LENGTHS)
def test_replay_with_other_lengths(name: str) -> None:
    case = case_of(name, poisoned=False)
    replay, results, call = captured(name, case)
    replay()
    first = [t.clone() for t in results]
    assert_same(first[:2], call()[:2], bits=True)
    for of, values in LENGTHS[name].items():
        case.options[of].copy_(values)
    replay()
    assert not torch.equal(results[0], first[0])
    assert_same(results[:2], call()[:2], bits=True)
    assert_same(results[2:], call()[2:])


def test_decoding_replays_with_every_length() -> None:
    """A static cache of 5000 slots, whose keys are split among blocks."""
    lengths = int32([1, 1]).to(GPU)
    case = dense(seqlen_q=1, seqlen_k=5000, causal=True, seqused_k=lengths)
    replay, results = capture(lambda: forward(case))
    for values in ([1, 2], [31, 4999], [5000, 33], [0, 1027]):
        lengths.copy_(int32(values))
        replay()
        got = [t.clone() for t in results]
        assert_same(got, forward(case), bits=True)
        for entry, length in enumerate(values):
            alone = Case(
                case.q[entry : entry + 1],
                case.k[entry : entry + 1, :length],
                case.v[entry : entry + 1, :length],
                {"causal": True},
            )
            assert_same([t[entry : entry + 1] for t in got], forward(alone))


def test_many_replays_give_the_same_bits() -> None:
    case = dense(seqlen_q=1, seqlen_k=5000)
    replay, results = capture(lambda: forward(case))
    replay()
    first = [t.clone() for t in results]
    for _ in range(100):
        replay()
    assert_same(results, first, bits=True)
