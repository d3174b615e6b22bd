"""Small images made on the spot, and a cache folder of the tests' own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import numbered

from lowvram.data import image_cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never touch the user's cache."""
    monkeypatch.setenv("LOWVRAM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(image_cache, "_warned", False)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[int], Path]:
    """make(n) -> a folder of n numbered images."""

    def make(count: int) -> Path:
        place = tmp_path / "images"
        place.mkdir()
        for index in range(count):
            (place / f"{index:04d}.png").write_bytes(numbered(index))
        return place

    return make
