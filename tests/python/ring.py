"""One of the processes of a context-parallel training step: python ring.py DEVICE RANK SIZE FILE.

It compares the step with the same one in a single process, and fails where they differ.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import _attention, context_parallel

from heed import sdpa

HEADS, KEY_HEADS, DIM = 4, 2, 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def step(x: Tensor, weight: Tensor, dy: Tensor, attend: Callable) -> list[Tensor]:
    """The loss, and the gradient of the weight."""
    heads = F.linear(x, weight).unflatten(-1, (-1, DIM)).transpose(1, 2)
    q, k, v = heads.split([HEADS, KEY_HEADS, KEY_HEADS], dim=1)
    out = attend(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    loss = (out * dy).sum(dtype=torch.float32)
    return [loss.detach(), torch.autograd.grad(loss, weight)[0].float()]


def through_flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
    """scaled_dot_product_attention on a CPU calls an operator that PyTorch's ring does not know."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


def main(device: str, rank: int, size: int, store: str) -> None:
    backend = "gloo" if device == "cpu" else "nccl"
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = init_device_mesh(device, (size,))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    width = (HEADS + 2 * KEY_HEADS) * DIM
    x, dy = (torch.randn(2, 64 * size, n).to(device, dtype) for n in (32, HEADS * DIM))
    weight = (torch.randn(width, 32) / 6).to(device, dtype).requires_grad_()

    want = step(x, weight, dy, F.scaled_dot_product_attention)
    if device == "cpu":
        through_flash.__name__ = "scaled_dot_product_attention"  # context_parallel replaces it
        F.scaled_dot_product_attention = through_flash
    for method in ("allgather", "alltoall"):
        for balanced in (True, False):
            _attention.set_rotate_method(method)
            _attention._cp_options.enable_load_balance = balanced
            parts = [x.clone(), dy.clone()]
            with (
                sdpa.activated(unsupported="error"),
                context_parallel(mesh, buffers=parts, buffer_seq_dims=[1, 1]),
            ):
                assert parts[0].shape[1] == 64
                got = step(
                    parts[0],
                    weight,
                    parts[1],
                    lambda *a, **b: F.scaled_dot_product_attention(*a, **b),
                )
            for a, b in zip(got, want, strict=True):
                dist.all_reduce(a)
                error, largest = (a - b).abs().amax(), max(1.0, b.abs().amax())
                assert error <= TOLERANCE[dtype] * largest, (method, balanced, error, largest)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # Gloo's threads sometimes terminate the process in an orderly end (PyTorch 2.10)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
