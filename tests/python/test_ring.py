"""PyTorch's context parallelism on heed.sdpa: processes in a ring, each with some of the tokens."""

from __future__ import annotations

from pathlib import Path

from device import cpu_only
from processes import run_together

WORKER = Path(__file__).with_name("ring.py")


def run_ring(device: str, size: int, store: Path) -> None:
    run_together(WORKER, device, size, store)


@cpu_only("tests/gpu has the same on GPUs")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    run_ring("cpu", 2, tmp_path / "store")
