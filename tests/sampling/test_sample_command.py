"""`python -m lowvram.sample`: files, a grid, a loop; what is in the way or unknown is named and nothing is lost."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lowvram.errors import LowVRAMError
from lowvram.sample import SampleOptions, main, pick_classes


@pytest.fixture
def run(tiny: Callable[..., object], tmp_path: Path) -> Path:
    """A run of two steps."""
    from lowvram import Trainer

    Trainer(tiny("kimg=0.016"), quiet=True).fit()
    return tmp_path / "run"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_images_and_grid(run: Path) -> None:
    main(SampleOptions(run=str(run), n=5, seed=7, truncation=0.7))
    files = [f"seed0007_{i:05d}.png" for i in range(5)]
    assert names(run / "samples") == ["grid.png", *files]
    from lowvram.tasks import load_run

    task = load_run(run, device="cpu")
    expected = task.sample(5, 7, truncation_psi=0.7)
    for i, file in enumerate(files):
        pixels = torch.from_numpy(np.array(Image.open(run / "samples" / file))).permute(2, 0, 1)
        assert int((pixels.int() - expected[i].int()).abs().max()) <= 1
    assert Image.open(run / "samples" / "grid.png").size == (3 * 16, 2 * 16)

    main(SampleOptions(run=str(run), n=2))  # again: beside the first, not over it
    assert names(run / "samples-2") == ["grid.png", "seed0000_00000.png", "seed0000_00001.png"]


def test_a_looping_walk(run: Path, tmp_path: Path) -> None:
    main(SampleOptions(run=str(run), out=str(tmp_path / "out"), interpolate=True, n=4, seconds=2, fps=5))
    with Image.open(tmp_path / "out" / "interpolation_seed0000.webp") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (10, (32, 32), 0)


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = SampleOptions(run=str(run), n=1, out=str(out))
    main(options)
    before = (out / "grid.png").stat().st_mtime_ns
    with pytest.raises(LowVRAMError, match="holds seed0000_00000"):
        main(options)
    assert (out / "grid.png").stat().st_mtime_ns == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(LowVRAMError, match="is a file"):
        main(SampleOptions(run=str(run), n=1, out=str(tmp_path / "file")))
    with pytest.raises(LowVRAMError, match="without classes"):
        main(SampleOptions(run=str(run), n=1, classes="3", out=str(tmp_path / "never")))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"noise": "loud"}, "noise=loud"),
        ({"format": "gif"}, "format=gif"),
        ({"seconds": 0}, "seconds=0"),
        ({"micro_batch": -1}, "micro_batch=-1"),
        ({"truncation": float("nan")}, "truncation=nan"),
        ({}, "not a run folder"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(LowVRAMError, match=message):
        main(SampleOptions(run=str(tmp_path / "none"), **options))


def test_classes_by_number_and_name() -> None:
    task = SimpleNamespace(dataset=lambda: SimpleNamespace(class_names=["red", "blue", "7"]))
    assert pick_classes(None, task) is None
    assert pick_classes("3", task) == [3]
    assert pick_classes("0, 1", task) == [0, 1]
    assert pick_classes("blue,red", task) == [1, 0]
    with pytest.raises(LowVRAMError, match="class green is not known"):
        pick_classes("green", task)
