"""Small attention problems for heed and the oracle: one per feature, and some of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from device import DEVICE, moved


@dataclass
class Case:
    """Tensors in float64 on the CPU; `to` gives what differentiates the dtype under test."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str = DEVICE) -> Case:
        options = moved(self.options, device)
        # A test of another dtype than the tensors' sets its own.
        for name in ("bias", "sink"):
            if name in options and options[name].dtype == torch.float64:
                options[name] = options[name].to(torch.float32)
        return Case(*(t.to(device, dtype) for t in (self.q, self.k, self.v)), options)


CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    def seeded() -> Case:
        torch.manual_seed(len(make.__name__))
        return make()

    CASES[make.__name__] = seeded
    return make


def make(
    batch: int = 2,
    seqlen_q: int = 5,
    seqlen_k: int = 9,
    heads_q: int = 4,
    heads_k: int = 2,
    head_dim: int = 8,
    head_dim_v: int = 8,
    **options,
) -> Case:
    q = torch.randn(batch, seqlen_q, heads_q, head_dim, dtype=torch.float64)
    k = torch.randn(batch, seqlen_k, heads_k, head_dim, dtype=torch.float64)
    v = torch.randn(batch, seqlen_k, heads_k, head_dim_v, dtype=torch.float64)
    return Case(q, k, v, options)


def packed(lengths_q: list[int], lengths_k: list[int], **options) -> Case:
    dense = make(1, sum(lengths_q), sum(lengths_k), **options)
    dense.options |= {"cu_seqlens_q": ends(lengths_q), "cu_seqlens_k": ends(lengths_k)}
    return Case(dense.q[0], dense.k[0], dense.v[0], dense.options)


def ends(lengths: list[int]) -> Tensor:
    return int32([0, *torch.tensor(lengths).cumsum(0).tolist()])


def int32(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def poison(tensor: Tensor, starts: list[int], lengths: list[int]) -> None:
    """Writes NaN around the tokens of a padded tensor."""
    for row, start, length in zip(tensor, starts, lengths, strict=True):
        row[:start] = torch.nan
        row[start + length :] = torch.nan


@case
def full() -> Case:
    return make()


@case
def causal() -> Case:
    return make(seqlen_q=9, seqlen_k=13, causal=True)


@case
def causal_with_rows_without_keys() -> Case:
    return make(seqlen_q=9, seqlen_k=4, causal=True)


@case
def window() -> Case:
    return make(seqlen_q=12, seqlen_k=20, left=3, right=2)


@case
def left_only() -> Case:
    return make(seqlen_q=12, seqlen_k=10, left=0)


@case
def chunked() -> Case:
    return make(seqlen_q=11, seqlen_k=14, causal=True, chunk=4)


@case
def one_head_for_all() -> Case:
    return make(heads_q=6, heads_k=1, causal=True)


@case
def three_heads_per_group() -> Case:
    return make(heads_q=6, heads_k=2)


@case
def wider_v() -> Case:
    return make(head_dim=8, head_dim_v=24, causal=True)


@case
def narrower_v() -> Case:
    return make(head_dim=24, head_dim_v=5)


@case
def odd_head_dim() -> Case:
    return make(head_dim=7, head_dim_v=3)


@case
def one_query_many_keys() -> Case:
    return make(batch=1, seqlen_q=1, seqlen_k=2100, causal=True)


@case
def tiles() -> Case:
    return make(batch=1, seqlen_q=150, seqlen_k=170, heads_q=2, heads_k=1, causal=True)


@case
def scale() -> Case:
    return make(scale=0.7)


@case
def softcap() -> Case:
    return make(softcap=1.5, causal=True)


@case
def sink() -> Case:
    return make(seqlen_q=9, seqlen_k=4, causal=True, sink=torch.randn(4, dtype=torch.float64))


@case
def sink_in_bf16() -> Case:
    return make(sink=torch.randn(4).bfloat16())


@case
def bias() -> Case:
    return make(bias=torch.randn(2, 4, 5, 9, dtype=torch.float64))


@case
def bias_that_hides() -> Case:
    values = torch.randn(2, 4, 5, 9, dtype=torch.float64)
    values[torch.rand(2, 4, 5, 9) < 0.4] = -torch.inf
    values[1, 2, 3] = -torch.inf
    return make(bias=values)


@case
def bias_of_all_rows() -> Case:
    return make(bias=torch.randn(2, 1, 1, 9, dtype=torch.float64), causal=True)


@case
def bias_of_all_entries() -> Case:
    return make(bias=torch.randn(1, 4, 5, 9, dtype=torch.float64))


@case
def bias_of_everything() -> Case:
    return make(bias=torch.randn(1, 1, 1, 9, dtype=torch.float64), softcap=2.0)


@case
def bias_in_bf16() -> Case:
    return make(bias=torch.randn(2, 4, 5, 9).bfloat16())


@case
def bias_in_f16() -> Case:
    return make(bias=torch.randn(1, 4, 1, 9).half())


@case
def bias_expanded() -> Case:
    return make(bias=torch.randn(2, 1, 5, 1, dtype=torch.float64).expand(2, 4, 5, 9))


@case
def mask() -> Case:
    visible = torch.rand(2, 1, 5, 9) < 0.6
    visible[0, 0, 2] = False
    return make(bias=visible)


@case
def mask_of_all_rows() -> Case:
    return make(bias=torch.rand(2, 1, 1, 9) < 0.6, causal=True)


@case
def packed_causal() -> Case:
    return packed([3, 0, 5, 1], [4, 2, 5, 0], causal=True)


@case
def packed_with_bounds() -> Case:
    return packed([3, 6], [3, 6], max_seqlen_q=6, max_seqlen_k=torch.tensor(6), left=2)


@case
def packed_with_bias() -> Case:
    values = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    return packed([3, 6], [7, 5], max_seqlen_q=6, max_seqlen_k=7, bias=values)


@case
def packed_and_used() -> Case:
    c = packed([4, 5], [6, 7], seqused_q=int32([2, 5]), seqused_k=int32([6, 3]), causal=True)
    c.q[2:4] = c.k[9:] = c.v[9:] = torch.nan
    return c


@case
def packed_queries_dense_keys() -> Case:
    c = make(batch=2, seqlen_q=5, seqlen_k=9, causal=True, cu_seqlens_q=ends([2, 3]))
    return Case(c.q[0], c.k, c.v, c.options)


@case
def left_padding() -> Case:
    c = make(seqlen_q=9, seqlen_k=9, causal=True, start_q=int32([0, 4]), start_k=int32([0, 4]))
    for tensor in (c.q, c.k, c.v):
        poison(tensor, [0, 4], [9, 5])
    return c


@case
def right_padding() -> Case:
    c = make(seqlen_q=9, seqlen_k=9, seqused_q=int32([9, 4]), seqused_k=int32([9, 4]))
    for tensor in (c.q, c.k, c.v):
        poison(tensor, [0, 0], [9, 4])
    return c


@case
def padding_on_both_sides() -> Case:
    c = make(seqlen_q=9, seqlen_k=12, left=2, right=1)
    c.options |= {"start_q": int32([1, 3]), "seqused_q": int32([6, 2])}
    c.options |= {"start_k": int32([2, 0]), "seqused_k": int32([7, 0])}
    poison(c.q, [1, 3], [6, 2])
    poison(c.k, [2, 0], [7, 0])
    poison(c.v, [2, 0], [7, 0])
    return c


@case
def static_cache() -> Case:
    c = make(seqlen_q=1, seqlen_k=16, causal=True, seqused_k=int32([5, 11]))
    poison(c.k, [0, 0], [5, 11])
    poison(c.v, [0, 0], [5, 11])
    return c


@case
def paged() -> Case:
    c = make(seqlen_q=3, causal=True, seqused_k=int32([5, 9]))
    c.k = torch.randn(7, 4, 2, 8, dtype=torch.float64)
    c.v = torch.randn(7, 4, 2, 8, dtype=torch.float64)
    c.options["page_table"] = int32([[6, 2, 0], [1, 0, 4]])
    for tensor in (c.k, c.v):
        tensor[2, 1:] = tensor[4, 1:] = tensor[3] = tensor[5] = torch.nan
    return c


def random_intervals(*shape: int, keys: int) -> Tensor:
    first = torch.randint(-1, keys, shape)
    return torch.stack([first, first + torch.randint(-1, keys + 2, shape)], dim=-1).int()


@case
def intervals() -> Case:
    return make(intervals=random_intervals(2, 5, keys=9))


@case
def intervals_shared_and_causal() -> Case:
    return make(seqlen_q=9, intervals=random_intervals(1, 9, keys=9), causal=True)


@case
def intervals_packed() -> Case:
    return packed([3, 6], [7, 5], intervals=random_intervals(9, keys=7))


@case
def intervals_padded() -> Case:
    c = make(intervals=random_intervals(2, 5, keys=9), start_k=int32([3, 1]), start_q=int32([1, 0]))
    poison(c.k, [3, 1], [6, 8])
    return c


@case
def key_bits() -> Case:
    return make(seqlen_k=40, key_bits=torch.randint(-(2**31), 2**31, (2, 2)).int(), causal=True)


@case
def key_bits_shared_and_short() -> Case:
    return make(seqlen_k=40, key_bits=torch.randint(-(2**31), 2**31, (1, 1)).int())


@case
def dropout() -> Case:
    return make(dropout_p=0.3, seed=torch.tensor([123456789012345]))


@case
def dropout_packed() -> Case:
    return packed([3, 6], [7, 5], dropout_p=0.5, seed=torch.tensor([-7]), causal=True)


@case
def everything() -> Case:
    c = make(
        seqlen_q=21,
        seqlen_k=37,
        heads_q=6,
        heads_k=2,
        head_dim=16,
        head_dim_v=12,
        scale=0.3,
        softcap=2.5,
        left=17,
        right=3,
        start_q=int32([2, 0]),
        start_k=int32([0, 5]),
        seqused_q=int32([19, 20]),
        seqused_k=int32([36, 30]),
        intervals=random_intervals(2, 21, keys=37),
        key_bits=torch.randint(-(2**31), 2**31, (2, 2)).int(),
        bias=torch.randn(2, 6, 21, 37, dtype=torch.float64),
        sink=torch.randn(6, dtype=torch.float64),
        dropout_p=0.2,
        seed=torch.tensor([99]),
    )
    poison(c.q, [2, 0], [19, 20])
    poison(c.k, [0, 5], [36, 30])
    poison(c.v, [0, 5], [36, 30])
    return c
