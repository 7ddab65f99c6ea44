"""Starts a script as several processes that work together."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 180.0  # seconds
PATIENCE = 5.0  # for the others, after one has failed: some of them may wait for it


def run_together(script: Path, device: str, size: int, *arguments: str | Path) -> None:
    """python script DEVICE RANK SIZE *arguments, for each rank; all of them must succeed."""
    started = [_start([script, device, rank, size, *arguments], device) for rank in range(size)]
    deadline = time.monotonic() + LIMIT
    failed = False
    while any(process.poll() is None for process, _ in started) and time.monotonic() < deadline:
        if not failed and any(process.poll() for process, _ in started):
            failed, deadline = True, time.monotonic() + PATIENCE
        time.sleep(0.05)
    codes = [process.poll() for process, _ in started]
    for process, _ in started:
        process.kill()
        process.wait()
    outputs = []
    for rank, (_, log) in enumerate(started):
        log.seek(0)
        outputs.append(f"rank {rank}, exit status {codes[rank]}:\n{log.read()}")
        log.close()
    assert codes == [0] * size, "\n".join(outputs)


def _start(command: list, device: str) -> tuple[subprocess.Popen, object]:
    log = tempfile.TemporaryFile("w+")
    environment = os.environ | {"HEED_TEST_DEVICE": device}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    return process, log
