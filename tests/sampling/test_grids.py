"""Grids hold every image in reading order, and files appear whole or not at all."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lowvram.errors import LowVRAMError
from lowvram.sampling import grids


@pytest.mark.parametrize(
    ("n", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (7, (3, 3)), (8, (2, 4)), (12, (3, 4))]
)
def test_grids_are_full_where_a_sensible_shape_is(n: int, shape: tuple[int, int]) -> None:
    assert grids.grid_shape(n) == shape


@given(n=st.integers(1, 400))
def test_a_grid_has_room_no_empty_row_and_is_no_strip(n: int) -> None:
    rows, columns = grids.grid_shape(n)
    assert rows * columns >= n > (rows - 1) * columns
    assert rows <= columns <= 2 * rows or n == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_images_lie_in_reading_order_and_blanks_are_white(tmp_path: Path, channels: int) -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, channels, 4, 6) * 10
    grids.save_grid(images, tmp_path / "grid.png", columns=3)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (18, 8)
        values = [grid.convert("L").getpixel((x, y)) for y in (1, 5) for x in (2, 8, 14)]
    assert values == [0, 10, 20, 30, 40, 255]
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    grids.save_png(torch.zeros(3, 4, 4, dtype=torch.uint8), path)
    before = path.read_bytes()

    def full_disk(self: Image.Image, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        grids.save_png(torch.ones(3, 4, 4, dtype=torch.uint8), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_float_images_are_refused() -> None:
    with pytest.raises(LowVRAMError, match=r"torch.float32 \[2, 3, 4, 4\]"):
        grids.make_grid(torch.zeros(2, 3, 4, 4))
