"""Models that two processes share, by engines that exist, train and generate as one process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from device import cpu_only
from processes import run_together

WORKER = Path(__file__).with_name("parallel.py")
ENGINES = ("fsdp", "tp", "ulysses")


def run_engine(engine: str, device: str, folder: Path) -> None:
    if engine == "tp" and importlib.util.find_spec("accelerate") is None:
        pytest.skip("Transformers' tensor parallelism needs accelerate: pip install accelerate")
    run_together(WORKER, device, 2, folder, engine)


@cpu_only("tests/gpu has the same on GPUs")
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_as_one(engine: str, tmp_path: Path) -> None:
    run_engine(engine, "cpu", tmp_path)
