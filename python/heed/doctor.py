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
    name: str
    why_not: str  # empty: it runs here

    def __post_init__(self) -> None:
        # Of a GPU head_dim, score and tile follow.
        self.family, self.pass_name, self.dtype, *self.variant = self.name.split("/")

    @property
    def on_gpu(self) -> bool:
        return self.family.startswith("sm")


@dataclass
class Machine:
    isa: str
    gpu: str  # empty: none that heed can use, and why
    why_no_gpu: str
    kernels: list[Kernel]  # of the build, best first


def machine() -> Machine:
    cpu, gpu, *rows = torch.ops.heed.kernels().splitlines()
    kernels = [Kernel(*row.split("\t")) for row in rows]
    return Machine(cpu.split("\t")[1], *gpu.split("\t")[1:], kernels)


def main() -> int:
    """Prints the screen; returns 1 when something that should run here does not."""
    print(f"heed {__version__}  {ops.library}")
    print(
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Transformers {_transformers()}"
    )
    try:
        here = machine()
    except RuntimeError as error:
        print(f"\nNothing runs here: {ops.python_error(error)}")
        return 1

    print("\nDevices")
    print(f"  cpu   {_cpu_name()}: {here.isa}, {torch.get_num_threads()} threads of PyTorch")
    print(f"  cuda  {_cuda(here)}")
    for switch in SWITCHES:
        if switch in os.environ:
            print(f"  {switch}={os.environ[switch]} is set")

    _print_serving("CPU", [k for k in here.kernels if not k.on_gpu], ("f32", "bf16", "f16", "f64"))
    if here.gpu:
        _print_serving("GPU", [k for k in here.kernels if k.on_gpu], ("bf16", "f16"))

    print("\nKernel families, best first")
    for family in dict.fromkeys(kernel.family for kernel in here.kernels):
        reasons = [kernel.why_not for kernel in here.kernels if kernel.family == family]
        runs = reasons.count("")
        text = f"{runs} of {len(reasons)} kernels run here" if runs else f"no: {reasons[0]}"
        print(f"  {family:12}  {text}")
    failed = _check("cpu", torch.float32)
    if here.gpu and torch.cuda.is_available():
        failed |= _check("cuda", torch.bfloat16)
    return failed


def _print_serving(device: str, kernels: list[Kernel], dtypes: tuple[str, ...]) -> None:
    """The first kernel that serves each dtype and pass: plain scores and a small head_dim."""
    print(f"\nKernel of each dtype and pass on the {device}")
    print(f"  {'':10}" + "".join(f"{name:28}" for name in PASSES).rstrip())
    for short in dtypes:
        serving = [_first(kernels, short, name) for name in PASSES]
        print(f"  {DTYPES[short]:10}" + "".join(f"{name:28}" for name in serving).rstrip())


def _first(kernels: list[Kernel], dtype: str, pass_name: str) -> str:
    # Where no decode kernel exists, the forward ones serve one query row as well.
    passes = ("decode", "forward") if pass_name == "decode" else (pass_name,)
    for kernel in kernels:
        if kernel.pass_name in passes and kernel.dtype == dtype and not kernel.why_not:
            return f"{kernel.family}/{kernel.pass_name}/{kernel.dtype}"
    return "none"


def _check(device: str, dtype: torch.dtype) -> int:
    """A small causal call, forward and backward, beside PyTorch's own attention in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 33, 4, 32, generator=generator).to(dtype) for _ in range(4))
    inputs = [t.to(device).requires_grad_() for t in (q, k, v)]
    wide = [t.double().transpose(1, 2).requires_grad_() for t in (q, k, v)]
    try:
        out = attention(*inputs, causal=True)
        got = [out, *torch.autograd.grad(out, inputs, dout.to(device))]
    except (ValueError, RuntimeError) as error:
        print(f"\nCheck on {device} failed: {error}")
        return 1
    expected = F.scaled_dot_product_attention(*wide, is_causal=True)
    want = [expected, *torch.autograd.grad(expected, wide, dout.double().transpose(1, 2))]
    errors = {
        name: float(
            (a.detach().cpu().double() - b.detach().transpose(1, 2)).abs().max()
            / b.detach().abs().max()
        )
        for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True)
    }
    # Of the largest value; bfloat16 rounds the operands of the second product, too.
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    ok = all(error < limit for error in errors.values())
    measured = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    name = str(dtype).removeprefix("torch.")
    print(f"\nCheck on {device} in {name} {'passed' if ok else 'FAILED'}: errors {measured}")
    print(f"A call on 16 tokens (4 heads of 32) takes {_microseconds(device, dtype):.0f} us")
    return 0 if ok else 1


@torch.no_grad()
def _microseconds(device: str, dtype: torch.dtype) -> float:
    """Of this thread: on a GPU the work itself goes on meanwhile."""
    q = torch.randn(1, 16, 4, 32, device=device, dtype=dtype)
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


def _cuda(here: Machine) -> str:
    if not here.gpu:
        return here.why_no_gpu
    if not torch.cuda.is_available():
        return f"{here.gpu}, but this PyTorch cannot use it"
    names = ", ".join(
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    )
    return f"{names}: {here.gpu}"
