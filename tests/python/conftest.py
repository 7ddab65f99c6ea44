"""What every Python test starts from."""

import importlib.util
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

import heed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Tensors as small as those of the models are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def hub():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("hub", ROOT / "scripts" / "hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def folder(hub, tmp_path_factory) -> Path:
    """The repository of this heed, for this PyTorch's CUDA."""
    wheel = tmp_path_factory.mktemp("wheel") / f"heed-{heed.__version__}-cp310-abi3-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in Path(heed.__file__).parent.glob("*.py"):
            archive.write(file, f"heed/{file.name}")
        archive.write(heed.ops.library, "heed/_heed.so")
        text = distribution("heed").read_text("METADATA")
        archive.writestr(f"heed-{heed.__version__}.dist-info/METADATA", text)
    target = tmp_path_factory.mktemp("hub") / "repository"
    hub.write(wheel, target, torch.version.cuda, "80;90")
    return target
