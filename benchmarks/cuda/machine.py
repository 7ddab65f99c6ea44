"""Where the numbers of a benchmark come from."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

COMMIT = Path(__file__).resolve().parents[2] / "scripts" / "commit.sh"


def machine() -> dict[str, str]:
    """GPU, driver, PyTorch, date, commit and command."""
    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none, a check of the script",
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _said(str(COMMIT)),
        "command": shlex.join(["python", *sys.argv]),
    }


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0]
