"""What all tests share: a cache of their own, one thread, and a recipe small enough for seconds."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Subprocesses inherit these; a cache of the user's must neither help nor be written.
os.environ["LOWVRAM_CACHE"] = os.environ.get("LOWVRAM_TEST_CACHE") or tempfile.mkdtemp(prefix="lowvram-test-cache-")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
if not Path("/dev/nvidiactl").exists():  # before Triton is imported; without a card its kernels run in Python
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from hypothesis import settings
from tiny import TINY

settings.register_profile("lowvram", deadline=None, derandomize=True)  # shared machines are slow at times
settings.load_profile("lowvram")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures/ and sd1/, a tiny pipeline of Stable Diffusion 1.x, to fine-tune."""
    from tiny_fine_tuning import make_pictures
    from tiny_pipelines import make_pipeline

    home = tmp_path_factory.mktemp("home")
    make_pictures(home / "pictures")
    make_pipeline(home / "sd1", "sd1")
    return home


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., object]:
    """tiny("batch=16", ...) is a recipe of all four phases and ADA that takes some 50 ms a step."""
    from lowvram import load_recipe

    def make(*overrides: str) -> object:
        return load_recipe("faces32", [*TINY, f"out={tmp_path / 'run'}", *overrides])

    return make
