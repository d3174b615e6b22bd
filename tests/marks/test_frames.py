"""Frames of films: which are looked at, and that a watermark in them is found."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lowvram.identify import main as identify
from lowvram.marks import frames
from lowvram.marks.mark import Mark
from lowvram.marks.origin import Origin
from lowvram.marks.reading import look_into
from lowvram.sampling.animation import save_animation

cv2 = pytest.importorskip("cv2")
pytest.importorskip("imwatermark")


def walk(count: int = 9, size: int = 256, *, marked: bool) -> list[np.ndarray]:
    """Frames that wander over a picture: uint8 [size, size, 3]."""
    mark = Mark(origin=Origin(), watermark=marked)
    small = Image.fromarray(np.random.default_rng(0).integers(40, 216, (9, 9, 3), dtype=np.uint8))
    whole = np.asarray(small.resize((size + count, size + count), Image.Resampling.BICUBIC))
    return [mark.pixels(np.ascontiguousarray(whole[at : at + size, at : at + size])) for at in range(count)]


def written(pictures: list[np.ndarray], path: Path) -> Path:
    """As MPEG-4, part 2, which OpenCV writes without any other library."""
    height, width = pictures[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"mp4v"), 9, (width, height))
    assert writer.isOpened()
    for picture in pictures:
        writer.write(np.ascontiguousarray(picture[..., ::-1]))
    writer.release()
    return path


@pytest.mark.parametrize("format", ["webp", "mp4", "mp4v"])
@pytest.mark.parametrize("marked", [True, False])
def test_the_watermark_of_a_film_is_found(
    tmp_path: Path, format: str, marked: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"walk.{format[:4].removesuffix('v')}"
    if format == "mp4v":
        written(walk(marked=marked), path)
    else:
        if format == "mp4":
            pytest.importorskip("imageio_ffmpeg")
        tensors = (torch.from_numpy(picture).permute(2, 0, 1) for picture in walk(marked=marked))
        save_animation(tensors, path, format=format, fps=9)
    found = look_into(path)
    assert found.notes == [] and found.watermark is not None
    assert (found.watermark.frames, found.watermark.found, found.anything) == (4, marked, marked)
    capfd.readouterr()
    assert identify([str(path)]) == 0
    said = capfd.readouterr()
    assert ("at 256x256 in 4 frames together; measured:" in said.out) == marked
    assert said.err == ""


def test_frames_are_those_of_the_film_in_their_order(tmp_path: Path) -> None:
    greys = [np.full((64, 64, 3), 10 + 20 * index, np.uint8) for index in range(10)]
    images = [Image.fromarray(grey) for grey in greys]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], lossless=True)
    with Image.open(tmp_path / "a.webp") as image:
        found = frames.of_image(image)
    assert [int(frame[0, 0, 0]) for frame in found] == [10, 70, 130, 190]
    found = frames.of_mp4(written(greys, tmp_path / "a.mp4"))
    assert [round(int(frame[0, 0, 0]), -1) for frame in found] == [10, 70, 130, 190]
    with Image.open(tmp_path / "a.webp") as image:
        image.save(tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        assert len(frames.of_image(image)) == 1


@pytest.mark.parametrize(
    ("count", "pixels", "places"),
    [
        (1, 2**18, [0]),
        (2, 2**18, [0, 1]),
        (193, 2**18, [0, 64, 128, 192]),
        (10**9, 1, [0, 2543, 5085, 7628]),  # frames of no pixels cost time too
        (10**9, 50_000_000, [0, 9]),  # as many as memory is to hold
        (50, 100_000_000, [0]),
    ],
)
def test_how_far_into_a_film_one_looks(count: int, pixels: int, places: list[int]) -> None:
    assert frames._places(count, pixels) == places


def test_a_film_that_is_broken_or_of_too_many_pixels_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = written(walk(marked=False), tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    assert "watermark: no frame can be decoded" in look_into(tmp_path / "cut.mp4").notes
    monkeypatch.setattr(frames, "MOST_PIXELS", 256 * 255)
    assert "watermark: not looked for in 256x256 pixels" in look_into(tmp_path / "a.mp4").notes
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    assert any("not looked for; that needs pip install" in note for note in look_into(tmp_path / "a.mp4").notes)
    assert capfd.readouterr().err == ""
