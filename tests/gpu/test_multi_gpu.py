"""What two GPUs do together, as one: tests/python/test_parallel.py and test_ring.py with NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from test_parallel import ENGINES, run_engine
from test_ring import run_ring

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("engine", ENGINES)
def test_two_gpus_as_one(engine: str, tmp_path: Path) -> None:
    run_engine(engine, "cuda", tmp_path)


def test_context_parallelism(tmp_path: Path) -> None:
    run_ring("cuda", 2, tmp_path / "store")
