"""scripts/hub.py: a folder that the `kernels` package loads, and Transformers by such a name.

Nothing is fetched: LOCAL_KERNELS says that a name is a folder.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import heed.flash_api
from device import cpu_only
from generation import assert_same_tokens, greedy
from models import available, build, tokens

kernels = pytest.importorskip("kernels", reason="the package kernels is not installed")

ROOT = Path(__file__).resolve().parents[2]
ORG_NAME = "acme/heed-flash-attn3"  # as Transformers reads names: "flash", and a 3 for pages
FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")


@pytest.fixture
def local(folder, monkeypatch) -> str:
    """A name that is this folder."""
    monkeypatch.setenv("LOCAL_KERNELS", f"{ORG_NAME}={folder}")
    return ORG_NAME


@pytest.fixture
def implementation(local, monkeypatch) -> Iterator[str]:
    """The name as attn_implementation, where Transformers takes names of kernels."""
    if not transformers.utils.is_kernels_available():
        pytest.skip(
            f"Transformers {transformers.__version__} does not take kernels {kernels.__version__}"
        )
    called = []

    def attention(*tensors, **arguments):
        called.append(arguments)
        return heed.attention(*tensors, **arguments)

    monkeypatch.setattr(heed.flash_api, "attention", attention)
    yield local
    assert called


# ---- the folder ----


def test_metadata_is_what_kernels_reads(folder):
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    variants = sorted((folder / "build").iterdir())
    assert len(variants) == (2 if torch.version.cuda else 1)
    for variant in variants:
        metadata = Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
        assert metadata.id.isidentifier() and metadata.version == 1
        on_gpu = "-cpu-" not in variant.name
        assert metadata.backend.archs == (["8.0", "9.0", "8.0+PTX"] if on_gpu else None)


def test_it_shares_the_heed_of_the_process(local):
    kernel = kernels.get_kernel(local, version=1)
    for name in FUNCTIONS:
        assert getattr(kernel, name) is getattr(heed.flash_api, name)
    assert kernels.get_local_kernel(Path(os.environ["LOCAL_KERNELS"].split("=")[1])) is kernel


ALONE = """
import sys
import kernels, torch
# An editable heed comes before every folder.
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
kernel = kernels.get_kernel(sys.argv[1], version=1)
q = torch.ones(1, 3, 2, 8, requires_grad=True)
kernel.flash_attn_func(q, q, q, causal=True).sum().backward()
assert q.grad is not None
import heed
print(heed.__file__)
"""


@cpu_only("float32 tensors of a CPU show as much")
def test_it_brings_heed_along(local):
    said = subprocess.run(
        [sys.executable, "-c", ALONE, local], capture_output=True, text=True, check=True
    )
    assert "/build/torch-stable-abi210-" in said.stdout


def test_another_version_of_heed_is_refused(hub, folder, monkeypatch, tmp_path):
    (tmp_path / "__init__.py").write_text(hub.INIT.format(version="99.0"))
    spec = importlib.util.spec_from_file_location("other", tmp_path / "__init__.py")
    with pytest.raises(ImportError, match=r"heed.__version__ = .* must be 99\.0"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("all", ["8.0", "9.0", "10.0", "12.0", "8.0+PTX"]),
        ("90;120", ["9.0", "12.0"]),
        ("native", None),
    ],
)
def test_capabilities(hub, archs, expected):
    assert hub.capabilities(archs) == expected


# ---- Transformers by the name ----


def logits(name: str, attention: str, **inputs):
    return build(available(name), attention)(**inputs).logits


@cpu_only("its models would have to be of 16 bits")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_a_padded_batch(name, implementation):
    inputs = available(name).inputs("left")
    shown = inputs["attention_mask"].bool()
    actual, eager = logits(name, implementation, **inputs), logits(name, "eager", **inputs)
    torch.testing.assert_close(actual[shown], eager[shown], rtol=0, atol=1e-4)


@cpu_only("its models would have to be of 16 bits")
def test_documents_end_to_end(implementation):
    ids = tokens(1, 14)
    positions = torch.cat([torch.arange(5), torch.arange(9)])[None]
    actual = logits("mistral", implementation, input_ids=ids, position_ids=positions)
    eager = [logits("mistral", "eager", input_ids=part) for part in ids.split([5, 9], 1)]
    torch.testing.assert_close(actual, torch.cat(eager, 1), rtol=0, atol=1e-4)


@cpu_only("its models would have to be of 16 bits")
@pytest.mark.parametrize("padding", ["none", "left"])
def test_greedy_generation(padding, implementation):
    tiny = available("mistral")
    inputs = tiny.inputs(padding)
    results = [greedy(build(tiny, a), inputs) for a in (implementation, "eager")]
    assert_same_tokens(*results, torch.float32)


@cpu_only("its models would have to be of 16 bits")
def test_a_name_that_a_model_insists_on(implementation, folder, monkeypatch):
    """GPT-OSS takes none but a few names of FlashAttention; one of them can be this folder."""
    name = "kernels-community/vllm-flash-attn3"
    monkeypatch.setenv("LOCAL_KERNELS", f"{name}={folder}")
    inputs = available("gpt_oss").inputs("none")
    actual, eager = logits("gpt_oss", name, **inputs), logits("gpt_oss", "eager", **inputs)
    torch.testing.assert_close(actual, eager, rtol=0, atol=1e-4)
