"""PyTorch's context parallelism on heed.sdpa: processes in a ring, each with some of the tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from device import cpu_only

WORKER = Path(__file__).with_name("ring.py")


def run_ring(device: str, size: int, store: Path) -> None:
    command = [sys.executable, str(WORKER), device]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(size), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * size, "\n".join(outputs)


@cpu_only("tests/gpu has the same on GPUs")
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    run_ring("cpu", 2, tmp_path / "store")
