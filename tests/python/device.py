"""Where the tests run, and in which dtypes.

HEED_TEST_DEVICE is cpu (the default) or cuda. HEED_TEST_DTYPE is the dtype of the tests that need
only one: float32 (the default on a CPU) or float16 (the default on a GPU, whose kernels take 16
bits only).
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("HEED_TEST_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
if not ON_CPU:
    DTYPES = (torch.bfloat16, torch.float16)
DTYPE = getattr(torch, os.environ.get("HEED_TEST_DTYPE", "float32" if ON_CPU else "float16"))
EXACT = DTYPE == torch.float32  # otherwise a result has 16 bits


def cpu_only(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not ON_CPU, reason=f"{reason}; HEED_TEST_DEVICE is {DEVICE}")


def randn(
    *shape: int, dtype: torch.dtype = DTYPE, requires_grad: bool = False, **options
) -> Tensor:
    """torch.randn in DTYPE on DEVICE; the values are the same on every device."""
    return torch.randn(*shape, **options).to(DEVICE, dtype).requires_grad_(requires_grad)


def moved(values: dict, device: str | torch.device = DEVICE) -> dict:
    """`values` with its tensors on `device`; meta tensors stay what they are."""
    return {
        name: x.to(device) if isinstance(x, Tensor) and not x.is_meta else x
        for name, x in values.items()
    }
