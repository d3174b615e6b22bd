"""The installed wheel, in an empty folder, does what the clone does: conf/ and its recipes travel with it."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment
from tiny import TINY


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as pip installs it from its wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("lowvram-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def test_the_wheel_trains_samples_and_lists_its_recipes(installed: Path, tmp_path: Path) -> None:
    def python(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env={**environment(), "PYTHONPATH": str(installed)},
            capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert python("-c", "import lowvram; print(lowvram.__file__)").startswith(str(installed))
    assert "faces1024" in python("-m", "lowvram.train", "--help")
    python("-m", "lowvram.train", "recipe=faces32", *TINY, "kimg=0.016")
    python("-m", "lowvram.sample", "run=outputs/faces32", "n=2", "seed=0", "out=samples")
    assert len(list((tmp_path / "samples").glob("*.png"))) >= 2
