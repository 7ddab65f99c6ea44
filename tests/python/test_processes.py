"""Attention on a CPU from many threads, inside PyTorch's parallel regions and after fork."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import heed
from device import cpu_only

pytestmark = cpu_only("threads are a CPU's")

HANG_SECONDS = 120  # after which a test that waits for ever is ended


@pytest.fixture(autouse=True)
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def gradients() -> list[torch.Tensor]:
    """Output and gradients of a problem with more tasks than threads."""
    generator = torch.Generator().manual_seed(7)
    q, k, v = (
        torch.randn(2, 300, 4, 32, generator=generator).requires_grad_() for _ in range(3)
    )
    out = heed.attention(q, k, v, causal=True)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_many_python_threads_at_once() -> None:
    expected = gradients()
    results: list[list[torch.Tensor]] = []
    threads = [threading.Thread(target=lambda: results.append(gradients())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(same(result, expected) for result in results)


def openmp() -> ctypes.CDLL:
    """The OpenMP runtime that PyTorch runs on."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if match := re.search(r"\S*/libgomp\S*$", line):
            return ctypes.CDLL(match[0])
    pytest.skip("this PyTorch does not run on libgomp")


def test_inside_a_parallel_region() -> None:
    expected = gradients()
    results: list[list[torch.Tensor]] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_: int | None) -> None:
        results.append(gradients())

    openmp().GOMP_parallel(region, None, ctypes.c_uint(3), ctypes.c_uint(0))
    assert len(results) == 3
    assert all(same(result, expected) for result in results)


# In a process of its own, because what ran before in this one would count. PyTorch's own operators
# may wait for ever in the child, so it calls nothing but heed.
AFTER_FORK = f"""
import os, signal, torch, heed
torch.set_num_threads(2)
q = torch.randn(2, 300, 4, 32)
expected = heed.attention(q, q, q, causal=True).numpy().tobytes()
pid = os.fork()
if pid == 0:
    signal.alarm({HANG_SECONDS})
    out = heed.attention(q, q, q, causal=True).numpy().tobytes()
    os._exit(0 if out == expected else 1)
raise SystemExit(os.waitpid(pid, 0)[1])
"""


def test_in_a_forked_child() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AFTER_FORK],
        timeout=2 * HANG_SECONDS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"wait status {done.returncode}\n{done.stderr}"


def test_other_libraries_tiles_are_left_as_they_were() -> None:
    """oneDNN and PyTorch's attention use the same tile registers on the same threads."""
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(256, 256, generator=generator).bfloat16() for _ in range(2))
    q, k, v = (torch.randn(2, 4, 200, 64, generator=generator).bfloat16() for _ in range(3))

    def others() -> list[torch.Tensor]:
        return [a @ b, torch.nn.functional.scaled_dot_product_attention(q, k, v)]

    def ours() -> torch.Tensor:
        return heed.attention(*(x.transpose(1, 2) for x in (q, k, v)))

    before, out = others(), ours()
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(others(), before, strict=True))
        assert torch.equal(ours(), out)
