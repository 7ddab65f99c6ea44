"""What the benchmarks for GPUs do that needs no GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import heed

CUDA = Path(__file__).resolve().parents[2] / "benchmarks" / "cuda"


def peers_of(names: list[str]) -> list[str]:
    """In a process of its own: a package has the name of one of the benchmarks' modules."""
    code = "import sys, counters; print(*map(counters.peer_of, sys.argv[1:]), sep='\\n')"
    command = [sys.executable, "-c", code, *names]
    return subprocess.run(
        command, cwd=CUDA, capture_output=True, text=True, check=True
    ).stdout.split()


def test_counters_know_the_kernels_of_the_library() -> None:
    symbols = set(re.findall(rb"_ZN4heed\w+", Path(heed.ops.library).read_bytes()))
    symbols = sorted(name.decode() for name in symbols)
    forwards = [name for name in symbols if re.match(r"_ZN4heed4sm[89]07forwardI", name)]
    if not forwards:
        pytest.skip("heed was built without CUDA")
    assert {name[:12] for name in forwards} == {"_ZN4heed4sm80"[:12], "_ZN4heed4sm90"[:12]}
    others = [n for n in symbols if re.match(r"_ZN4heed4sm[89]0\d+(decode|backward|finish)", n)]
    assert others
    assert set(peers_of([*forwards[:40], *forwards[-40:]])) == {"heed"}
    assert set(peers_of(others[:40])) == {"None"}


def test_counters_know_the_kernels_of_the_peers() -> None:
    """As an H100 launched them for PyTorch 2.11, cuDNN 9.19 and FlashAttention-4."""
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128": "cudnn",
    }
    assert peers_of(list(names)) == list(names.values())
