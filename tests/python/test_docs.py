"""What pages say: Python examples run, C++ examples are compiled text, links lead somewhere."""

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers

import heed.flash_api
import heed.sdpa

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "HACKING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = {path.relative_to(ROOT).as_posix(): path for path in PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n", re.M | re.S)
PYTHON = [name for name, path in NAMES.items() if "```python\n" in path.read_text()]
COMPILED = [name for name, path in NAMES.items() if "```cpp\n" in path.read_text()]


@pytest.mark.parametrize("name", PYTHON)
def test_python_examples(name, request, monkeypatch, capsys, tmp_path) -> None:
    """The blocks of a page run one after the other. A block without a language is what the one
    before it prints."""
    with_saved_model(monkeypatch, tmp_path)
    with_flash_attention(monkeypatch)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.chdir(tmp_path)
    names = {"path": str(tmp_path)}
    left_out = []
    blocks = BLOCK.findall(NAMES[name].read_text())
    try:
        for (language, text), (following, expected) in zip(
            blocks, [*blocks[1:], ("end", "")], strict=True
        ):
            if language != "python":
                continue
            if missing := missing_packages(text):
                left_out += missing
                continue
            if "build/hub" in text:
                (tmp_path / "build").mkdir(exist_ok=True)
                (tmp_path / "build" / "hub").symlink_to(request.getfixturevalue("folder"))
            exec(compile(text, name, "exec"), names)
            printed = capsys.readouterr().out
            if following == "" and printed:
                assert_same_text(printed, expected)
    except (ImportError, TypeError) as error:  # what older releases do not have
        if transformers.__version__.startswith("4.") and "serving" in name:
            pytest.skip(str(error))
        raise
    except MemoryError as error:
        pytest.skip(f"this Transformers needs psutil on a CPU: {error}")
    finally:
        if torch.nn.attention.current_flash_attention_impl() == "heed":
            heed.sdpa.restore()
    CHECKS.get(name, lambda names: None)(names)
    if left_out:
        pytest.skip(f"all but the examples that need {', '.join(left_out)}")


def missing_packages(text: str) -> list[str]:
    """Of those that an environment of the tests may be without."""
    optional = {"datasets", "kernels", "trl"} & set(
        re.findall(r"^(?:from|import) (\w+)", text, re.M)
    )
    missing = [name for name in optional if importlib.util.find_spec(name) is None]
    if "kernels" in optional and not missing and not transformers.utils.is_kernels_available():
        missing = ["another release of kernels"]
    return missing


def assert_same_text(printed: str, expected: str) -> None:
    """Fractions may differ by what rounding does to them; pages leave out what Trainer logs."""
    printed = re.sub(r"^\{'.*\n", "", printed, flags=re.M)
    fraction = r"\d+\.\d+"
    assert re.split(fraction, printed) == re.split(fraction, expected)
    numbers = [[float(x) for x in re.findall(fraction, text)] for text in (printed, expected)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-3)


def check_serving(names: dict) -> None:
    assert [len(tokens) for tokens in names["tokens"]] == [8, 8, 8]


def check_readme(names: dict) -> None:
    assert names["model"].config._attn_implementation == "heed"
    assert names["lse"].shape == (8, 200)


CHECKS = {"docs/serving.md": check_serving, "README.md": check_readme}


def with_saved_model(monkeypatch, folder: Path) -> None:
    """A small model stands for every name of a pretrained one."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.LlamaModel(config).save_pretrained(folder)
    load = transformers.AutoModel.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModel, "from_pretrained", lambda name, **options: load(folder, **options)
    )


def with_flash_attention(monkeypatch) -> None:
    """Modules with the names of FlashAttention's, so that their imports can be shown."""
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        module = types.ModuleType(name)
        vars(module).update(vars(heed.flash_api))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", COMPILED)
def test_cpp_examples_are_compiled_somewhere(name) -> None:
    sources = [path.read_text() for path in (ROOT / "examples").glob("*.c*")]
    sources += [
        path.read_text()
        for folder in ("include", "src", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".cpp", ".hpp", ".cuh", ".cu", ".h", ".c")
    ]
    for language, text in BLOCK.findall(NAMES[name].read_text()):
        if language == "cpp":
            assert any(text in source for source in sources), f"no source file has\n{text}"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", NAMES[name].read_text(), flags=re.M | re.S)
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)\s#]*)#?([^)\s]*)\)", text):
        path = (NAMES[name].parent / target).resolve() if target else NAMES[name]
        assert path.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in headings(path), f"{target} has no heading {anchor}"


def headings(path: Path) -> set[str]:
    """As code hosts name them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_tables_are_those_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    stale = [name for name, path in NAMES.items() if tables.fill(text := path.read_text()) != text]
    assert not stale, "benchmarks/tables.py writes them"
