"""One screen: versions, which kernel serves which dtype here, and why better ones do not."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F

from . import __version__, attention, ops

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "f64": "float64"}
PASSES = ("forward", "decode", "backward")
SWITCHES = ("HEED_FORCE_ISA", "HEED_FORCE_KERNEL")


@dataclass
class Kernel:
    family: str
    pass_name: str
    dtype: str
    why_not: str  # empty: it runs here

    @property
    def name(self) -> str:
        return f"{self.family}/{self.pass_name}/{self.dtype}"


def table() -> tuple[str, list[Kernel]]:
    """This CPU's instruction set, and every kernel of the build, best first."""
    first, *rows = torch.ops.heed.kernels().splitlines()
    kernels = []
    for row in rows:
        name, why_not = row.split("\t")
        kernels.append(Kernel(*name.split("/"), why_not))
    return first.split("\t")[1], kernels


def main() -> int:
    """Prints the screen; returns 1 when something that should run here does not."""
    print(f"heed {__version__}  {ops.library}")
    print(
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Transformers {_transformers()}"
    )
    try:
        isa, kernels = table()
    except RuntimeError as error:
        print(f"\nNothing runs here: {ops.python_error(error)}")
        return 1

    print("\nDevices")
    print(f"  cpu   {_cpu_name()}: {isa}, {torch.get_num_threads()} threads of PyTorch")
    print(f"  cuda  {_cuda()}")
    for switch in SWITCHES:
        if switch in os.environ:
            print(f"  {switch}={os.environ[switch]} is set")

    print("\nKernel of each dtype and pass on the CPU")
    print(f"  {'':10}" + "".join(f"{name:28}" for name in PASSES).rstrip())
    for short, dtype in DTYPES.items():
        serving = [_first(kernels, short, name) for name in PASSES]
        print(f"  {dtype:10}" + "".join(f"{name:28}" for name in serving).rstrip())

    print("\nKernel families, best first")
    for family in dict.fromkeys(kernel.family for kernel in kernels):
        reasons = [kernel.why_not for kernel in kernels if kernel.family == family]
        runs = reasons.count("")
        text = f"{runs} of {len(reasons)} kernels run here" if runs else f"no: {reasons[0]}"
        print(f"  {family:12}  {text}")
    return _check()


def _first(kernels: list[Kernel], dtype: str, pass_name: str) -> str:
    # Where no decode kernel exists, the forward ones serve one query row as well.
    passes = ("decode", "forward") if pass_name == "decode" else (pass_name,)
    for kernel in kernels:
        if kernel.pass_name in passes and kernel.dtype == dtype and not kernel.why_not:
            return kernel.name
    return "none"


def _check() -> int:
    """A small causal call, forward and backward, beside PyTorch's own attention in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 33, 4, 32, generator=generator) for _ in range(4))
    inputs = [t.requires_grad_() for t in (q, k, v)]
    wide = [t.detach().double().transpose(1, 2).requires_grad_() for t in inputs]
    try:
        out = attention(*inputs, causal=True)
        got = [out, *torch.autograd.grad(out, inputs, dout)]
    except (ValueError, RuntimeError) as error:
        print(f"\nCheck failed: {error}")
        return 1
    expected = F.scaled_dot_product_attention(*wide, is_causal=True)
    want = [expected, *torch.autograd.grad(expected, wide, dout.double().transpose(1, 2))]
    errors = {
        name: float((a.detach() - b.detach().transpose(1, 2)).abs().max() / b.detach().abs().max())
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True)
    }
    ok = all(error < 1e-5 for error in errors.values())
    measured = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    print(f"\nCheck in float32 {'passed' if ok else 'FAILED'}: relative errors {measured}")
    print(f"A call on 16 tokens (4 heads of 32) takes {_microseconds():.0f} us")
    return 0 if ok else 1


@torch.no_grad()
def _microseconds() -> float:
    q = torch.randn(1, 16, 4, 32)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            attention(q, q, q, causal=True)
        best = min(best, (time.perf_counter() - start) / 50)
    return best * 1e6


def _transformers() -> str:
    try:
        return version("transformers") + " (`import heed.transformers` registers heed there)"
    except PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device that PyTorch can use; this build of heed has no CUDA kernels"
    names = ", ".join(
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    )
    return f"{names}: not used, this build of heed has no CUDA kernels"
