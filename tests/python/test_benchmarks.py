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
    assert {name[8:13] for name in forwards} == {"4sm80", "4sm90"}
    other = r"_ZN4heed4(sm[89]0|cuda)\d+(decode|backward|finish)"
    others = [name for name in symbols if re.match(other, name)]
    assert others
    assert set(peers_of([*forwards[:40], *forwards[-40:]])) == {"heed"}
    assert set(peers_of(others[:40])) == {"None"}


def test_counters_know_the_kernels_of_the_peers() -> None:
    """As ncu printed them on an H100 with PyTorch 2.11 and cuDNN 9.19; FlashAttention-4 in part."""
    names = {
        "_ZN13pytorch_flash16flash_fwd_kernelI23Flash_fwd_kernel_traitsILi64ELi128E": "flash",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_"
        "cga1x1x1_kernel0_0": "cudnn",
        "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90": "fa4",
        "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_11FillFunctor": "None",
    }
    assert peers_of(list(names)) == list(names.values())
