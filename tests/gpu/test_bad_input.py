"""Bad input on the GPU: what the host can see is refused, what it cannot see does no harm."""

from __future__ import annotations

import pytest
import torch
from gpu import GPU, NAMES, WITH_BACKWARD, case_of, dense, forward, forward_and_backward, inputs
from torch import Tensor

import heed
from cases import CASES

# With pytest-xdist and --dist loadgroup: a kernel that crashes ends CUDA for one process only.
pytestmark = pytest.mark.xdist_group("bad input")
BF16 = torch.bfloat16


def tensor(*shape: int, dtype: torch.dtype = BF16, device: str = GPU) -> Tensor:
    return torch.randn(shape).to(device, dtype)


# What is wrong, the arguments that differ from a legal call, the exception, words of its sentence.
REFUSED = {
    "f32": (
        {name: tensor(2, 5, 4, 8, dtype=torch.float32, device="cpu") for name in "qkv"},
        NotImplementedError,
        ("f32",),
    ),
    "f64": (
        {name: tensor(2, 5, 4, 8, dtype=torch.float64, device="cpu") for name in "qkv"},
        NotImplementedError,
        ("f64",),
    ),
    "head_dim": (
        {name: tensor(2, 5, 4, 512, device="cpu") for name in "qkv"},
        NotImplementedError,
        ("head_dim", "512", "256"),
    ),
    "dtypes": (
        {"k": tensor(2, 5, 4, 8, dtype=torch.float16, device="cpu")},
        ValueError,
        ("k.dtype = f16 must be q.dtype = bf16",),
    ),
}
# These stay on the CPU while q, k and v are on the GPU.
ELSEWHERE = {
    "k": tensor(2, 5, 4, 8, device="cpu"),
    "v": tensor(2, 5, 4, 8, device="cpu"),
    "sink": torch.zeros(4),
    "bias": torch.zeros(1, 1, 1, 5),
    "intervals": torch.zeros(1, 5, 2).int(),
    "key_bits": torch.zeros(1, 1).int(),
    "seqused_k": torch.tensor([5, 5]).int(),
    "start_q": torch.tensor([0, 0]).int(),
    "seed": torch.tensor([1]),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, grad: bool) -> None:
    changes, error, words = REFUSED[what]
    arguments = {name: tensor(2, 5, 4, 8) for name in "qkv"}
    arguments |= {name: t.to(GPU) for name, t in changes.items()}
    if grad:
        arguments["v"].requires_grad_()
    with pytest.raises(error) as caught:
        heed.attention(**arguments)
    sentence = str(caught.value)
    assert all(word in sentence for word in words) and "\n" not in sentence, sentence


@pytest.mark.parametrize("name", ELSEWHERE)
def test_tensors_of_another_device(name: str) -> None:
    arguments = {of: tensor(2, 5, 4, 8) for of in "qkv"} | {name: ELSEWHERE[name]}
    if name == "seed":
        arguments["dropout_p"] = 0.5
    with pytest.raises(ValueError, match=rf"^{name}\.device = cpu must be q\.device = cuda:0$"):
        heed.attention(**arguments)


def test_queries_of_another_device() -> None:
    arguments = {of: tensor(2, 5, 4, 8, device="cpu" if of == "q" else GPU) for of in "qkv"}
    with pytest.raises(ValueError, match=r"^k\.device = cuda:0 must be q\.device = cpu$"):
        heed.attention(**arguments)


def test_paged_backward() -> None:
    case = case_of("paged", poisoned=False)
    case.k.requires_grad_()
    out = forward(case)[0]
    with pytest.raises(NotImplementedError, match="page_table must be null in a backward pass"):
        out.sum().backward()


# ---- arrays that lie about the tensors ----

ARRAYS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "start_q",
    "start_k",
    "seqused_q",
    "seqused_k",
    "page_table",
    "intervals",
)
LIES = {
    "minus one": lambda a: torch.full_like(a, -1),
    "lowest": lambda a: torch.full_like(a, -(2**31)),
    "highest": lambda a: torch.full_like(a, 2**31 - 1),
    "too many": lambda a: a + 1000,
    "backwards": lambda a: a.flip(-1),
    "any": lambda a: torch.randint(-(2**31), 2**31, a.shape).to(a),
    "any small": lambda a: torch.randint(-50, 50, a.shape).to(a),
}


def with_arrays() -> list[tuple[str, str]]:
    return [(name, of) for name in NAMES for of in ARRAYS if of in CASES[name]().options]


def guarded(shapes: list[Tensor]) -> list[Tensor]:
    """Guards with holes of these sizes between them, into which PyTorch puts the next results."""
    tensors = []
    for like in shapes:
        tensors += [torch.full((4096,), 0x5A, dtype=torch.uint8, device=GPU)]
        tensors += [torch.empty_like(like)]
    tensors += [torch.full((4096,), 0x5A, dtype=torch.uint8, device=GPU)]
    return tensors[::2]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(("name", "of"), with_arrays())
def test_lies_do_no_harm(name: str, of: str, lie: str) -> None:
    """No crash, no write outside; and a legal call right after is right."""
    case = case_of(name, poisoned=False)
    gradients = [torch.ones_like(t) for t in forward(case)]

    def call() -> list[Tensor]:
        if name not in WITH_BACKWARD:
            return forward(case)
        return forward_and_backward(case, gradients)

    truth = call()
    before = [t.detach().clone() for t in inputs(case)]
    honest = case.options[of]
    case.options[of] = LIES[lie](honest)
    guards = guarded(truth)
    results = call()
    torch.cuda.synchronize()
    assert all((guard == 0x5A).all() for guard in guards), "a write outside the results"
    assert all(torch.equal(a, b) for a, b in zip(inputs(case), before, strict=True))
    assert [t.shape for t in results] == [t.shape for t in truth]
    case.options[of] = honest
    again = call()
    for a, b in zip(again[:2], truth[:2], strict=True):
        assert torch.equal(a, b)


def test_page_ids_outside_the_pool_are_keys_that_are_missing() -> None:
    case = case_of("paged", poisoned=False)
    case.options["page_table"][0, 1] = 10**6
    case.options["page_table"][1, 0] = -3
    out, lse = forward(case)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()


def test_kernels_work_after_all_that() -> None:
    assert torch.isfinite(forward(dense(causal=True))[0]).all()
